"""Builds: nothing lost, always the same bytes, resumed where they stopped, on disk and on S3."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from pipelines import build as build_module
from pipelines.build import BuildConfig, build
from pipelines.dataset import ShardDataset
from pipelines.manifest import PROGRESS, Manifest
from pipelines.schema import SCHEMA_VERSION, SHARD
from pipelines.storage import open_store
from pipelines.toy import ToySummary

pytestmark = pytest.mark.usefixtures("ray_cluster")


def checksums(out: str) -> dict[str, str]:
    store = open_store(out)
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name in store.list()}


def rejects(out: str, name: str = "rejects.parquet") -> list[dict[str, Any]]:
    return pq.read_table(Path(out) / name).to_pylist()


@pytest.fixture
def copy(toy_data: ToySummary, tmp_path: Path) -> Path:
    """The toy data set, to be spoilt."""
    return Path(shutil.copytree(toy_data.out, tmp_path / "copy"))


@pytest.fixture
def config(copy: Path, tmp_path: Path) -> BuildConfig:
    return BuildConfig(
        images=str(copy / "images"), annotations=str(copy / "annotations.json"), out=str(tmp_path / "out"),
        shorter_side=64, longer_side=128, rows_per_shard=5, max_reject_share=1.0, max_rejected_annotation_share=1.0,
    )  # fmt: skip


def edit(config: BuildConfig, change: Callable[[dict[str, Any]], None]) -> None:
    path = Path(config.annotations)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_every_image_and_object_is_there(toy_data: ToySummary, toy_shards: str) -> None:
    coco = json.loads(Path(toy_data.annotations_uri).read_text())
    dataset = ShardDataset(toy_shards)
    rows = [dataset.read(i) for i in range(len(dataset))]
    assert [row.image_id for row in rows] == [each["id"] for each in coco["images"]]
    counts = Counter(each["image_id"] for each in coco["annotations"])
    assert {row.image_id: len(row.instances) for row in rows} == counts
    assert [each.id for each in dataset.categories] == [1, 3, 7, 12]
    first = [each for each in coco["annotations"] if each["image_id"] == 1]
    for ours, theirs in zip(rows[0].instances, first, strict=True):
        x, y, width, height = theirs["bbox"]
        assert ours["box"] == [x, y, x + width, y + height]
        assert dataset.categories[ours["label"] - 1].id == theirs["category_id"] == ours["category_id"]
        assert ours["area"] == theirs["area"]


def test_bad_images_become_rejects(config: BuildConfig, copy: Path) -> None:
    images = copy / "images"
    data = (images / "000000000002.jpg").read_bytes()
    (images / "000000000002.jpg").write_bytes(data[: len(data) // 2])
    (images / "000000000004.jpg").write_bytes(b"")
    (images / "000000000005.jpg").unlink()
    (images / "000000000007.jpg").write_text("no image at all")
    (images / "000000000008.jpg").unlink()
    (images / "000000000008.jpg").mkdir()
    (images / "000000000010.jpg").write_bytes((images / "000000000001.jpg").read_bytes())
    edit(config, lambda coco: coco["images"][9].update(width=1, height=1))
    edit(config, lambda coco: coco["images"].append({"id": 99, "file_name": "../../secret.jpg"}))
    summary = build(config)
    assert summary.totals.images == 17
    assert summary.totals.rows == 10
    found = {Path(each["uri"]).name: (each["stage"], each["reason"].split(":")[0]) for each in rejects(config.out)}
    assert found == {
        "000000000002.jpg": ("decode", "damaged image"),
        "000000000004.jpg": ("decode", "the file is empty"),
        "000000000005.jpg": ("read", "no such file"),
        "000000000007.jpg": ("decode", "not an image of a known format"),
        "000000000008.jpg": ("read", "no such file"),
        "000000000010.jpg": ("validate", "image is not of the annotated size"),
        "secret.jpg": ("source", "file name leads out of the image folder"),
    }
    assert summary.rejects_by_reason["read: no such file"] == 2
    assert "rejected images: 2 x read: no such file" in str(summary)
    assert len(ShardDataset(config.out)) == 10
    assert len(rejects(config.out)) + summary.totals.rows == summary.totals.images
    lost = rejects(config.out, "rejected_annotations.parquet")
    assert len(lost) + summary.totals.instances == summary.totals.annotations
    assert {each["reason"].split(":")[0] for each in lost} == {"image rejected"}


def test_crowds_and_empty_images_survive(config: BuildConfig) -> None:
    def change(coco: dict[str, Any]) -> None:
        coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] != 2]
        image = coco["images"][0]
        size = [image["height"], image["width"]]
        crowd = {"size": size, "counts": [size[0] * 10, size[0] * 20, size[0] * (size[1] - 30)]}
        coco["annotations"][0] |= {"iscrowd": 1, "segmentation": crowd, "bbox": [10, 0, 20, size[0]]}
        coco["annotations"][1]["bbox"] = [0, 0, 0, 0]

    edit(config, change)
    summary = build(config)
    dataset = ShardDataset(config.out)
    crowded, empty = dataset.read(0), dataset.read(1)
    assert crowded.instances[0]["iscrowd"]
    assert crowded.instances[0]["segmentation"]["rle"]["size"] == list(crowded.image.shape[:2])
    assert empty.instances == []
    (reject,) = rejects(config.out, "rejected_annotations.parquet")
    assert reject["reason"] == "box has no extent: 0 x 0"
    assert summary.totals.rejects == 0


def test_same_bytes_on_disk_and_s3_with_one_task_or_many(
    toy_config: BuildConfig, toy_shards: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = checksums(toy_shards)
    assert {"manifest.json", "rejects.parquet", "shard-00000.arrow", "shard-00003.arrow"} < expected.keys()
    build(replace(toy_config, out=f"{s3}/shards"))
    assert checksums(f"{s3}/shards") == expected
    from_items = ray.data.from_items
    with monkeypatch.context() as patch:  # all shards in one block, so one after another in one task
        patch.setattr(ray.data, "from_items", lambda items, **_: from_items(items, override_num_blocks=1))
        build(replace(toy_config, out=str(tmp_path)))
    assert checksums(str(tmp_path)) == expected


def test_from_s3_to_s3(toy_data: ToySummary, toy_config: BuildConfig, toy_shards: str, s3: str) -> None:
    store = open_store(f"{s3}/source")
    for name in open_store(toy_data.out).list():
        store.write_bytes(name, (Path(toy_data.out) / name).read_bytes())
    source = {"images": f"{s3}/source/images", "annotations": f"{s3}/source/annotations.json"}
    summary = build(replace(toy_config, **source, out=f"{s3}/from-s3"))
    assert summary.totals.rows == 16
    here, there = ShardDataset(toy_shards), ShardDataset(f"{s3}/from-s3")
    for i in (0, 7, 15):
        ours, theirs = here.read(i), there.read(i)
        assert ours.image_id == theirs.image_id
        assert ours.instances == theirs.instances
        np.testing.assert_array_equal(ours.image, theirs.image)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_goes_on_where_it_stopped(
    toy_config: BuildConfig, toy_shards: str, where: str, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = str(tmp_path / "out") if where == "disk" else f"{request.getfixturevalue('s3')}/stopped"
    config = replace(toy_config, out=out)
    run = build_module.run_tasks

    def run_two(function: Any, tasks: Iterator[Any]) -> Iterator[Any]:
        yield from run(function, islice(tasks, 2))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "run_tasks", run_two)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    with pytest.raises(FileNotFoundError, match="no finished shards"):
        ShardDataset(out)
    with pytest.raises(ValueError, match=r"another build .shorter_side 96 there, 90 here"):
        build(replace(config, shorter_side=90))
    open_store(out).write_bytes("shard-00002.arrow", b"shard without receipt")
    if where == "disk":
        Path(out, ".shard-00003.arrow.0123456789abcdef0123456789abcdef.part").write_bytes(b"of a task that was killed")
    summary = build(config)
    assert (summary.shards, summary.shards_made) == (4, 2)
    assert checksums(out) == checksums(toy_shards), "nor is anything else left"
    assert where == "s3" or not list(Path(out).glob(".*"))


def test_finished_build_is_left_alone(config: BuildConfig) -> None:
    first = build(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
    second = build(config)
    assert second.shards_made == second.rows_made == 0
    assert second.digest == first.digest
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
    Path(config.out, "shard-00001.arrow").unlink()
    assert build(config).digest == first.digest
    assert Path(config.out, "shard-00001.arrow").exists()


@pytest.mark.parametrize("other", [{"encoding": "png"}, {"rows_per_shard": 4}, {"shorter_side": 32}])
def test_refuses_the_folder_of_another_build(toy_config: BuildConfig, toy_shards: str, other: dict) -> None:
    before = checksums(toy_shards)
    with pytest.raises(ValueError, match="holds another build"):
        build(replace(toy_config, out=toy_shards, **other))
    assert checksums(toy_shards) == before


def test_refuses_shards_of_unknown_origin(config: BuildConfig) -> None:
    open_store(config.out).write_bytes("shard-00000.arrow", b"?")
    with pytest.raises(ValueError, match="shards of an unknown build"):
        build(config)


def test_fails_where_nothing_is_usable_and_can_be_repeated(config: BuildConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"not one image .*16 x read: no such file"):
        build(replace(config, images=str(tmp_path / "empty")))
    assert len(rejects(config.out)) == 16
    assert build(config).totals.rows == 16


def test_missing_inputs(config: BuildConfig) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere"):
        build(replace(config, images="/nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no file .*/nowhere.json"):
        build(replace(config, annotations="/nowhere.json"))
    assert not Path(config.out).exists()


def test_wrong_credentials(config: BuildConfig, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError, match="AWS_SECRET_ACCESS_KEY"):
        build(replace(config, images=f"{s3}/source/images"))
    with pytest.raises(PermissionError, match="AWS_SECRET_ACCESS_KEY"):
        build(replace(config, out=f"{s3}/out"))


def test_missing_bucket(config: BuildConfig, s3: str) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        build(replace(config, out="s3://no-such-bucket/out"))


def test_a_failing_task_ends_the_build_in_words(config: BuildConfig) -> None:
    """What the storage cannot do is no reject: here a folder stands where a shard belongs."""
    Path(config.out, "shard-00002.arrow").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"shard-00002\.arrow cannot be written, a folder has its name"):
        build(config)
    assert not Path(config.out, "manifest.json").exists()
    assert not list(Path(config.out).glob("**/*.part"))


@pytest.mark.parametrize(
    "wrong", [{"shorter_side": -1}, {"longer_side": 10}, {"rows_per_shard": 0}, {"encoding": "gif"}]
)
def test_nonsense_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        BuildConfig(**{"images": "a", "annotations": "b", "out": "c", **wrong})


def test_pixels_of_another_version_are_not_mixed(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    build(config)
    now = build_module.PIXELS_VERSION
    monkeypatch.setattr(build_module, "PIXELS_VERSION", now + 1)
    with pytest.raises(ValueError, match=f"another build .pixels_version {now} there, {now + 1} here"):
        build(config)


def test_manifest_tells_damage(config: BuildConfig) -> None:
    build(config)
    store = open_store(config.out)
    path = Path(config.out, "manifest.json")
    text = path.read_text()
    for broken in ("{", "{}", text.replace('"rows": 16', '"rows": 15'), text.replace('"star"', '"moon"')):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            Manifest.read(store)
    for other in (1, SCHEMA_VERSION + 1):
        path.write_text(text.replace(f'"schema_version": {SCHEMA_VERSION}', f'"schema_version": {other}'))
        with pytest.raises(ValueError, match=f"has schema version {other}, .* reads {SCHEMA_VERSION}: build the data"):
            Manifest.read(store)


def test_damaged_shard_is_told(config: BuildConfig) -> None:
    build(config)
    path = Path(config.out, "shard-00000.arrow")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-00000\.arrow is damaged"):
        ShardDataset(config.out).read(0)


def test_read_by_plain_pyarrow_and_duckdb(toy_shards: str) -> None:
    path = Path(toy_shards, "shard-00000.arrow")
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        shard = reader.read_all()
        assert reader.num_record_batches == shard.num_rows == 5, "a row is a record batch"
    assert shard.schema.equals(SHARD)
    assert duckdb.sql("select count(*), min(octet_length(image) - height * width * 3) from shard").fetchall() == [
        (5, 0)
    ]
    objects = duckdb.sql("select unnest(instances, recursive := true) from shard").fetchall()
    assert len(objects) == sum(len(each) for each in shard["instances"].to_pylist())


def test_no_progress_folder_is_left(toy_shards: str) -> None:
    assert not Path(toy_shards, PROGRESS).exists()


@pytest.mark.coco100
def test_real_images(coco100: Path, tmp_path: Path) -> None:
    annotations = str(coco100 / "annotations/instances_val2017.json")
    summary = build(
        BuildConfig(
            images=str(coco100 / "val2017"),
            annotations=annotations,
            out=str(tmp_path),
            rows_per_shard=16,
        )
    )
    assert summary.totals.rows == 50
    assert summary.totals.instances == summary.totals.annotations == 382
    dataset = ShardDataset(str(tmp_path))
    for i in range(0, 50, 7):
        row = dataset.read(i)
        assert min(row.image.shape[:2]) == 800 or max(row.image.shape[:2]) == 1333
        assert max(each["box"][2] for each in row.instances) <= row.image.shape[1]
    crowds = [each for i in range(50) for each in dataset.read(i).instances if each["iscrowd"]]
    assert len(crowds) == 5
