"""Annotations of a resized image: boxes, polygons, run lengths and keypoints moved with the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrcnn.ops import resize_masks, rle_encode
from mrcnn.structures import RunLengthMasks
from pipelines.rle import Ends, counts_from_ends, packed, segmentation_ends, segmentations_ends


@dataclass(frozen=True)
class Scaling:
    """Sizes (height, width) of an image before and after it is resized."""

    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def y(self) -> float:
        """Factor for vertical coordinates."""
        return self.after[0] / self.before[0]

    @property
    def x(self) -> float:
        """Factor for horizontal coordinates."""
        return self.after[1] / self.before[1]


def scale_instance(instance: dict[str, Any], scaling: Scaling) -> dict[str, Any]:
    """An instance as in pipelines/schema.py, of the resized image.

    Polygons are moved as numbers, which costs little and can be undone; the run lengths beside them, which fit one size
    alone, are left out. An instance that has only run lengths gets those of its resized mask.
    """
    if scaling.before == scaling.after:
        return instance
    segmentation = instance["segmentation"]
    if segmentation and segmentation["polygons"] is None:
        (counts,) = rle_encode(_resized([segmentation_ends(segmentation, *scaling.before)], scaling))
        segmentation = {"polygons": None, "rle": _rle(counts, scaling.after)}
    elif segmentation:
        segmentation = {"polygons": _scale_polygons(segmentation["polygons"], scaling), "rle": None}
    return {**_scale_numbers(instance, scaling), "segmentation": segmentation}


def scale_instances(instances: list[dict[str, Any]], scaling: Scaling) -> list[dict[str, Any]]:
    """All instances of an image, each mask also as run lengths: those of the mask that was drawn before resizing.

    Drawing rounds an outline to pixels, so that polygons that are drawn after resizing give another mask, which
    differs from the resized one along its outline: by a tenth of its pixels where the object is small. So do polygons
    of the same size that were stored as float32 in between: corners often lie where drawing rounds up or down.
    """
    if not instances:
        return instances
    drawn = segmentations_ends([each["segmentation"] for each in instances], *scaling.before)
    counts = rle_encode(packed(drawn) if scaling.before == scaling.after else _resized(drawn, scaling))
    return [
        {**_scale_numbers(each, scaling), "segmentation": _with_runs(each["segmentation"], runs, scaling)}
        for each, runs in zip(instances, counts, strict=True)
    ]


def _resized(masks: Sequence[Ends], scaling: Scaling) -> RunLengthMasks:
    return resize_masks(packed(masks), size=scaling.before, new_size=scaling.after)


def rle_of(ends: Ends, size: tuple[int, int]) -> dict[str, Any]:
    """Run ends -> COCO's compressed run lengths."""
    return _rle(counts_from_ends(ends), size)


def _rle(counts: bytes, size: tuple[int, int]) -> dict[str, Any]:
    return {"size": list(size), "counts": counts.decode()}


def scale_points(coordinates: Any, scaling: Scaling) -> list[float]:
    """x1, y1, x2, y2, ... of a box or of a polygon."""
    return (np.asarray(coordinates, np.float64).reshape(-1, 2) * [scaling.x, scaling.y]).ravel().tolist()


def scale_keypoints(keypoints: NDArray[np.float64], scaling: Scaling) -> list[float]:
    """x, y, visibility for each. COCO gives pixel numbers, whose centres lie half a pixel further; unlabelled points
    stay 0, 0, 0."""
    points = keypoints.reshape(-1, 3).copy()
    labelled = points[:, 2] > 0
    points[labelled, :2] = (points[labelled, :2] + 0.5) * [scaling.x, scaling.y] - 0.5
    return points.ravel().tolist()


def _scale_numbers(instance: dict[str, Any], scaling: Scaling) -> dict[str, Any]:
    return {
        **instance,
        "box": scale_points(instance["box"], scaling),
        "area": instance["area"] * scaling.x * scaling.y,
        "keypoints": instance["keypoints"] and scale_keypoints(np.array(instance["keypoints"]), scaling),
    }


def _with_runs(segmentation: dict[str, Any] | None, counts: bytes, scaling: Scaling) -> dict[str, Any] | None:
    if segmentation is None:
        return None
    polygons = segmentation["polygons"] and _scale_polygons(segmentation["polygons"], scaling)
    return {"polygons": polygons, "rle": _rle(counts, scaling.after)}


def _scale_polygons(polygons: Sequence[Sequence[float]], scaling: Scaling) -> list[list[float]]:
    return [scale_points(each, scaling) for each in polygons]
