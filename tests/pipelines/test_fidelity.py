"""On all 100 real images: what is in the shards is what Pillow and pycocotools make of the originals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline import build_here
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mrcnn.preprocess import Resize, resize_image, resized_size
from pipelines.augment import resize_row
from pipelines.build import prepare
from pipelines.config import BuildConfig
from pipelines.dataset import ShardDataset
from pipelines.rle import bitmap_from_ends, segmentation_ends
from pipelines.scaling import Scaling, scale_instances
from pipelines.shard_task import make_shard
from pipelines.tiling import Tiling, parts
from pipelines.toy import ToySummary
from pipelines.validate import to_instance

PARTS = ("train2017", "val2017")
SIDES = (800, 250, 0)


def resized(image: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


def config(coco100: Path, part: str, out: Path, **settings: Any) -> BuildConfig:
    annotations = str(coco100 / f"annotations/instances_{part}.json")
    return BuildConfig(images=str(coco100 / part), annotations=annotations, out=str(out), **settings)


@pytest.fixture(scope="module")
def truth(coco100: Path) -> dict[str, COCO]:
    return {part: COCO(str(coco100 / f"annotations/instances_{part}.json")) for part in PARTS}


@pytest.fixture(scope="module")
def built(coco100: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardDataset]:
    """At 800, at 250 and at their own pixels, in one pass."""
    out = tmp_path_factory.mktemp("coco100")
    for part in PARTS:
        build_here(config(coco100, part, out / part, more_sides=(250, 0)))
    return {
        f"{part}/{side}": ShardDataset(str(out / part / str(side or "original"))) for part in PARTS for side in SIDES
    }


@pytest.mark.coco100
@pytest.mark.parametrize(("part", "side"), [(part, side) for part in PARTS for side in SIDES])
def test_pixels_are_those_of_pillow(built: dict[str, ShardDataset], part: str, side: int) -> None:
    dataset = built[f"{part}/{side}"]
    assert len(dataset) == 50
    for i in range(len(dataset)):
        row = dataset.read(i)
        original = np.asarray(Image.open(row.uri).convert("RGB"))
        difference = abs(row.image.astype(int) - resized(original, row.size))
        assert difference.mean() <= 1, row.uri
        assert difference.max() <= 3, row.uri


@pytest.mark.coco100
@pytest.mark.parametrize("resize", ["antialias", "pillow"])
@pytest.mark.parametrize("shorter", [97, 400, 427, 640, 1100])
def test_resizing_up_and_down_agrees_with_pillow(coco100: Path, shorter: int, resize: Resize) -> None:
    for path in sorted(coco100.glob("*2017/*.jpg"))[::5]:
        image = np.asarray(Image.open(path).convert("RGB"))
        size = resized_size(*image.shape[:2], shorter_side=shorter, longer_side=2 * shorter)
        difference = abs(resize_image(image, *size, resize).astype(int) - resized(image, size))
        assert difference.mean() <= (1 if resize == "antialias" else 0), path
        assert difference.max() <= (3 if resize == "antialias" else 0), path


@pytest.mark.coco100
@pytest.mark.parametrize(("part", "side"), [(part, side) for part in PARTS for side in SIDES])
def test_stored_masks_are_the_resized_ones(
    built: dict[str, ShardDataset], truth: dict[str, COCO], part: str, side: int
) -> None:
    """IoU with the mask that pycocotools draws and Pillow resizes. Every object, those under 16 pixels included."""
    dataset, coco = built[f"{part}/{side}"], truth[part]
    objects = 0
    for i in range(len(dataset)):
        row = dataset.read(i)
        annotations = coco.imgToAnns[row.image_id]
        assert len(annotations) == len(row.instances)
        for annotation, instance in zip(annotations, row.instances, strict=True):
            direct = resized(coco.annToMask(annotation) * np.uint8(255), row.size) >= 128
            stored = bitmap_from_ends(segmentation_ends(instance["segmentation"], *row.size), *row.size)
            assert iou(stored.astype(bool), direct) >= (0.99 if side else 1), (annotation["id"], annotation["area"])
            objects += 1
    assert objects == {"train2017": 470, "val2017": 382}[part]


@pytest.mark.coco100
def test_masks_of_tiles_are_those_of_the_image(truth: dict[str, COCO]) -> None:
    """Of objects that lie in a tile as a whole too, whose moved polygons may be drawn otherwise."""
    seen = 0
    for coco in truth.values():
        for image_id, image in coco.imgs.items():
            size, annotations = (image["height"], image["width"]), coco.imgToAnns[image_id]
            masks = [coco.annToMask(each) for each in annotations]
            instances = [to_instance({**each, "label": 1}, size) for each in annotations]
            for part in parts(size, instances, Tiling(side=200, overlap=64, min_share=0.25)):
                w, after = part.window, (round(part.window.height * 0.8), round(part.window.width * 0.8))
                scaled = scale_instances(part.instances, Scaling((w.height, w.width), after))
                for number, instance, smaller in zip(part.numbers, part.instances, scaled, strict=True):
                    shown = masks[number][w.y : w.y + w.height, w.x : w.x + w.width]
                    ours = bitmap_from_ends(segmentation_ends(instance["segmentation"], *shown.shape), *shown.shape)
                    np.testing.assert_array_equal(ours, shown)
                    direct = resized(shown * np.uint8(255), after) >= 128
                    stored = bitmap_from_ends(segmentation_ends(smaller["segmentation"], *after), *after)
                    assert iou(stored.astype(bool), direct) >= 0.99 or direct.sum() < 16
                    seen += 1
    assert seen > 2000


@pytest.mark.coco100
@pytest.mark.parametrize("factor", [0.37, 0.5, 1.0, 1.3, 2.9])
def test_masks_at_any_scale(truth: dict[str, COCO], factor: float) -> None:
    for coco in truth.values():
        for image_id, image in list(coco.imgs.items())[::5]:
            before = image["height"], image["width"]
            after = max(1, round(before[0] * factor)), max(1, round(before[1] * factor))
            annotations = coco.imgToAnns[image_id]
            instances = [to_instance({**each, "label": 1}, before) for each in annotations]
            scaled = scale_instances(instances, Scaling(before, after))
            for annotation, instance in zip(annotations, scaled, strict=True):
                direct = resized(coco.annToMask(annotation) * np.uint8(255), after) >= 128
                ours = bitmap_from_ends(segmentation_ends(instance["segmentation"], *after), *after)
                assert iou(ours.astype(bool), direct) >= 0.99, annotation["id"]


@pytest.mark.coco100
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25])
def test_training_gets_the_stored_masks_resized(built: dict[str, ShardDataset], factor: float) -> None:
    """Where it wants another size than the shards have."""
    dataset = built["val2017/800"]
    for row in (dataset.read(i) for i in range(0, len(dataset), 5)):
        size = round(row.size[0] * factor), round(row.size[1] * factor)
        for before, after in zip(row.instances, resize_row(row, size, "antialias").instances, strict=True):
            stored, ours = (
                bitmap_from_ends(segmentation_ends(each["segmentation"], *of), *of)
                for each, of in ((before, row.size), (after, size))
            )
            assert iou(ours.astype(bool), resized(stored * np.uint8(255), size) >= 128) >= 0.99


@pytest.mark.coco100
def test_boxes_and_polygons_move_with_the_masks(built: dict[str, ShardDataset], truth: dict[str, COCO]) -> None:
    """A box is the annotation's, scaled, and holds its mask; the polygons cover what the mask does."""
    overlaps = []
    for i in range(50):
        row, coco = built["val2017/800"].read(i), truth["val2017"]
        y, x = row.size[0] / row.source_size[0], row.size[1] / row.source_size[1]
        for annotation, instance in zip(coco.imgToAnns[row.image_id], row.instances, strict=True):
            left, top, width, height = annotation["bbox"]
            expected = [left * x, top * y, (left + width) * x, (top + height) * y]
            np.testing.assert_allclose(instance["box"], expected, rtol=1e-6, atol=1e-3)
            assert instance["area"] == pytest.approx(annotation["area"] * x * y, rel=1e-6)
            stored = bitmap_from_ends(segmentation_ends(instance["segmentation"], *row.size), *row.size).astype(bool)
            rows, columns = np.nonzero(stored)
            # COCO's boxes and masks are rounded on their own
            assert columns.min() >= expected[0] - 2 * x
            assert rows.min() >= expected[1] - 2 * y
            assert columns.max() + 1 <= expected[2] + 2 * x
            assert rows.max() + 1 <= expected[3] + 2 * y
            if not annotation["iscrowd"]:
                drawn = segmentation_ends({**instance["segmentation"], "rle": None}, *row.size)
                overlaps.append(iou(bitmap_from_ends(drawn, *row.size).astype(bool), stored))
    # drawn after resizing, polygons miss up to a pixel along the outline: that is why there are run lengths beside
    assert np.median(overlaps) > 0.95
    assert min(overlaps) < 0.99


def test_keypoints_stay_at_their_place() -> None:
    """The centre of a pixel stays the centre of what it becomes; an unlabelled point stays 0, 0, 0."""
    instance = to_instance(
        {"label": 1, "category_id": 1, "bbox": [0, 0, 30, 20], "keypoints": [10, 4, 2, 0, 0, 0, 29, 19, 1]}, (20, 30)
    )
    (double,) = scale_instances([instance], Scaling((20, 30), (40, 60)))
    assert double["keypoints"] == [20.5, 8.5, 2, 0, 0, 0, 58.5, 38.5, 1]
    (half,) = scale_instances([double], Scaling((40, 60), (20, 30)))
    assert half["keypoints"] == instance["keypoints"]


def test_each_side_of_one_pass_is_the_build_of_that_side(toy_data: ToySummary, tmp_path: Path) -> None:
    """Byte for byte, and so is the original size."""
    common: dict[str, Any] = {"images": toy_data.images_uri, "annotations": toy_data.annotations_uri}
    both = BuildConfig(**common, out=str(tmp_path / "both"), shorter_side=96, longer_side=160, more_sides=(48, 0))
    summary = build_here(both)
    assert [each.out for each in (summary, *summary.more)] == [
        str(tmp_path / "both" / x) for x in ("96", "48", "original")
    ]
    for folder, shorter, longer in (("96", 96, 160), ("48", 48, 80), ("original", 0, 160)):
        build_here(BuildConfig(**common, out=str(tmp_path / folder), shorter_side=shorter, longer_side=longer))
        alone, together = (files(root / folder) for root in (tmp_path, tmp_path / "both"))
        assert alone == together
        assert {"manifest.json", "rejects.parquet", "shard-00000.arrow"} <= alone.keys()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_only_the_missing_side_is_made_again(toy_data: ToySummary, tmp_path: Path) -> None:
    both = BuildConfig(
        images=toy_data.images_uri, annotations=toy_data.annotations_uri, out=str(tmp_path), rows_per_shard=4,
        shorter_side=96, longer_side=160, more_sides=(48,),
    )  # fmt: skip
    first = build_here(both)
    kept = tmp_path / "96/shard-00001.arrow"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "48/shard-00002.arrow").unlink()
    again = build_here(both)
    assert (again.digest, again.more[0].digest) == (first.digest, first.more[0].digest)
    assert (again.shards_made, again.more[0].shards_made) == (0, 1)
    assert kept.stat().st_mtime_ns == stamp


def test_original_size_keeps_every_pixel_and_number(toy_data: ToySummary, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    images, annotations = toy_data.images_uri, toy_data.annotations_uri
    build_here(BuildConfig(images=images, annotations=annotations, out=out, shorter_side=0, longer_side=10))
    dataset, coco = ShardDataset(out), COCO(annotations)
    for i in range(len(dataset)):
        row = dataset.read(i)
        np.testing.assert_array_equal(row.image, np.asarray(Image.open(row.uri).convert("RGB")))
        for annotation, instance in zip(coco.imgToAnns[row.image_id], row.instances, strict=True):
            mask = bitmap_from_ends(segmentation_ends(instance["segmentation"], *row.size), *row.size)
            np.testing.assert_array_equal(mask, coco.annToMask(annotation))


def tasks_of(config: BuildConfig) -> Iterator[tuple[dict[str, Any], Any]]:
    prepared = prepare(config)
    for name, records in prepared.shards.items():
        content = json.dumps([record.to_dict() for record in records])
        yield {"name": name, "records": content, "scales": "[0]", "stated": "[null]"}, prepared.settings


def test_no_image_passes_through_ray(toy_data: ToySummary, tmp_path: Path) -> None:
    """What a task is given and what it returns, pickled, is small beside the shard that it writes."""
    images, annotations = toy_data.images_uri, toy_data.annotations_uri
    for task, settings in tasks_of(BuildConfig(images=images, annotations=annotations, out=str(tmp_path))):
        result = make_shard(task, settings)
        written = (tmp_path / result["name"]).stat().st_size
        assert len(pickle.dumps((task, settings, result))) < written / 100
        assert not pickle.dumps(result).count(b"numpy")


OTHERS = """
import json, sys
import duckdb, numpy as np, pyarrow as pa
with pa.memory_map(sys.argv[1]) as file:
    shard = pa.ipc.open_file(file).read_all()
first = shard.slice(0, 1).to_pylist()[0]
pixels = np.frombuffer(first["image"], np.uint8).reshape(first["height"], first["width"], 3)
query = "select image_id, height, width, instances[1].box[3] as right, len(instances) as n from shard order by image_id"
assert not [name for name in sys.modules if name.split(".")[0] in ("mrcnn", "pipelines", "jobs")]
print(json.dumps({
    "sum": int(pixels.sum()), "box": first["instances"][0]["box"], "counts": first["instances"][0]["segmentation"],
    "rows": duckdb.sql(query).fetchall(),
}))
"""


def test_others_read_shards_without_us(toy_data: ToySummary, tmp_path: Path) -> None:
    """Plain pyarrow and DuckDB, in a process that cannot import this project."""
    out = str(tmp_path / "out")
    images, annotations = toy_data.images_uri, toy_data.annotations_uri
    build_here(BuildConfig(images=images, annotations=annotations, out=out, shorter_side=64, longer_side=100))
    command = [sys.executable, "-I", "-W", "error", "-c", OTHERS, f"{out}/shard-00000.arrow"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    seen, dataset = json.loads(done.stdout), ShardDataset(out)
    first = dataset.read(0)
    assert seen["sum"] == int(first.image.sum())
    assert seen["box"] == first.instances[0]["box"]
    decoded = coco_mask.decode(seen["counts"]["rle"])
    mine = segmentation_ends(first.instances[0]["segmentation"], *first.size)
    np.testing.assert_array_equal(decoded, bitmap_from_ends(mine, *first.size))
    rows = [dataset.read(i) for i in range(len(dataset))]
    expected = [[r.image_id, *r.size, r.instances[0]["box"][2], len(r.instances)] for r in rows]
    assert seen["rows"] == sorted(expected)


def test_rows_of_one_shard_are_the_same_whoever_makes_them(toy_data: ToySummary, tmp_path: Path) -> None:
    images, annotations = toy_data.images_uri, toy_data.annotations_uri
    one = BuildConfig(images=images, annotations=annotations, out=str(tmp_path / "one"), rows_per_shard=6)
    build_here(one)
    build_here(replace(one, out=str(tmp_path / "two")))
    assert files(tmp_path / "one") == files(tmp_path / "two")
