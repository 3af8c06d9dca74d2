"""Cityscapes' average precision of instances, as cityscapesScripts' evalInstanceLevelSemanticLabeling defines it.

Ground truth is an image of ids as in *_gtFine_instanceIds.png: label * 1000 + number for an object, the label alone
for a group of objects that nobody told apart, and for everything that has no instances.

It differs from COCO's: a prediction is matched by the ground truth, not the other way round, so that of two on one
object the better is right; overlap has to be more than its threshold; what lies mostly in void, groups and small
objects is ignored; and the precision-recall curve is integrated as it is, without interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

CLASSES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""Label id -> name of what is measured."""
UNMEASURED = (29, 30)
"""Caravan and trailer: they have instances in the annotations, but predictions of them are left out."""
VOID = (-1, 0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""Labels whose pixels count for nothing; of caravans and trailers only the groups, as in cityscapesScripts."""
LARGEST_ID = 33_999
OVERLAPS = np.arange(0.5, 1.0, 0.05)
MIN_PIXELS = 100
"""Smaller objects are ignored."""


@dataclass(frozen=True)
class InstancePrediction:
    """One object that was found."""

    label: int
    """Cityscapes' label id, one of `CLASSES`"""
    score: float
    mask: NDArray[np.bool_] | Mapping[str, Any]
    """(H, W) bool, or COCO run lengths `{"size": [H, W], "counts": ...}`"""


@dataclass(frozen=True)
class CityscapesMetrics:
    """All in 0..1; nan where there is no ground truth."""

    ap: float
    """Mean over classes and overlaps 0.50:0.95"""
    ap50: float
    """Mean over classes at an overlap of 0.50"""
    ap_per_class: dict[str, float]
    ap50_per_class: dict[str, float]
    images: int


@dataclass(frozen=True)
class _ClassMatches:
    """What one image says of one class at one overlap."""

    right: NDArray[np.bool_]
    """For each prediction that counts"""
    scores: NDArray[np.float64]
    objects: int
    """To be found"""


ImageMatches = dict[int, list[_ClassMatches]]
"""By label, for each of `OVERLAPS`: all that is kept of an image."""


def evaluate_cityscapes(
    images: Iterable[tuple[NDArray[np.integer[Any]], Sequence[InstancePrediction]]],
) -> CityscapesMetrics:
    """AP of pairs of an image of ids (H, W) and what was found in it. Only one image is in memory at a time.

    Raises ValueError for masks of another size than their image, and for what are no ids or labels of Cityscapes.
    """
    return cityscapes_ap(match_image(ids, predictions) for ids, predictions in images)


def match_image(ids: NDArray[np.integer[Any]], predictions: Sequence[InstancePrediction]) -> ImageMatches:
    """Compare one image with its ground truth; what comes out is small, and independent of other images."""
    values, places, pixels = _ids(ids)
    found = _Found.of(predictions, places, len(values))
    void = found.shared[:, np.isin(values, VOID)].sum(axis=1)
    matches: ImageMatches = {}
    for label in CLASSES:
        own = (values == label) | ((values >= 1000) & (values // 1000 == label))
        chosen = found.labels == label
        regions = _Regions(
            is_group=values[own] < 1000,
            pixels=pixels[own],
            scores=found.scores[chosen],
            predicted=found.pixels[chosen],
            shared=found.shared[chosen][:, own],
            void=void[chosen],
        )
        matches[label] = [regions.match(overlap) for overlap in OVERLAPS]
    return matches


def _ids(image: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The ids of an image, the place of each pixel's among them (H, W), and how many pixels each has."""
    whole = image.ndim == 2 and np.issubdtype(image.dtype, np.integer)
    if not whole or image.size == 0 or image.min() < -1 or image.max() > LARGEST_ID:
        raise ValueError(
            f"the ground truth is {image.dtype} {image.shape}, but must be (height, width) of ids from -1 to "
            f"{LARGEST_ID}: give what is in a *_gtFine_instanceIds.png"
        )
    shifted = image.astype(np.int64) + 1
    counts = np.bincount(shifted.ravel())  # much faster than np.unique, which sorts
    present = np.flatnonzero(counts)
    places = np.zeros(len(counts), np.int64)
    places[present] = np.arange(len(present))
    return present - 1, places[shifted], counts[present]


def cityscapes_ap(images: Iterable[ImageMatches]) -> CityscapesMetrics:
    """Sum up what `match_image` found in each image."""
    collected: dict[int, list[list[_ClassMatches]]] = {label: [[] for _ in OVERLAPS] for label in CLASSES}
    count = 0
    for matches in images:
        count += 1
        for label, each in matches.items():
            for kept, new in zip(collected[label], each, strict=True):
                kept.append(new)
    ap = np.array([[_average_precision(kept) for kept in collected[label]] for label in CLASSES])
    return CityscapesMetrics(
        ap=_mean(ap.ravel()),
        ap50=_mean(ap[:, 0]),
        ap_per_class=dict(zip(CLASSES.values(), ap.mean(axis=1).tolist(), strict=True)),
        ap50_per_class=dict(zip(CLASSES.values(), ap[:, 0].tolist(), strict=True)),
        images=count,
    )


@dataclass(frozen=True)
class _Found:
    """P predictions that are not empty, of any label."""

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    pixels: NDArray[np.int64]
    shared: NDArray[np.int64]
    """(P, ids): pixels in common with each id of the image"""

    @classmethod
    def of(cls, predictions: Sequence[InstancePrediction], places: NDArray[np.int64], ids: int) -> _Found:
        counts = [np.bincount(places[_bitmap(each, places.shape)], minlength=ids) for each in predictions]
        shared = np.array(counts, np.int64).reshape(len(predictions), ids)
        pixels = shared.sum(axis=1)
        labels = np.array([each.label for each in predictions], np.int64)
        scores = np.array([each.score for each in predictions], np.float64)
        kept = pixels > 0
        return cls(labels[kept], scores[kept], pixels[kept], shared[kept])


def _bitmap(prediction: InstancePrediction, size: tuple[int, ...]) -> NDArray[np.bool_]:
    if prediction.label not in CLASSES and prediction.label not in UNMEASURED:
        raise ValueError(
            f"a prediction has label {prediction.label}, but must have one of {sorted(CLASSES)}: "
            "give Cityscapes' label ids, not numbers from 1 on"
        )
    if not math.isfinite(prediction.score):
        raise ValueError(f"a prediction has score {prediction.score}, but must have a finite one")
    mask = prediction.mask
    bitmap = mask_utils.decode(dict(mask)).astype(bool) if isinstance(mask, Mapping) else np.asarray(mask, bool)
    if bitmap.shape != size:
        raise ValueError(f"a mask is {bitmap.shape}, but its image {size}: give masks of the image's own size")
    return bitmap


@dataclass(frozen=True)
class _Regions:
    """G regions of the ground truth and P predictions of one class in one image."""

    is_group: NDArray[np.bool_]  # (G,)
    pixels: NDArray[np.int64]  # (G,)
    scores: NDArray[np.float64]  # (P,)
    predicted: NDArray[np.int64]  # (P,) pixels
    shared: NDArray[np.int64]  # (P, G) pixels
    void: NDArray[np.int64]  # (P,) pixels

    def match(self, overlap: float) -> _ClassMatches:
        """Of the predictions over one object the best is right. One over a group or a small object, and one of which
        more than `overlap` is void, group or small, does not count.
        """
        small = self.pixels < MIN_PIXELS
        is_object = ~self.is_group & ~small
        over = self.shared / (self.predicted[:, None] + self.pixels - self.shared) > overlap
        on_object = over & is_object  # at most one object each, as overlaps are over 0.5
        right = np.zeros(len(self.scores), bool)
        if len(right):
            best = np.where(on_object, self.scores[:, None], -np.inf).argmax(axis=0)
            right[best[on_object.any(axis=0)]] = True
        # Groups that are small count twice here, as in cityscapesScripts.
        ignored = self.void + self.shared @ self.is_group.astype(np.int64) + self.shared @ small.astype(np.int64)
        false_alarm = ~over.any(axis=1) & (ignored / self.predicted <= overlap)
        counts = on_object.any(axis=1) | false_alarm
        return _ClassMatches(right[counts], self.scores[counts], objects=int(is_object.sum()))


def _average_precision(images: Sequence[_ClassMatches]) -> float:
    """Area under precision over recall, step by step, with a point of precision 1 at recall 0.

    The width of a step is half the distance between its neighbours.
    """
    objects = sum(each.objects for each in images)
    if objects == 0:
        return math.nan
    scores = np.concatenate([each.scores for each in images])
    order = np.argsort(scores, kind="stable")
    right, scores = np.concatenate([each.right for each in images])[order], scores[order]
    _, first = np.unique(scores, return_index=True)
    true = right.sum() - np.concatenate([[0], np.cumsum(right)])[first]  # from each threshold on
    precision = np.append(true / (len(scores) - first), 1.0)
    recall = np.append(true / objects, 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:])) / 2


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
