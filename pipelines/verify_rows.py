"""What is wrong with one row of a shard, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mrcnn.structures import Category
from pipelines.rle import segmentation_ends
from pipelines.transforms import decode_stored
from pipelines.validate import lies_far

EDGE = 1e-3  # pixels: coordinates are float32


def row_faults(row: dict[str, Any], image: memoryview, categories: Sequence[Category]) -> Iterator[str]:
    """Of a row as Python values without its `image`, and that image's bytes: the picture, then each instance."""
    yield from _image_faults(row, image)
    yield from _tile_faults(row)
    if row["instances"] is None:
        yield "instances are null"
    elif (row["height"] or 0) > 0 and (row["width"] or 0) > 0:
        size = row["height"], row["width"]
        for i, instance in enumerate(row["instances"]):
            for fault in instance_faults(instance, size, categories):
                yield f"instance {i}: {fault}"


def _image_faults(row: dict[str, Any], image: memoryview) -> Iterator[str]:
    missing = [name for name in ("image_id", "uri", "encoding") if row[name] is None]
    sides = {name: row[name] for name in ("height", "width", "source_height", "source_width")}
    if missing or any(side is None or side <= 0 for side in sides.values()):
        yield f"{', '.join(missing) or 'a side'} is missing or not positive: {sides}"
        return
    height, width = row["height"], row["width"]
    try:
        decode_stored(image, encoding=row["encoding"], height=height, width=width)
    except ValueError as error:
        yield f"its {row['encoding']} image of {width} x {height} does not decode: {error}"


def _tile_faults(row: dict[str, Any]) -> Iterator[str]:
    tile, size = row["tile"], {side: row[f"source_{side}"] for side in ("height", "width")}
    if tile is None or None in size.values():
        return
    if None in tile.values():
        yield f"its tile is not all there: {tile}"
    elif any(not 0 <= tile[at] <= tile[side] - size[side] for at, side in (("y", "height"), ("x", "width"))):
        yield f"its tile of {size['width']} x {size['height']} does not lie in its image: {tile}"


def instance_faults(
    instance: dict[str, Any] | None, size: tuple[int, int], categories: Sequence[Category]
) -> Iterator[str]:
    """Of an instance as a Python value, in an image of (height, width)."""
    if instance is None:
        yield "it is null"
        return
    label = instance["label"]
    if label is None or not 1 <= label <= len(categories):
        yield f"label {label} is none of 1 to {len(categories)}"
        return
    category = categories[label - 1]
    if instance["category_id"] != category.id:
        yield f"category id {instance['category_id']}, but label {label} is {category.name} ({category.id})"
    if instance["iscrowd"] is None or not _finite(instance["area"]) or instance["area"] < 0:
        yield f"area {instance['area']} or iscrowd {instance['iscrowd']} is none"
    yield from _box_faults(instance["box"], size)
    yield from _mask_faults(instance["segmentation"], size)
    yield from _keypoint_faults(instance["keypoints"], category)


def _finite(values: Any) -> bool:
    return values is not None and bool(np.isfinite(np.asarray(values, np.float64)).all())


def _box_faults(box: Any, size: tuple[int, int]) -> Iterator[str]:
    if box is None or None in box or not _finite(box):
        yield f"box is not four numbers: {box}"
        return
    left, top, right, bottom = box
    if not (-EDGE <= left < right <= size[1] + EDGE and -EDGE <= top < bottom <= size[0] + EDGE):
        yield f"box {box} does not lie in the image of {size[1]} x {size[0]}"


def _mask_faults(segmentation: Any, size: tuple[int, int]) -> Iterator[str]:
    if segmentation is None:
        return
    polygons, rle = segmentation["polygons"], segmentation["rle"]
    if polygons is None and rle is None:
        yield "segmentation is neither polygons nor run lengths"
        return
    if rle is not None and rle["size"] != list(size):
        yield f"run lengths are for {rle['size']}, the image has {list(size)}"
        return
    if rle is not None and rle["counts"] is None:
        yield "run lengths have no counts"
        return
    if polygons is not None and not all(_is_polygon(each, size) for each in polygons):
        yield "a polygon has fewer than three points, or lies far outside the image"
        return
    try:
        segmentation_ends(segmentation, *size)
    except ValueError as error:
        yield f"mask is damaged: {error}"


def _is_polygon(numbers: Any, size: tuple[int, int]) -> bool:
    if numbers is None or len(numbers) < 6 or len(numbers) % 2 or None in numbers:
        return False
    return not lies_far(numbers, size, tolerance=EDGE)


def _keypoint_faults(keypoints: Any, category: Category) -> Iterator[str]:
    if keypoints is None:
        return
    expected = 3 * len(category.keypoints) or len(keypoints)
    if len(keypoints) % 3 or len(keypoints) != expected or not _finite(keypoints):
        yield f"keypoints are not those of {category.name}: {len(keypoints)} numbers"
    elif not set(keypoints[2::3]) <= {0.0, 1.0, 2.0}:
        yield "a keypoint's visibility is neither 0, 1 nor 2"
