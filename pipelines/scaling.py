"""Annotations of a resized image: boxes, polygons, run lengths and keypoints moved with the pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipelines.rle import Ends, bitmap_from_ends, segmentation_ends
from pipelines.transforms import resize_mask


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
    """An instance as in pipelines/schema.py, of the resized image."""
    if scaling.before == scaling.after:
        return instance
    return {
        **instance,
        "box": scale_points(instance["box"], scaling),
        "area": instance["area"] * scaling.x * scaling.y,
        "segmentation": _scale_segmentation(instance["segmentation"], scaling),
        "keypoints": instance["keypoints"] and scale_keypoints(np.array(instance["keypoints"]), scaling),
    }


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


def scale_rle(ends: Ends, scaling: Scaling) -> dict[str, Any]:
    """Run ends (see pipelines/rle.py) -> COCO's compressed run lengths of the resized mask."""
    bitmap = bitmap_from_ends(resize_mask(ends, scaling.before, scaling.after), *scaling.after)
    counts = coco_mask.encode(np.asfortranarray(bitmap))["counts"].decode()
    return {"size": list(scaling.after), "counts": counts}


def _scale_segmentation(segmentation: dict[str, Any] | None, scaling: Scaling) -> dict[str, Any] | None:
    if segmentation is None:
        return None
    if segmentation["rle"] is None:
        return {"polygons": [scale_points(each, scaling) for each in segmentation["polygons"]], "rle": None}
    return {"polygons": None, "rle": scale_rle(segmentation_ends(segmentation, *scaling.before), scaling)}
