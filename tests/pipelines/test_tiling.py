"""Tiles: every pixel, the right part of every object, sums that come out even."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline import build_here, run_inline
from made_shards import row
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from mrcnn.structures import Category
from pipelines.build import build
from pipelines.config import BuildConfig
from pipelines.dataset import ShardDataset
from pipelines.manifest import Totals
from pipelines.rle import Window, bitmap_from_ends, ends_from_bitmap, segmentation_ends
from pipelines.rows import tile_id
from pipelines.shards import ShardedRows
from pipelines.storage import open_store
from pipelines.tiling import Part, Tiling, part_of, parts, windows
from pipelines.validate import to_instance
from pipelines.verify import verify
from pipelines.verify_rows import row_faults

SIZE = (200, 330)  # height, width
TILING = Tiling(side=128, overlap=32, min_share=0.25)


def annotation(id_: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    """With the box and area of its mask."""
    mask = drawn(segmentation)
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
    values = {"id": id_, "image_id": 7, "category_id": 3, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}
    return values | {"segmentation": segmentation} | more


def drawn(segmentation: Any) -> NDArray[np.uint8]:
    if isinstance(segmentation, dict):
        return coco_mask.decode(segmentation)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *SIZE)))


def rectangle(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def disc(y: int, x: int, radius: int) -> dict[str, Any]:
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    bitmap = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


SMALL, WIDE, ROUND, TWO, CROSS = range(5)
ANNOTATIONS = [
    annotation(10, [rectangle(100, 20, 120, 40)], keypoints=[110, 30, 2, 101, 21, 1]),  # in the overlap of two tiles
    annotation(11, [rectangle(5, 60, 325, 90)], keypoints=[50, 70, 2, 300, 70, 1]),  # crosses all columns of tiles
    annotation(12, disc(100, 165, 30), iscrowd=1),
    annotation(13, [rectangle(2, 2, 22, 22), rectangle(300, 170, 320, 190)]),  # two pieces, far apart
    annotation(14, [[125, 20, 130, 80, 190, 83, 130, 86, 125, 160, 120, 86, 60, 83, 120, 80]]),  # concave
]
INSTANCES = [to_instance({**each, "label": 1}, SIZE) for each in ANNOTATIONS]


@pytest.fixture(scope="module")
def cut() -> list[Part]:
    return list(parts(SIZE, INSTANCES, TILING))


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    side=st.integers(20, 300),
    overlap=st.floats(0, 0.99),
)
def test_tiles_cover_the_image_and_overlap(size: tuple[int, int], side: int, overlap: float) -> None:
    tiling = Tiling(side=side, overlap=int(overlap * side))
    found = windows(size, tiling)
    assert len(set(found)) == len(found)
    assert {(each.height, each.width) for each in found} == {(min(size[0], side), min(size[1], side))}
    for axis, length in (("y", size[0]), ("x", size[1])):
        starts = sorted({getattr(each, axis) for each in found})
        assert starts[0] == 0
        assert starts[-1] + min(length, side) == length
        assert all(after - before <= side - tiling.overlap for before, after in pairwise(starts))
    assert len(found) == len({each.y for each in found}) * len({each.x for each in found})


def test_an_image_that_fits_is_not_cut() -> None:
    (part,) = parts((128, 90), INSTANCES, TILING)
    assert part == Part(Window(0, 0, 128, 90), INSTANCES, list(range(5)))
    (part,) = parts(SIZE, INSTANCES, Tiling())
    assert part.window == Window(0, 0, *SIZE)


def test_masks_boxes_and_areas_are_those_of_the_cut_bitmap(cut: list[Part]) -> None:
    for part in cut:
        for number, instance in zip(part.numbers, part.instances, strict=True):
            window, whole = part.window, drawn(ANNOTATIONS[number]["segmentation"])
            expected = whole[window.y : window.y + window.height, window.x : window.x + window.width]
            size = window.height, window.width
            ours = bitmap_from_ends(segmentation_ends(instance["segmentation"], *size), *size)
            np.testing.assert_array_equal(ours, expected)
            rows, columns = np.nonzero(expected)
            assert instance["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert instance["area"] == pytest.approx(expected.sum())
            assert instance["iscrowd"] == (number == ROUND)


def test_what_is_whole_keeps_its_polygons_and_what_is_cut_has_run_lengths(cut: list[Part]) -> None:
    kinds: dict[int, set[str]] = {}
    for part in cut:
        for number, instance in zip(part.numbers, part.instances, strict=True):
            kind = "rle" if instance["segmentation"]["polygons"] is None else "polygons"
            kinds.setdefault(number, set()).add(kind)
    assert kinds == {SMALL: {"polygons"}, WIDE: {"rle"}, ROUND: {"rle"}, TWO: {"rle"}, CROSS: {"rle"}}


def test_objects_are_where_enough_of_them_shows(cut: list[Part]) -> None:
    for part in cut:
        window, dropped = part.window, 0
        for number, each in enumerate(ANNOTATIONS):
            whole = drawn(each["segmentation"])
            shown = whole[window.y : window.y + window.height, window.x : window.x + window.width]
            share = shown.sum() / min(whole.sum(), shown.size)
            assert (number in part.numbers) == (share >= TILING.min_share)
            dropped += 0 < share < TILING.min_share
        assert part.dropped == dropped
    assert sum(part.dropped for part in cut) > 0


@pytest.mark.parametrize("masked", [True, False])
def test_what_fills_tiles_is_in_them_however_large_it_is(masked: bool) -> None:
    """It would be their background, as no tile shows a quarter of it."""
    size = (1000, 1000)
    box = [100, 100, 900, 900]
    given = {"label": 1, "category_id": 3, "bbox": [100, 100, 800, 800], "segmentation": [rectangle(*box)]}
    large = to_instance(given if masked else {**given, "segmentation": None}, size)
    for part in parts(size, [large], Tiling(side=100, overlap=0, min_share=0.25)):
        inside = 100 <= part.window.x < 900 and 100 <= part.window.y < 900
        assert part.numbers == ([0] if inside else [])
        if inside:
            assert part.instances[0]["box"] == [0, 0, 100, 100]
            assert part.instances[0]["area"] == pytest.approx(100 * 100)
    first, *_ = parts(size, [large], Tiling(side=140, overlap=0, min_share=0.25))
    assert (first.numbers, first.dropped) == ([], 1)  # of its pixels 40 x 40 are the object's


def test_a_keypoint_on_an_edge_is_in_one_tile() -> None:
    """Pixel numbers, so that half a pixel before pixel 100 is where it begins."""
    (_, left), (_, right) = (
        (part.window, part.instances[0]["keypoints"])
        for part in parts((50, 200), [edged()], Tiling(side=100, overlap=0))
    )
    assert left == [0, 0, 0]
    assert right == [-0.5, 10, 2]


def edged() -> dict[str, Any]:
    """An object of two tiles of 100 pixels with a keypoint between them."""
    given = {"label": 1, "category_id": 3, "bbox": [50, 0, 100, 50], "keypoints": [99.5, 10, 2]}
    return to_instance(given, (50, 200))


def test_keypoints_outside_are_no_longer_labelled(cut: list[Part]) -> None:
    seen = []
    for part in cut:
        if WIDE in part.numbers:
            points = np.reshape(part.instances[part.numbers.index(WIDE)]["keypoints"], (2, 3))
            corner = [part.window.x, part.window.y, 0]
            for point, original in zip(points, ([50, 70, 2], [300, 70, 1]), strict=True):
                inside = (
                    part.window.x <= original[0] < part.window.x + 128 and part.window.y <= 70 < part.window.y + 128
                )
                assert point.tolist() == (np.subtract(original, corner).tolist() if inside else [0, 0, 0])
                seen.append(inside)
    assert set(seen) == {True, False}


def test_run_lengths_beside_polygons_are_moved_with_them() -> None:
    """As those of a stored image, which training cuts windows of: they are the mask, whatever the polygons are."""
    runs = {"size": list(SIZE), "counts": disc(30, 110, 9)["counts"]}
    both = {**INSTANCES[SMALL], "segmentation": {**INSTANCES[SMALL]["segmentation"], "rle": runs}}
    part = part_of(Window(10, 90, 60, 50), [both], [segmentation_ends(both["segmentation"], *SIZE)], height=SIZE[0])
    (moved,) = part.instances
    assert moved["segmentation"]["polygons"] == [rectangle(10, 10, 30, 30)]
    assert (coco_mask.decode(moved["segmentation"]["rle"]) == coco_mask.decode(runs)[10:70, 90:140]).all()


def test_an_object_without_mask_is_cut_by_its_box() -> None:
    bare = to_instance({**ANNOTATIONS[WIDE], "segmentation": None, "label": 1}, SIZE)
    first, *others = parts(SIZE, [bare], TILING)
    assert first.instances[0]["box"] == [5, 60, 128, 90]
    assert first.instances[0]["area"] == pytest.approx(bare["area"] * 123 / 320)
    assert all(part.instances[0]["segmentation"] is None for part in [first, *others] if part.instances)


@pytest.mark.parametrize("segmentation", [None, [[101, 21, 101.25, 21, 101, 21.25]]])
def test_what_is_whole_without_a_pixel_of_mask_is_left_as_it_is(segmentation: Any) -> None:
    thin = to_instance({**ANNOTATIONS[SMALL], "label": 1, "segmentation": segmentation}, SIZE)
    whole = {**thin, "box": [100.3, 20.1, 120.7, 40.2]}  # of numbers that are not exact once they are moved
    part = part_of(Window(10, 90, 60, 50), [whole], [segmentation_ends(thin["segmentation"], *SIZE)], height=SIZE[0])
    (moved,) = part.instances
    if segmentation:
        assert moved["segmentation"]["polygons"] == [[11, 11, 11.25, 11, 11, 11.25]]
    assert (moved["segmentation"] is None) == (segmentation is None)
    assert moved["area"] == whole["area"]


def test_polygons_that_leave_a_tile_by_far_become_run_lengths() -> None:
    """Which they may, of a large image, whose sides bound them."""
    size = (1000, 1000)
    given = {**ANNOTATIONS[SMALL], "label": 1, "segmentation": [[-500, -500, 100, 0, 100, 100, 0, 100]]}
    large = to_instance({**given, "bbox": [0, 0, 100, 100], "keypoints": None}, size)
    mask = segmentation_ends(large["segmentation"], *size)
    first, *others = parts(size, [large], TILING)
    (moved,) = first.instances
    assert moved["segmentation"]["polygons"] is None
    expected = bitmap_from_ends(mask, *size)[:128, :128]
    np.testing.assert_array_equal(coco_mask.decode(moved["segmentation"]["rle"]), expected)
    stored = row(1, (128, 128), [moved])
    assert not list(row_faults(stored, memoryview(stored["image"]), [Category(3, "thing")]))
    assert not any(part.instances for part in others[1:])


def test_a_sliver_of_a_box_is_not_shown() -> None:
    """It would be a box without extent once it is float32."""
    bare = {**INSTANCES[SMALL], "segmentation": None, "box": [128 - 1e-7, 20, 150, 40]}
    first, second, *_ = parts(SIZE, [bare], Tiling(side=128, overlap=0))
    assert not first.instances
    assert len(second.instances) == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image above, a small one, and a wide one of whose only object no tile shows a quarter."""
    folder = tmp_path_factory.mktemp("source")
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(noise).save(folder / "large.png")
    Image.fromarray(noise[:90, :120]).save(folder / "small.png")
    Image.fromarray(np.tile(noise[:100], (1, 4, 1))).save(folder / "wide.png")
    small = {"id": 20, "image_id": 8, "category_id": 3, "bbox": [1, 1, 50, 50], "area": 2500, "iscrowd": 0}
    wide = {**small, "id": 30, "image_id": 9, "bbox": [0, 10, 1320, 20], "area": 26400}
    images = [(7, "large", *SIZE), (8, "small", 90, 120), (9, "wide", 100, 1320)]
    content = {
        "images": [{"id": id_, "file_name": f"{n}.png", "height": h, "width": w} for id_, n, h, w in images],
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [*ANNOTATIONS, small, wide],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return folder


def config(source: Path, out: Path, **more: Any) -> BuildConfig:
    common: dict[str, Any] = {"images": str(source), "annotations": str(source / "coco.json"), "out": str(out)}
    return BuildConfig(**common, shorter_side=0, tile=128, tile_overlap=32, **more)


def test_rows_say_what_they_show(source: Path, tmp_path: Path) -> None:
    build_here(config(source, tmp_path))
    store, dataset = open_store(str(tmp_path)), ShardDataset(str(tmp_path))
    rows = ShardedRows(store, dataset.manifest.shards)
    originals = {7: "large", 8: "small", 9: "wide"}
    seen = set()
    for i in range(len(dataset)):
        row, tile = dataset.read(i), rows.read(i)["tile"].as_py()
        assert row.tile == tile
        if tile is None:
            assert (row.image_id, row.size, row.source_size) == (8, (90, 120), (90, 120))
            continue
        original = np.asarray(Image.open(source / f"{originals[tile['image_id']]}.png"))
        assert (tile["height"], tile["width"]) == original.shape[:2]
        y, x, (height, width) = tile["y"], tile["x"], row.source_size
        np.testing.assert_array_equal(row.image, original[y : y + height, x : x + width])
        assert row.image_id == tile_id(tile["image_id"], y, x)
        seen.add((row.image_id, y, x))
    assert len(seen) == len(dataset) - 1 == 2 * 4 + 1 * 14


def test_sums_come_out_even(source: Path, tmp_path: Path) -> None:
    summary = build_here(config(source, tmp_path, max_rejected_annotation_share=1.0))
    totals = summary.totals
    found = list(parts(SIZE, INSTANCES, TILING))
    shown = [number for part in found for number in part.numbers]
    assert totals == Totals(
        images=3,
        rows=8 + 1 + 14,
        rejects=0,
        annotations=7,
        instances=len(shown) + 1,
        rejected_annotations=1,
        further_tiles=7 + 13,
        further_parts=len(shown) - len(set(shown)),
        dropped_parts=sum(part.dropped for part in found) + 14,
    )
    assert summary.rejected_annotations_by_reason == {"validate: no tile shows enough of it": 1}
    assert "cut into 23 tiles" in str(summary)


def test_a_tiled_build_verifies(source: Path, ray_cluster: None, tmp_path: Path) -> None:
    build_here(config(source, tmp_path))
    report = verify(str(tmp_path))
    assert report.problems == ()
    assert report.extra == ()


def test_tiles_of_an_image_0_are_its_own(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((source / "coco.json").read_text())
    for image, id_ in zip(content["images"], (0, -1, 2), strict=True):
        image["id"] = id_
    (tmp_path / "coco.json").write_text(json.dumps({**content, "annotations": []}))
    build_here(replace(config(source, tmp_path / "out"), annotations=str(tmp_path / "coco.json")))
    monkeypatch.setattr("pipelines.verify.run_tasks", run_inline)
    assert verify(str(tmp_path / "out")).problems == ()


def test_tiles_are_resized_and_the_masks_with_them(source: Path, tmp_path: Path) -> None:
    """Each tile becomes an image like any other, here of half and of one and a half times its size."""
    build_here(replace(config(source, tmp_path), shorter_side=64, longer_side=96, more_sides=(96,)))
    for side in (64, 96):
        dataset = ShardDataset(str(tmp_path / str(side)))
        assert len(dataset) == 23
        for i in range(8):
            row = dataset.read(i)
            assert row.size == (side, side)
            assert row.source_size == (128, 128)
            for instance in row.instances:
                assert segmentation_ends(instance["segmentation"], side, side)[-1] == side * side


def test_ids_of_tiles_never_change() -> None:
    """They are in users' data sets: 63 bits, another for each image and corner."""
    ids = [tile_id(image_id, y, x) for image_id in (1, 2, -5) for y in (0, 96) for x in (0, 96)]
    assert len(set(ids)) == 12
    assert all(0 <= each < 2**63 for each in ids)
    assert tile_id(7, 0, 96) == 9130912784452514132


def test_cropping_nothing_is_nothing() -> None:
    empty = ends_from_bitmap(np.zeros(SIZE, np.uint8))
    thin = to_instance({**ANNOTATIONS[SMALL], "label": 1, "segmentation": [[1, 1, 1.2, 1, 1, 1.2]]}, SIZE)
    assert not bitmap_from_ends(segmentation_ends(thin["segmentation"], *SIZE), *SIZE).any(), "no pixel is covered"
    assert len(empty) == 1
    shown = [part for part in parts(SIZE, [thin], TILING) if part.instances]
    assert shown, "it is cut by its box"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tile": 128, "tile_overlap": 128}, "tile is 128 and tile overlap 128"),
        ({"tile": -1}, "tile is -1"),
        ({"tile": 128, "tile_overlap": -1}, "tile overlap -1"),
        ({"tile": 0, "tile_overlap": -5}, "tile overlap -5"),
        ({"tile": 31, "tile_overlap": 0}, "give a side of at least 32 pixels"),
        ({"tile_min_share": 1.5}, "tile min share is 1.5"),
        ({"shorter_side": -1}, "shorter side is -1"),
        ({"shorter_side": 40_000, "longer_side": 40_000}, "sides are 40000 x 40000: .* at most 715827882"),
        ({"shorter_side": 20_000, "longer_side": 35_000, "more_sides": (30_000,)}, "sides are 30000 x 52500: "),
        ({"more_sides": (800,)}, "more sides are 800"),
        ({"more_sides": (400, 400)}, "more sides are 400, 400"),
        ({"more_sides": (2000,)}, "more sides are 2000"),
        ({"max_pixels": 0}, "max pixels is 0"),
        ({"max_pixels": 2**31}, "max pixels is 2147483648"),
    ],
)
def test_impossible_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildConfig(images="i", annotations="a", out="o", **wrong)


def test_the_bound_of_pixels_rejects(source: Path, tmp_path: Path) -> None:
    summary = build_here(config(source, tmp_path, max_pixels=SIZE[0] * SIZE[1] - 1, max_reject_share=1.0))
    assert summary.rejects_by_reason == {"decode: decompression bomb": 2}


def test_tiles_through_ray(source: Path, ray_cluster: None, tmp_path: Path) -> None:
    for name, make in (("ray", build), ("here", build_here)):
        make(config(source, tmp_path / name, rows_per_shard=1))
    names = sorted(path.name for path in (tmp_path / "ray").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "here").iterdir())
    for name in names:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
