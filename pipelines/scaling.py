"""Annotations of a resized image: boxes, polygons, run lengths and keypoints moved with the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mrcnn.ops import resize_masks
from mrcnn.structures import RunLengthMasks
from pipelines.rle import Ends, counts_from_ends, segmentation_ends


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
        (ends,) = resize_ends([segmentation_ends(segmentation, *scaling.before)], scaling)
        segmentation = {"polygons": None, "rle": rle_of(ends, scaling.after)}
    elif segmentation:
        segmentation = {"polygons": _scale_polygons(segmentation["polygons"], scaling), "rle": None}
    return {**_scale_numbers(instance, scaling), "segmentation": segmentation}


def scale_instances(instances: list[dict[str, Any]], scaling: Scaling) -> list[dict[str, Any]]:
    """All instances of an image, each mask also as run lengths: those of the mask that was drawn before resizing.

    pycocotools rounds corners to pixels, so that polygons that are drawn after resizing give another mask, which
    differs from the resized one along its outline: by a tenth of its pixels where the object is small.
    """
    if scaling.before == scaling.after:
        return instances
    drawn = [segmentation_ends(each["segmentation"], *scaling.before) for each in instances]
    resized = resize_ends(drawn, scaling)
    return [
        {**_scale_numbers(each, scaling), "segmentation": _with_runs(each["segmentation"], ends, scaling)}
        for each, ends in zip(instances, resized, strict=True)
    ]


def resize_ends(masks: Sequence[Ends], scaling: Scaling) -> list[Ends]:
    """Resize masks given as run ends (see pipelines/rle.py); one without runs stays so."""
    if not masks:
        return []
    offsets = np.cumsum([0, *(len(each) for each in masks)])
    ends = np.concatenate(masks).astype(np.int32)
    runs = RunLengthMasks(torch.from_numpy(ends), torch.from_numpy(offsets))
    resized = resize_masks(runs, size=scaling.before, new_size=scaling.after)
    return np.split(resized.ends.numpy().astype(np.int64), resized.offsets.numpy()[1:-1])


def rle_of(ends: Ends, size: tuple[int, int]) -> dict[str, Any]:
    """Run ends -> COCO's compressed run lengths."""
    return {"size": list(size), "counts": counts_from_ends(ends, *size).decode()}


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


def _with_runs(segmentation: dict[str, Any] | None, ends: Ends, scaling: Scaling) -> dict[str, Any] | None:
    if segmentation is None:
        return None
    polygons = segmentation["polygons"] and _scale_polygons(segmentation["polygons"], scaling)
    return {"polygons": polygons, "rle": rle_of(ends, scaling.after)}


def _scale_polygons(polygons: Sequence[Sequence[float]], scaling: Scaling) -> list[list[float]]:
    return [scale_points(each, scaling) for each in polygons]
