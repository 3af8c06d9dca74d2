"""Very large images cut into overlapping tiles, and their objects with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.rle import Ends, Window, box_from_ends, crop_ends, pixels_in, segmentations_ends
from pipelines.scaling import rle_of
from pipelines.validate import lies_far, min_extent

Instance = dict[str, Any]


@dataclass(frozen=True)
class Tiling:
    """How large images are cut: side 0 leaves them whole."""

    side: int = 0
    """Pixels of the source image"""
    overlap: int = 0
    """By which neighbours overlap, at least"""
    min_share: float = 0.0
    """Of an object's pixels that a tile must show to have it; or of the tile's own that the object must cover, for
    the background of no tile is what fills it"""


@dataclass
class Part:
    """What one row shows of an image."""

    window: Window
    instances: list[Instance] = field(default_factory=list)
    """In pixels of the window"""
    numbers: list[int] = field(default_factory=list)
    """Their places among the image's instances"""
    dropped: int = 0
    """Objects of which it shows something, but too little"""


def windows(size: tuple[int, int], tiling: Tiling) -> list[Window]:
    """Tiles of an image of (height, width), row by row. Those at the right and at the bottom are moved inwards, so that
    all are of one size; an image that fits into one is one."""
    if not tiling.side:
        return [Window(0, 0, *size)]
    height, width = (min(length, tiling.side) for length in size)
    tops, lefts = (_starts(length, tiling) for length in size)
    return [Window(y, x, height, width) for y in tops for x in lefts]


def _starts(length: int, tiling: Tiling) -> list[int]:
    last = max(length - tiling.side, 0)
    return [*range(0, last, tiling.side - tiling.overlap), last]


def parts(size: tuple[int, int], instances: Sequence[Instance], tiling: Tiling) -> Iterator[Part]:
    """The tiles of an image with their objects, one at a time; one part where the image is not cut."""
    found = windows(size, tiling)
    if len(found) == 1:
        yield Part(found[0], list(instances), list(range(len(instances))))
        return
    masks = segmentations_ends([each["segmentation"] for each in instances], *size)
    for window in found:
        yield part_of(window, instances, masks, height=size[0], min_share=tiling.min_share)


def part_of(
    window: Window, instances: Sequence[Instance], masks: Sequence[Ends], *, height: int, min_share: float = 0.0
) -> Part:
    """What a window shows of objects with these masks, in an image of this height."""
    part = Part(window)
    for number, (instance, mask) in enumerate(zip(instances, masks, strict=True)):
        if not _touches(instance["box"], window):
            continue
        cut = (_cut_mask if pixels_in(mask) else _cut_box)(instance, mask, window, height)
        if cut is None:
            continue
        share, shown = cut
        if share < min_share:
            part.dropped += 1
        else:
            part.instances.append(shown)
            part.numbers.append(number)
    return part


def _touches(box: Sequence[float], window: Window) -> bool:
    width, height = _overlap(box, window)
    return width >= min_extent(window.width) and height >= min_extent(window.height)


def _overlap(box: Sequence[float], window: Window) -> tuple[float, float]:
    """Width and height of what a window shows of a box; not positive where it shows nothing."""
    left, top, right, bottom = box
    width = min(right, window.x + window.width) - max(left, window.x)
    return width, min(bottom, window.y + window.height) - max(top, window.y)


def _cut_mask(instance: Instance, mask: Ends, window: Window, height: int) -> tuple[float, Instance] | None:
    """Share of the mask that a window shows, of what it could, and the instance in it; None where it shows nothing."""
    shown = crop_ends(mask, height, window)
    box = box_from_ends(shown, window.height)
    if box is None:
        return None
    seen, whole = pixels_in(shown), pixels_in(mask)
    if seen == whole:
        return 1.0, _moved(instance, shown, window)
    segmentation = {"polygons": None, "rle": rle_of(shown, (window.height, window.width))}
    area = instance["area"] * seen / whole
    points = instance["keypoints"] and _keypoints(instance["keypoints"], window)
    cut = {**instance, "box": box, "area": area, "segmentation": segmentation, "keypoints": points}
    return _share(seen, whole, window), cut


def _share(seen: float, whole: float, window: Window) -> float:
    """Of the pixels of an object that a window could show, for it may be larger than the window."""
    return seen / min(whole, window.height * window.width)


def _moved(instance: Instance, shown: Ends, window: Window) -> Instance:
    """An instance that lies in the window as a whole."""
    segmentation = instance["segmentation"] and _moved_segmentation(instance["segmentation"], shown, window)
    points = instance["keypoints"] and _keypoints(instance["keypoints"], window)
    return {**instance, "box": _clipped(instance["box"], window), "segmentation": segmentation, "keypoints": points}


def _moved_segmentation(segmentation: dict[str, Any], shown: Ends, window: Window) -> dict[str, Any]:
    """With the pixels that the window shows, for moved polygons may be drawn otherwise. Polygons that leave the image,
    and so the window by more of its sides than a row may have, are left out."""
    size, corner, polygons = (window.height, window.width), [window.x, window.y], segmentation["polygons"]
    moved = polygons and [(np.reshape(each, (-1, 2)) - corner).ravel().tolist() for each in polygons]
    if moved and any(lies_far(each, size) for each in moved):
        moved = None
    return {"polygons": moved, "rle": rle_of(shown, size)}


def _cut_box(instance: Instance, mask: Ends, window: Window, height: int) -> tuple[float, Instance]:
    """The same for an instance without a mask, or whose polygons are too thin to cover a pixel: by its box."""
    box, (left, top, right, bottom) = _clipped(instance["box"], window), instance["box"]
    shown = _overlap(instance["box"], window)
    seen, whole = shown[0] * shown[1], (right - left) * (bottom - top)
    if seen == whole:
        return 1.0, _moved(instance, crop_ends(mask, height, window), window)
    points = instance["keypoints"] and _keypoints(instance["keypoints"], window)
    cut = {**instance, "box": box, "area": instance["area"] * seen / whole, "segmentation": None, "keypoints": points}
    return _share(seen, whole, window), cut


def _clipped(box: Sequence[float], window: Window) -> list[float]:
    corner, limit = [window.x, window.y] * 2, [window.width, window.height] * 2
    return np.clip(np.subtract(box, corner), 0, limit).tolist()


def _keypoints(keypoints: Sequence[float], window: Window) -> list[float]:
    """x, y, visibility for each, as pixel numbers; those outside are no longer labelled."""
    points: NDArray[np.float64] = np.reshape(keypoints, (-1, 3)) - [window.x, window.y, 0]
    low, high = points[:, :2] + 0.5 >= 0, points[:, :2] + 0.5 < [window.width, window.height]
    inside = (low & high).all(axis=1)
    return np.where((inside & (points[:, 2] > 0))[:, None], points, 0.0).ravel().tolist()
