"""verify-data: nothing to say of good shards, on disk and on S3; each damage is told with shard, row and reason."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from inline import run_inline
from made_shards import instance, make_shards, row

from mrcnn.structures import Category
from pipelines import verify as verify_module
from pipelines.build import BuildConfig, build
from pipelines.inspect import _read_shard
from pipelines.manifest import Manifest, reject_list
from pipelines.records import REJECTS
from pipelines.schema import SHARD
from pipelines.shards import write_shard
from pipelines.storage import Store, open_store
from pipelines.verify import verify
from pipelines.verify_rows import row_faults

pytestmark = pytest.mark.usefixtures("ray_cluster")

SHARD_NAME = "shard-00002.arrow"


@pytest.fixture
def folder(toy_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoilt, looked at in this process."""
    monkeypatch.setattr(verify_module, "run_tasks", run_inline)
    return Path(shutil.copytree(toy_shards, tmp_path / "shards"))


def restate(folder: Path, **totals: int) -> None:
    """Let the manifest say what is there now, so that only what is in the rows is wrong."""
    manifest = Manifest.read(Store(str(folder)))
    shards = []
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        shards.append(replace(shard, bytes=len(data), xxh128=xxhash.xxh3_128(data).hexdigest()))
    replace(manifest, shards=tuple(shards), totals=replace(manifest.totals, **totals)).write(Store(str(folder)))


def change_rows(folder: Path, change: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema = SHARD) -> None:
    path = folder / SHARD_NAME
    with pa.memory_map(str(path)) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    change(rows)
    path.unlink()
    write_shard(path, rows, schema)
    restate(folder)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_good_shards(toy_config: BuildConfig, toy_shards: str, where: str, request: pytest.FixtureRequest) -> None:
    uri = toy_shards
    if where == "s3":
        uri = f"{request.getfixturevalue('s3')}/verify"
        build(replace(toy_config, out=uri))
    report = verify(uri)
    assert report.problems == report.extra == ()
    report.check()
    assert "16 rows + 0 rejects = 16 images" in str(report)
    assert f"digest {Manifest.read(open_store(toy_shards)).digest}" in str(report)


@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_other_encodings(toy_config: BuildConfig, encoding: Any, tmp_path: Path) -> None:
    config = replace(toy_config, out=str(tmp_path / "out"), encoding=encoding, shorter_side=40, longer_side=50)
    build(config)
    assert verify(config.out).problems == ()


def test_a_broken_byte_through_ray(toy_shards: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_shards, tmp_path / "shards"))
    path = folder / SHARD_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = verify(str(folder))
    assert report.problems == (f"{SHARD_NAME}: its checksum is not the stated one",)
    with pytest.raises(ValueError, match=rf"is broken: {SHARD_NAME}: its checksum .*build the data again") as told:
        report.check()
    assert "\n" not in str(told.value)


def test_a_cut_shard(folder: Path) -> None:
    path = folder / SHARD_NAME
    path.write_bytes(path.read_bytes()[:-1000])
    problems = verify(str(folder)).problems
    assert any("bytes are stated" not in each and "are stated" in each and "bytes" in each for each in problems)
    assert any("no Arrow file" in each for each in problems)


def test_files_that_are_missing_or_should_not_be_there(folder: Path) -> None:
    (folder / SHARD_NAME).unlink()
    (folder / "rejects.parquet").unlink()
    (folder / "shard-00009.arrow").write_bytes(b"of another build")
    (folder / ".shard-00000.arrow.0123.part").write_bytes(b"of a killed task")
    (folder / "notes.txt").write_text("mine")
    report = verify(str(folder))
    assert report.problems == (
        "shard-00009.arrow: the manifest does not know it",
        "rejects.parquet: it is missing",
        f"{SHARD_NAME}: it is missing",
    )
    assert report.extra == (".shard-00000.arrow.0123.part", "notes.txt")
    assert "not of this data set: notes.txt" in str(report)


def test_lists_of_rejects(folder: Path) -> None:
    for rows, schema, told in (
        ([reject("a")], REJECTS, "it has 1 rows, 0 are stated"),
        ([], REJECTS.remove(0), "its columns are"),
    ):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "rejects.parquet")
        (problem,) = verify(str(folder)).problems
        assert told in problem
    (folder / "rejects.parquet").write_bytes(b"PAR1")
    (problem,) = verify(str(folder)).problems
    assert problem.startswith("rejects.parquet: it is damaged")


def reject(uri: str) -> dict[str, Any]:
    return {"uri": uri, "image_id": 1, "stage": "read", "reason": "no such file"}


def parquet(*rows: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=REJECTS), sink)
    return sink.getvalue()


def with_one_reject(folder: Path) -> Path:
    """The list's file, as the manifest says."""
    store, file = Store(str(folder)), folder / "rejects.parquet"
    manifest = Manifest.read(store)
    file.write_bytes(parquet(reject("a")))
    totals = replace(manifest.totals, images=manifest.totals.images + 1, rejects=1)
    lists = (reject_list(file.name, file.read_bytes()), manifest.reject_lists[1])
    replace(manifest, totals=totals, reject_lists=lists).write(store)
    assert verify(str(folder)).problems == ()
    return file


def test_a_list_of_rejects_of_another_build(folder: Path) -> None:
    with_one_reject(folder).write_bytes(parquet(reject("b")))
    assert verify(str(folder)).problems == ("rejects.parquet: its checksum is not the stated one",)


def test_every_damaged_byte_of_a_list_of_rejects(folder: Path) -> None:
    file = with_one_reject(folder)
    store, data = Store(str(folder)), file.read_bytes()
    manifest, sizes = Manifest.read(store), dict(store.entries())
    for place in range(0, len(data), 3):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        (fault,) = verify_module._list_faults(store, sizes, manifest)
        assert fault.startswith("rejects.parquet: "), place


def test_a_manifest_from_before_the_lists_were_stated(folder: Path) -> None:
    manifest = Manifest.read(open_store(str(folder)))
    build_then = {key: value for key, value in manifest.build.items() if key != "pixels_version"}
    replace(manifest, build=build_then, reject_lists=()).write(open_store(str(folder)))
    assert verify(str(folder)).problems == ()


def test_every_damaged_byte_of_a_shard(tmp_path: Path) -> None:
    """Whatever it makes of the file: flags, types, lengths, text."""
    uri = make_shards(tmp_path / "shards", [row(1, (4, 4), [instance([1, 1, 3, 3])])])
    store = Store(uri)
    manifest = Manifest.read(store)
    (info,) = manifest.shards
    path = store.path / info.name
    data, task = path.read_bytes(), {"name": info.name, "shard": json.dumps(asdict(info))}
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        told = json.loads(verify_module.check_shard(task, store, manifest.categories)["faults"])
        assert f"{info.name}: its checksum is not the stated one" in told
        try:
            _read_shard(store, info)
        except ValueError as error:
            assert str(error).startswith(f"{path} ")  # noqa: PT017


def first(change: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """A change of the first instance of row 1."""
    return lambda rows: change(rows[1]["instances"][0])


def square(side: float) -> dict[str, Any]:
    return {"polygons": [[0, 0, side, 0, side, side]], "rle": None}


FAULTS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "raw pixels": (lambda rows: rows[1].update(image=rows[1]["image"][:-3]), "row 1: its raw image of .* not decode"),
    "png": (lambda rows: rows[1].update(encoding="png"), "row 1: its png image of .* does not decode"),
    "encoding": (lambda rows: rows[1].update(encoding="gif"), "row 1: its gif image of .* does not decode"),
    "side": (lambda rows: rows[1].update(height=0), "row 1: a side is missing or not positive"),
    "source side": (lambda rows: rows[1].update(source_width=-1), "row 1: a side is missing or not positive"),
    "uri": (lambda rows: rows[1].update(uri=None), "row 1: uri is missing"),
    "twins": (lambda rows: rows[1].update(image_id=1), f"{SHARD_NAME} row 1: image id 1 comes twice"),
    "label 0": (first(lambda each: each.update(label=0)), "row 1: instance 0: label 0 is none of 1 to 4"),
    "label 5": (first(lambda each: each.update(label=5)), "instance 0: label 5 is none of 1 to 4"),
    "category": (first(lambda each: each.update(category_id=77)), "instance 0: category id 77, but label"),
    "area": (first(lambda each: each.update(area=-1)), "instance 0: area -1.0"),
    "box outside": (first(lambda each: each.update(box=[5, 5, 999, 9])), "box .* does not lie in the image"),
    "empty box": (first(lambda each: each.update(box=[5, 5, 5, 9])), "box .* does not lie in the image"),
    "NaN": (first(lambda each: each.update(box=[5, float("nan"), 6, 9])), "box is not four numbers"),
    "polygon": (
        first(lambda each: each.update(segmentation={"polygons": [[1, 2, 3, 4]], "rle": None})),
        "a polygon has",
    ),
    "far": (first(lambda each: each.update(segmentation=square(9999))), "lies far outside the image"),
    "rle size": (
        first(lambda each: each.update(segmentation={"polygons": None, "rle": {"size": [2, 2], "counts": "04"}})),
        r"run lengths are for \[2, 2\]",
    ),
    "keypoints": (first(lambda each: each.update(keypoints=[1, 2])), "keypoints are not those of"),
    "visibility": (first(lambda each: each.update(keypoints=[1, 2, 3])), "visibility is neither 0, 1 nor 2"),
    "null instance": (lambda rows: rows[1]["instances"].__setitem__(0, None), "row 1: instance 0: it is null"),
    "null counts": (
        lambda rows: rows[1]["instances"][0].update(
            segmentation={"polygons": None, "rle": {"size": [rows[1]["height"], rows[1]["width"]], "counts": None}}
        ),
        "run lengths have no counts",
    ),
    "no bytes": (lambda rows: rows[1].update(encoding="png", image=b""), "row 1: its png image of .* does not decode"),
    "lost row": (lambda rows: rows.pop(), f"{SHARD_NAME}: it has 4 rows, 5 are stated"),
    "lost object": (lambda rows: rows[1]["instances"].pop(), r"manifest.json: \d+ instances are stated, \d+ are in"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_rows(folder: Path, name: str) -> None:
    change, told = FAULTS[name]
    change_rows(folder, change)
    with pytest.raises(ValueError, match=told):
        verify(str(folder)).check()


@pytest.mark.parametrize("portrait", ["", "ff"])
def test_which_rows_are_taller_than_wide(folder: Path, portrait: str) -> None:
    """Training takes it from the manifest."""
    manifest = Manifest.read(Store(str(folder)))
    first_shard, *others = manifest.shards
    replace(manifest, shards=(replace(first_shard, portrait=portrait), *others)).write(Store(str(folder)))
    (problem,) = verify(str(folder)).problems
    assert problem == "shard-00000.arrow: which rows are taller than wide is not as stated"


def test_a_side_that_is_null() -> None:
    """Which our own writer refuses."""
    spoilt = {**row(1, (12, 12), [instance([1, 1, 5, 5])]), "height": None}
    (fault,) = row_faults(spoilt, memoryview(spoilt["image"]), [Category(1, "thing")])
    assert fault.startswith("a side is missing or not positive")


def test_masks_of_another_size(folder: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        size = [rows[1]["height"], rows[1]["width"]]
        rows[1]["instances"][0]["segmentation"] = {"polygons": None, "rle": {"size": size, "counts": "04"}}

    change_rows(folder, change)
    (problem,) = verify(str(folder)).problems
    assert problem.startswith(f"{SHARD_NAME} row 1: instance 0: mask is damaged")


def test_another_schema(folder: Path) -> None:
    change_rows(folder, lambda rows: None, schema=SHARD.remove_metadata())
    assert verify(str(folder)).problems[0] == f"{SHARD_NAME}: its schema is not that of this version"


def test_many_faults_are_cut_short(folder: Path) -> None:
    change_rows(folder, lambda rows: [row.update(encoding="gif", image_id=1) for row in rows])
    report = verify(str(folder))
    assert sum("gif" in each for each in report.problems) == 5
    with pytest.raises(ValueError, match=r"and \d+ more"):
        report.check()


@pytest.mark.parametrize("text", ["[" * 20_000, '{"schema_version": ' + "9" * 5000 + "}", "nothing", "\xff"])
def test_a_manifest_that_is_no_json_names_itself(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"/manifest\.json is damaged .\w+.: build the data again"):
        Manifest.read(open_store(str(folder)))


@pytest.mark.parametrize("left", [0, 1])
def test_a_manifest_states_both_lists_of_rejects(folder: Path, left: int) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["reject_lists"] = content["reject_lists"][:left]
    (folder / "manifest.json").write_text(json.dumps(content))
    assert "manifest.json: it does not state the two lists of rejects" in verify(str(folder)).problems


def test_names_are_told_in_a_line_of_their_own(folder: Path) -> None:
    (folder / "x\x1b[31m\nBROKEN y").touch()
    told = str(verify(str(folder)))
    assert r"not of this data set: x\x1b[31m\nBROKEN y" in told
    assert "\nBROKEN" not in told


def test_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"rows": 16', '"rows": 15'))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        verify(str(folder))
    (folder / "manifest.json").write_text(text.replace('"star"', '"moon"'))
    with pytest.raises(ValueError, match=r"manifest\.json was changed"):
        verify(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished shards"):
        verify(str(folder))


def test_totals_that_fit_each_other_but_not_the_shards(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    restate(folder, images=manifest["totals"]["images"] + 1, rows=manifest["totals"]["rows"] + 1)
    told = "are stated, 16 are in the shards"
    assert verify(str(folder)).problems == (f"manifest.json: 17 rows {told}", f"manifest.json: 17 images {told}")
