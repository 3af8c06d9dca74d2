"""What is known of keypoints by their names: which of them a category has, COCO's limbs and its tolerances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mrcnn.structures import Category, Detections

COCO_SIGMAS = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062,
               0.107, 0.107, 0.087, 0.087, 0.089, 0.089)  # fmt: skip
"""How far apart people mark the same keypoint of a person, in the root of its area, in COCO's order (pycocotools)."""

LIMBS = (
    ("left_ankle", "left_knee"), ("left_knee", "left_hip"), ("right_ankle", "right_knee"), ("right_knee", "right_hip"),
    ("left_hip", "right_hip"), ("left_shoulder", "left_hip"), ("right_shoulder", "right_hip"),
    ("left_shoulder", "right_shoulder"), ("left_shoulder", "left_elbow"), ("right_shoulder", "right_elbow"),
    ("left_elbow", "left_wrist"), ("right_elbow", "right_wrist"), ("left_eye", "right_eye"), ("nose", "left_eye"),
    ("nose", "right_eye"), ("left_eye", "left_ear"), ("right_eye", "right_ear"), ("left_ear", "left_shoulder"),
    ("right_ear", "right_shoulder"),
)  # fmt: skip
"""COCO's skeleton of a person."""


def oks_sigmas(keypoints: int) -> NDArray[np.float64]:
    """Tolerances of object keypoint similarity: COCO's for 17 keypoints, else their mean, 0.067, for each.

    Nobody has measured how well people agree on other keypoints; numbers by this rule compare among themselves only.
    """
    if keypoints == len(COCO_SIGMAS):
        return np.array(COCO_SIGMAS)
    return np.full(keypoints, np.mean(COCO_SIGMAS))


def limbs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Places of both ends of each of COCO's limbs; none where the names are not COCO's."""
    places = {name: i for i, name in enumerate(names)}
    return [(places[a], places[b]) for a, b in LIMBS if a in places and b in places]


def own_keypoints(found: Detections, categories: Sequence[Category]) -> list[list[float] | None]:
    """x, y, score triples, flat, of each detection; None without.

    A head has as many keypoints as the category with most of them: what another category does not have is cut off. All
    are kept where no category names its keypoints.
    """
    if found.keypoints is None:
        return [None] * len(found)
    named = any(category.keypoints for category in categories)
    rows = zip(found.keypoints.flatten(1).tolist(), found.labels.tolist(), strict=True)
    cut = [row[: 3 * len(categories[label - 1].keypoints)] if named else row for row, label in rows]
    return [row or None for row in cut]
