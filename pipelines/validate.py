"""COCO annotation -> instance, or the reason why not. Boxes are clipped to the image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import fsum
from operator import mul, sub
from typing import Any

import numpy as np

from pipelines.prefetch import batched
from pipelines.rle import Ends, ends_from_counts, pixels_in, segmentation_ends
from pipelines.scaling import rle_of

FAR = 1.0  # image sides by which a polygon or keypoint may leave the image: farther is a mistake
EDGES, CROSSINGS = 2, 100  # how long outlines may be, which drawing takes memory for: all edges of an image's pixels,
# and so many times along its sides, by which a small image may have polygons that are larger
MIN_EXTENT = 1e-3  # pixels of a box in the image; what is less has no extent
LARGE = 1e9  # what is not below it is no coordinate, area or count of anything
NUMBERS = {int, float}  # not bool
FLOAT32 = 2.0**-22  # of a coordinate: two steps of float32, which boxes are stored as


class AnnotationError(ValueError):
    """An annotation that cannot be used; the message is the reject's reason."""


def min_extent(side: int) -> float:
    """Pixels that a box must have along a side of an image, so that it keeps its extent as float32 and at any scale."""
    return max(MIN_EXTENT, FLOAT32 * side)


def lies_far(points: Sequence[float], size: tuple[int, int], *, tolerance: float = 0.0) -> bool:
    """Whether one of x1, y1, x2, y2, ... is more than FAR sides of an image of (height, width) away from it, or NaN."""
    height, width = size
    near = FAR + tolerance
    return not all(
        -near * side <= value <= (1 + near) * side
        for values, side in ((points[0::2], width), (points[1::2], height))
        for value in values
    )


def to_instance(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Instance as in pipelines/schema.py, of an image of (height, width), not resized. Raises AnnotationError."""
    box = _box(annotation.get("bbox"), size)
    iscrowd = annotation.get("iscrowd")
    if iscrowd not in (None, 0, 1):
        raise AnnotationError(f"iscrowd is neither 0 nor 1: {iscrowd!r}")
    segmentation = _segmentation(annotation.get("segmentation"), size)
    return {
        "label": annotation["label"],
        "category_id": annotation["category_id"],
        "box": box,
        "area": _area(annotation.get("area"), annotation["bbox"]),
        "iscrowd": bool(iscrowd),
        "segmentation": segmentation,
        "keypoints": _keypoints(annotation.get("keypoints"), size),
    }


def _numbers(value: Any, what: str) -> list[float]:
    if isinstance(value, list) and NUMBERS.issuperset(map(type, value)):
        with suppress(OverflowError):
            numbers = [*map(float, value)]
            if all(map(LARGE.__gt__, map(abs, numbers))):  # a NaN is not below anything
                return numbers
    raise AnnotationError(f"{what} is not a list of finite numbers")


def _box(bbox: Any, size: tuple[int, int]) -> list[float]:
    numbers = _numbers(bbox, "box")
    if len(numbers) != 4:
        raise AnnotationError(f"box does not have four numbers: it has {len(numbers)}")
    x, y, width, height = numbers
    if width <= 0 or height <= 0:
        raise AnnotationError(f"box has no extent: {width:g} x {height:g}")
    rows, columns = size
    left, right = max(x, 0.0), min(x + width, float(columns))
    top, bottom = max(y, 0.0), min(y + height, float(rows))
    if left >= right or top >= bottom:
        raise AnnotationError(f"box lies outside the image: {numbers} in {columns} x {rows}")
    if right - left < min_extent(columns) or bottom - top < min_extent(rows):
        raise AnnotationError(f"box has no extent: {right - left:g} x {bottom - top:g} in the image")
    return [left, top, right, bottom]


def _area(area: Any, bbox: Sequence[float]) -> float:
    """The annotation's own area, which pycocotools sorts by; the box's where there is none."""
    if area is None:
        area = bbox[2] * bbox[3]
    (value,) = _numbers([area], "area")
    if value < 0:
        raise AnnotationError(f"area is negative: {value:g}")
    return value


def _keypoints(keypoints: Any, size: tuple[int, int]) -> list[float] | None:
    if keypoints is None or keypoints == []:
        return None
    numbers = _numbers(keypoints, "keypoints")
    if len(numbers) % 3:
        raise AnnotationError(f"keypoints are not triples: {len(numbers)} numbers")
    wrong = [v for v in numbers[2::3] if v not in (0, 1, 2)]
    if wrong:
        raise AnnotationError(f"keypoint visibility is neither 0, 1 nor 2: {wrong[0]:g}")
    labelled = [each for x, y, visible in batched(numbers, 3) if visible for each in (x, y)]
    if lies_far(labelled, size):
        raise AnnotationError("keypoint lies far outside the image")
    return numbers


def _segmentation(value: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    if value in (None, [], [[]]):  # all of them are written for an object that has a box alone
        return None
    if isinstance(value, dict):
        return {"polygons": None, "rle": rle_of(_rle_ends(value, size), size)}
    if not isinstance(value, list):
        raise AnnotationError("segmentation is neither polygons nor run lengths")
    return {"polygons": _polygons(value, size), "rle": None}


def _polygons(value: list[Any], size: tuple[int, int]) -> list[list[float]]:
    found, area, outline = [], 0.0, 0.0
    for each in value:
        numbers = _numbers(each, "polygon")
        if len(numbers) < 6 and len(numbers) % 2 == 0 and len(value) > 1:
            continue  # a point or a line beside others encloses nothing
        if len(numbers) < 6 or len(numbers) % 2:
            raise AnnotationError(f"polygon has fewer than three points or an odd count: {len(numbers)} numbers")
        if lies_far(numbers, size):
            raise AnnotationError("polygon lies far outside the image")
        polygon_area, polygon_outline = _area_and_outline(numbers[0::2], numbers[1::2])
        area += polygon_area
        outline += polygon_outline
        found.append(numbers)
    bound = EDGES * size[0] * size[1] + CROSSINGS * (size[0] + size[1])
    if outline > bound:
        raise AnnotationError(f"polygon has too long an outline: {outline:.0f} pixels, the bound is {bound}")
    if area == 0 and not _crosses_itself(found, size):
        raise AnnotationError("polygon has no area")
    return found


def _crosses_itself(polygons: list[list[float]], size: tuple[int, int]) -> bool:
    """Whether polygons without area have an inside nevertheless: a bow's two sides, which turn the one and the other
    way round, sum up to nothing. A line has none, though a pixel may be drawn of it where it leaves the image."""
    return (
        not all(map(_is_line, polygons))
        and pixels_in(segmentation_ends({"polygons": polygons, "rle": None}, *size)) > 0
    )


def _is_line(polygon: list[float]) -> bool:
    x, y = ([value - values[0] for value in values] for values in (polygon[0::2], polygon[1::2]))
    return not any(a * d - b * c for a, b, c, d in zip(x, y, [*x[1:], 0.0], [*y[1:], 0.0], strict=True))


def _area_and_outline(x: list[float], y: list[float]) -> tuple[float, float]:
    """Of a polygon with these corners, its edges as long as their longer axis. In plain Python, as all here: for the
    dozens of numbers that a polygon has, numpy takes longer."""
    before_x, before_y = [x[-1], *x[:-1]], [y[-1], *y[:-1]]
    area = abs(fsum(map(mul, x, before_y)) - fsum(map(mul, y, before_x))) / 2
    return area, sum(map(max, map(abs, map(sub, x, before_x)), map(abs, map(sub, y, before_y))))


def _rle_ends(rle: dict[str, Any], size: tuple[int, int]) -> Ends:
    if rle.get("size") != list(size):
        raise AnnotationError(f"run lengths are for another size: {rle.get('size')!r}, the image has {list(size)}")
    counts = rle.get("counts")
    if isinstance(counts, str):
        try:
            ends = ends_from_counts(counts.encode())
        except ValueError as error:
            raise AnnotationError(f"run lengths are damaged: {error}") from None
    else:
        numbers = _numbers(counts, "run lengths")
        if any(each < 0 or each != int(each) for each in numbers):
            raise AnnotationError("run lengths are damaged: not whole numbers from 0 on")
        ends = np.cumsum(np.array(numbers, np.int64))
    if len(ends) == 0 or ends[-1] != size[0] * size[1]:
        raise AnnotationError(f"run lengths do not fill the image: {ends[-1] if len(ends) else 0} pixels")
    if not np.diff(ends)[::2].any():
        raise AnnotationError("mask is empty")
    return ends
