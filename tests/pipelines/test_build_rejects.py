"""What cannot be used becomes a reject, by stage and reason; too many end the build, which can go on."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from inline import run_inline

from pipelines import build as build_module
from pipelines.build import BuildConfig, build, prepare
from pipelines.records import Reject
from pipelines.toy import ToySummary

pytestmark = pytest.mark.usefixtures("ray_cluster")

LOST = [
    ("max_reject_share", "images"),
    ("max_rejected_annotation_share", "annotations"),
]
SPOILT = [f"00000000000{i}.jpg" for i in (2, 3, 4)]


@pytest.fixture
def config(toy_data: ToySummary, tmp_path: Path) -> BuildConfig:
    """Of a copy of the toy data set, to be spoilt."""
    copy = Path(shutil.copytree(toy_data.out, tmp_path / "copy"))
    return BuildConfig(
        images=str(copy / "images"), annotations=str(copy / "annotations.json"), out=str(tmp_path / "out"),
        shorter_side=64, longer_side=128, rows_per_shard=4,
    )  # fmt: skip


def rejects(out: str, name: str = "rejects.parquet") -> list[dict[str, Any]]:
    return pq.read_table(Path(out) / name).to_pylist()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_files_that_are_no_images(config: BuildConfig) -> None:
    images = Path(config.images)
    good = (images / "000000000001.jpg").read_bytes()
    spoilt = {f"cut{i}.jpg": good[: len(good) * i // 10] for i in range(10)}
    spoilt |= {"text.png": b"not an image", "bomb.png": bomb(60_000, 60_000), "large.png": bomb(2000, 2000)}
    for name, data in spoilt.items():
        (images / name).write_bytes(data)
    (images / "jpeg.png").write_bytes(good)
    names = [*spoilt, "missing.jpg", "jpeg.png"]
    content = json.loads(Path(config.annotations).read_text())
    content["images"] += [{"id": 1000 + i, "file_name": name} for i, name in enumerate(names)]
    Path(config.annotations).write_text(json.dumps(content))
    summary = build(replace(config, max_reject_share=0.5))
    assert summary.totals.rows == 16 + 1, "the extension says nothing, the content all"
    found = {Path(each["uri"]).name: (each["stage"], each["reason"].split(":")[0]) for each in rejects(config.out)}
    assert found == {
        "cut0.jpg": ("decode", "the file is empty"),
        **{f"cut{i}.jpg": ("decode", "damaged image") for i in range(1, 10)},
        "text.png": ("decode", "not an image of a known format"),
        "bomb.png": ("decode", "decompression bomb"),
        "large.png": ("decode", "damaged image"),
        "missing.jpg": ("read", "no such file"),
    }


def test_annotations_that_are_no_objects(config: BuildConfig) -> None:
    content = json.loads(Path(config.annotations).read_text())
    image = content["images"][0]
    size = [image["height"], image["width"]]
    template = {**next(each for each in content["annotations"] if each["image_id"] == image["id"])}
    faults: list[tuple[str, dict[str, Any]]] = [
        ("box lies outside the image", {"bbox": [image["width"] + 5, 3, 10, 10]}),
        ("box lies outside the image", {"bbox": [-20, 3, 10, 10]}),
        ("box has no extent", {"bbox": [5, 5, 0, 10]}),
        ("box has no extent", {"bbox": [5, 5, 10, -1]}),
        ("box is not a list of finite numbers", {"bbox": [float("nan"), 5, 10, 10]}),
        ("box is not a list of finite numbers", {"bbox": [5, 5, float("inf"), 10]}),
        ("polygon has fewer than three points or an odd count", {"segmentation": [[1, 1, 9, 9]]}),
        ("polygon is not a list of finite numbers", {"segmentation": [[1, 1, 9, 9, float("nan"), 2]]}),
        ("run lengths are for another size", {"segmentation": {"size": [size[1] + 1, size[0]], "counts": [4]}}),
        ("run lengths do not fill the image", {"segmentation": {"size": size, "counts": [3, 4]}}),
    ]
    for i, (_, change) in enumerate(faults):
        content["annotations"].append({**template, "id": 10_000 + i, **change})
    Path(config.annotations).write_text(json.dumps(content))
    summary = build(config)
    lost = rejects(config.out, "rejected_annotations.parquet")
    assert {each["annotation_id"]: (each["stage"], each["reason"].split(":")[0]) for each in lost} == {
        10_000 + i: ("validate", reason) for i, (reason, _) in enumerate(faults)
    }
    assert summary.totals.annotations == len(content["annotations"]) == summary.totals.instances + len(faults)


def test_a_file_that_may_not_be_read_is_a_reject(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, so that reading can be made to fail: the tests may run as root, whom no mode stops."""
    from pipelines.storage import Store
    from pipelines.storage_errors import FileRefusedError

    read = Store.read_bytes

    def refusing(self: Store, name: str, at_most: int | None = None) -> bytes:
        if name == "000000000003.jpg":
            raise FileRefusedError("no")
        return read(self, name, at_most)

    monkeypatch.setattr(Store, "read_bytes", refusing)
    monkeypatch.setattr(build_module, "run_tasks", run_inline)
    assert build(config).rejects_by_reason == {"read: no permission": 1}


def spoil(config: BuildConfig, what: str) -> None:
    """Three images, or an object of each of three images."""
    if what == "images":
        for name in SPOILT:
            Path(config.images, name).write_bytes(b"spoilt")
        return
    content = json.loads(Path(config.annotations).read_text())
    for image in (2, 3, 4):
        next(each for each in content["annotations"] if each["image_id"] == image)["bbox"] = [0, 0, 0, 0]
    Path(config.annotations).write_text(json.dumps(content))


@pytest.mark.parametrize(("setting", "what"), LOST)
def test_too_many_rejects_end_the_build_which_goes_on_when_more_are_allowed(
    config: BuildConfig, setting: str, what: str
) -> None:
    spoil(config, what)
    option = "--" + setting.replace("_", "-")
    share = rf"3 of \d+ {what}.* \(\d+.\d%\) were rejected, {option} is 0.01 \(3 x"
    with pytest.raises(ValueError, match=share) as told:
        build(replace(config, **{setting: 0.01}))
    assert SPOILT[0] in str(told.value), "examples"
    assert "rejects.parquet" in str(told.value)
    assert "\n" not in str(told.value)
    name = "rejects.parquet" if what == "images" else "rejected_annotations.parquet"
    assert [Path(each["uri"]).name for each in rejects(config.out, name)][:1] == [SPOILT[0]]
    assert not Path(config.out, "manifest.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in Path(config.out).glob("*.arrow")}
    assert len(times) == 4
    summary = build(replace(config, **{setting: 1.0}))
    assert summary.shards_made == 0
    assert summary.totals.rejects + summary.totals.rejected_annotations >= 3
    assert times == {path.name: path.stat().st_mtime_ns for path in Path(config.out).glob("*.arrow")}


def test_mended_images_are_taken_by_the_same_command(config: BuildConfig) -> None:
    spoilt = Path(config.images, "000000000002.jpg")
    good = spoilt.read_bytes()
    spoilt.unlink()
    strict = replace(config, max_reject_share=0.0)
    with pytest.raises(ValueError, match=r"1 of 16 images .*1 x read: no such file.*2\.jpg: no such file"):
        build(strict)
    with pytest.raises(ValueError, match="1 of 16 images"):
        build(strict)
    spoilt.write_bytes(good)
    summary = build(strict)
    assert (summary.shards_made, summary.totals.rows, summary.totals.rejects) == (1, 16, 0)


@pytest.mark.parametrize("enough", [0, 1000])
def test_a_share_is_not_exceeded_by_rounding(config: BuildConfig, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.29 * 100 is less than 29."""
    monkeypatch.setattr(build_module, "run_tasks", run_inline)
    monkeypatch.setattr(build_module, "ENOUGH", enough)
    content = json.loads(Path(config.annotations or "").read_text())
    images = [{**content["images"][i % 16], "id": i} for i in range(100)]
    for each in images[:29]:
        each["file_name"] = f"nowhere{each['id']}.jpg"
    Path(config.annotations or "").write_text(json.dumps({**content, "images": images, "annotations": []}))
    with pytest.raises(ValueError, match="29 of 100 images"):
        build(replace(config, max_reject_share=0.28))
    assert build(replace(config, max_reject_share=0.29)).totals.rejects == 29


def test_what_signs_an_address_is_in_no_list_of_rejects(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "run_tasks", run_inline)
    content = json.loads(Path(config.annotations or "").read_text())
    signed = "https://bucket.example/a/b.jpg?X-Amz-Signature=SECRET"
    names = [signed, "s3://KEY:SECRET@bucket/a.jpg"]
    content["images"] += [{"id": 1000 + i, "file_name": name} for i, name in enumerate(names)]
    content["images"] += [{"id": 2000, "coco_url": signed}]
    content["annotations"][0]["category_id"] = signed
    Path(config.annotations or "").write_text(json.dumps(content))
    build(replace(config, max_reject_share=0.5))
    lists = rejects(config.out), rejects(config.out, "rejected_annotations.parquet")
    assert "SECRET" not in str(lists)
    assert [each["uri"].removeprefix(f"{config.images}/") for each in lists[0]] == [
        "https://bucket.example/a/b.jpg", "s3://bucket/a.jpg", "a/b.jpg",
    ]  # fmt: skip
    assert [each["reason"] for each in lists[1]] == ["unknown category: 'https://bucket.example/a/b.jpg'"]


@pytest.mark.parametrize("before", range(960, 1010, 3))
def test_half_an_address_is_no_way_round(before: int) -> None:
    for address in ("s3://KEYNAME:SECRET@b/x", "az://box/x?sig=SECRET", "https://host.example/x?sig=SECRET"):
        reason = Reject("a", 1, "source", f"{'x' * before} {address} {'y' * 100}").reason
        assert "KEY" not in reason
        assert "SEC" not in reason
        assert len(reason) <= 1003


def test_many_rejects_end_a_large_build_early(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def spoilt(function: Any, tasks: Any) -> Any:
        for task in tasks:
            seen["tasks"] += 1
            yield function(task)

    for path in list(Path(config.images).iterdir())[:14]:
        path.write_bytes(b"")
    monkeypatch.setattr(build_module, "ENOUGH", 3)
    monkeypatch.setattr(build_module, "run_tasks", spoilt)
    with pytest.raises(ValueError, match=r"of 16 images .*decode: the file is empty"):
        build(config)
    assert seen["tasks"] < 4
    assert build(replace(config, max_reject_share=0.9)).totals.rejects == 14


def test_a_refused_build_leaves_no_shards_of_tasks_that_had_begun(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is given many tasks at once, and those that it has begun go on."""

    def eager(function: Any, tasks: Any) -> Any:
        yield from list(run_inline(function, tasks))

    good = {path: path.read_bytes() for path in Path(config.images).iterdir()}
    for path in good:
        path.write_bytes(b"")
    monkeypatch.setattr(build_module, "ENOUGH", 3)
    monkeypatch.setattr(build_module, "run_tasks", eager)
    with pytest.raises(ValueError, match=r"not one image of .*nothing else is kept"):
        build(config)
    assert not list(Path(config.out).glob("*.arrow"))
    for path, data in good.items():
        path.write_bytes(data)
    assert build(config).totals.rows == 16


def test_a_refused_build_leaves_no_shard_without_receipt(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that was killed between the two leaves one."""
    monkeypatch.setattr(build_module, "run_tasks", run_inline)
    content = json.loads(Path(config.annotations or "").read_text())
    content["images"] += [{"id": 1000 + i, "file_name": f"../{i}.jpg"} for i in range(4)]
    Path(config.annotations or "").write_text(json.dumps(content))
    prepare(replace(config, max_reject_share=1.0))
    Path(config.out, "shard-00000.arrow").write_bytes(b"without receipt")
    with pytest.raises(ValueError, match=r"4 of 20 images .*nothing else is kept"):
        build(config)
    assert build(replace(config, max_reject_share=1.0)).totals.rows == 16


@pytest.mark.parametrize(("setting", "what"), LOST)
def test_a_finished_build_is_measured_by_lower_shares(
    config: BuildConfig, setting: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "run_tasks", run_inline)
    spoil(config, what)
    build(replace(config, **{setting: 0.9}))
    before = Path(config.out, "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=rf"3 of \d+ {what}.* were rejected.* is finished.* give a new --out") as told:
        build(replace(config, **{setting: 0.01}))
    assert SPOILT[0] in str(told.value), "examples"
    assert Path(config.out, "manifest.json").read_bytes() == before
    assert build(replace(config, **{setting: 0.9})).shards_made == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_from_0_to_1(config: BuildConfig, share: float) -> None:
    for setting, _ in LOST:
        with pytest.raises(ValueError, match=f"share is {share}, but must be from 0 to 1"):
            replace(config, **{setting: share})
