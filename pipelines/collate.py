"""Rows -> the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mrcnn.preprocess import batch_images
from mrcnn.structures import Category, ImageBatch, RunLengthMasks, Targets, mirrored_keypoints
from pipelines.dataset import Row
from pipelines.rle import NOTHING, flip_ends, packed, segmentations_ends

MIN_BOX_SIDE = 1e-3  # pixels; a box without extent has no regression target


def collate(
    rows: Sequence[Row],
    *,
    seeds: Sequence[int],
    flips: Sequence[bool],
    categories: Sequence[Category] = (),
    size_divisor: int = 32,
) -> tuple[ImageBatch, Targets]:
    """Stack rows, padded with zeros to a common multiple of `size_divisor`, mirrored where `flips` says so.

    Objects whose box is narrower than MIN_BOX_SIDE are left out; an object without a segmentation has a mask without
    runs. Where the categories name keypoints, all objects have as many as the category with most of them: those that
    its own category does not have are not annotated, as are all of a crowd and of an object without keypoints.
    """
    images = [row.image[:, ::-1] if flip else row.image for row, flip in zip(rows, flips, strict=True)]
    objects = [_objects(row, flip, categories) for row, flip in zip(rows, flips, strict=True)]
    most = max(len(each.labels) for each in objects)
    boxes = torch.zeros(len(rows), most, 4)
    labels = torch.zeros(len(rows), most, dtype=torch.int64)
    iscrowd = torch.zeros(len(rows), most, dtype=torch.bool)
    keypoints = torch.zeros(len(rows), most, most_keypoints(categories), 3)
    for b, each in enumerate(objects):
        n = len(each.labels)
        boxes[b, :n] = torch.from_numpy(each.boxes)
        labels[b, :n] = torch.tensor(each.labels, dtype=torch.int64)
        iscrowd[b, :n] = torch.tensor(each.iscrowd, dtype=torch.bool)
        keypoints[b, :n] = torch.from_numpy(each.keypoints)
    targets = Targets(
        boxes=boxes,
        labels=labels,
        iscrowd=iscrowd,
        masks=_flatten_masks([each.masks for each in objects], most),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        keypoints=keypoints if keypoints.shape[2] else None,
    )
    return batch_images(images, size_divisor=size_divisor), targets


@dataclass(frozen=True)
class _Objects:
    boxes: NDArray[np.float32]
    labels: list[int]
    iscrowd: list[bool]
    masks: list[NDArray[np.int64]]
    keypoints: NDArray[np.float32]


def _objects(row: Row, flip: bool, categories: Sequence[Category]) -> _Objects:
    height, width = row.image.shape[:2]
    kept = [each for each in row.instances if has_extent(each["box"])]
    boxes = np.array([each["box"] for each in kept], np.float32).reshape(-1, 4)
    masks = segmentations_ends([each["segmentation"] for each in kept], height, width)
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        masks = [flip_ends(each, height, width) if len(each) else each for each in masks]
    keypoints = np.zeros((len(kept), most_keypoints(categories), 3), np.float32)
    if keypoints.size:
        names = {label: category.keypoints for label, category in enumerate(categories, start=1)}
        for points, each in zip(keypoints, kept, strict=True):
            # of a label that there is not, `check_targets` will tell
            own = _keypoints(each, names.get(each["label"], ()), mirrored_in=width if flip else None)
            points[: len(own)] = own
    return _Objects(boxes, [each["label"] for each in kept], [each["iscrowd"] for each in kept], masks, keypoints)


def most_keypoints(categories: Sequence[Category]) -> int:
    """Keypoints of the category that has most."""
    return max((len(category.keypoints) for category in categories), default=0)


def _keypoints(instance: dict[str, Any], names: Sequence[str], *, mirrored_in: int | None) -> NDArray[np.float32]:
    """(keypoints of the category, 3), with zeros where nothing is annotated; mirrored in an image of some width."""
    if instance["iscrowd"] or not instance["keypoints"] or not names:
        return np.zeros((len(names), 3), np.float32)
    points = np.array(instance["keypoints"], np.float32).reshape(-1, 3)
    if len(points) != len(names):
        raise ValueError(f"an object has {len(points)} keypoints, its category names {len(names)}")
    annotated = points[:, 2:] > 0
    if mirrored_in is not None:
        points[:, 0] = mirrored_in - 1 - points[:, 0]  # they are pixel numbers: see pipelines/scaling.py
    points = np.where(annotated, points, np.float32(0))
    return points if mirrored_in is None else points[mirrored_keypoints(names)]


def has_extent(box: Sequence[float]) -> bool:
    """Whether a box xyxy is at least MIN_BOX_SIDE wide and high. One with a NaN passes, to be refused later."""
    return not (box[2] - box[0] < MIN_BOX_SIDE or box[3] - box[1] < MIN_BOX_SIDE)


def _flatten_masks(masks: Sequence[Sequence[NDArray[np.int64]]], most: int) -> RunLengthMasks:
    """B lists of run ends -> B x `most` instances, those that are padding without runs."""
    return packed([ends for image in masks for ends in [*image, *[NOTHING] * (most - len(image))]])
