"""Which anchor or RoI learns from which object, and which of them are sampled.

Everything here has shapes that depend on shapes only, never on values, so a training step on a GPU does not wait for
the host. Sampling draws no random numbers from a generator: an image's seed alone decides, so that the same image is
sampled alike on any number of workers and after any restart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnn.boxes import box_area, intersection, iou_of
from mrcnn.structures import Targets

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1

# A negative of which more than this share lies in a crowd may well hold an object (Detectron's value).
CROWD_OVERLAP = 0.7
# Overlaps of objects and candidates that are in memory at a time, some hundred megabytes with the temporaries:
# 500 objects with 270,000 anchors would be more than a GPU has to spare.
CHUNK_OVERLAPS = 1 << 25


def match(
    candidates: Tensor, targets: Targets, *, positive_iou: float, negative_iou: float, keep_best: bool
) -> tuple[Tensor, Tensor]:
    """Match candidates (B, A, 4), or (1, A, 4) for all images alike, with the objects of their image.

    keep_best: the best candidates of each object are positive however low their IoU.

    Returns:
        matched_idxs (B, A) int64, the object of highest IoU; kinds (B, A) int64, one of POSITIVE, NEGATIVE, IGNORED.
    """
    (B, N), A = targets.labels.shape, candidates.shape[1]
    best_iou = candidates.new_full((B, A), -1.0)
    matched_idxs = torch.zeros(B, A, dtype=torch.int64, device=candidates.device)
    is_best = torch.zeros(B, A, dtype=torch.bool, device=candidates.device)
    in_crowd = torch.zeros_like(is_best)
    step = max(1, CHUNK_OVERLAPS // max(B * A, 1))
    for start in range(0, N, step):
        some = slice(start, start + step)
        is_object, is_crowd = _objects_and_crowds(targets, some)
        inter = intersection(targets.boxes[:, some], candidates)  # (B, n, A)
        iou = torch.where(is_object[..., None], iou_of(inter, targets.boxes[:, some], candidates), -1.0)
        highest, idxs = iou.max(dim=1)
        matched_idxs = torch.where(highest > best_iou, idxs + start, matched_idxs)
        best_iou = torch.maximum(best_iou, highest)
        if keep_best:
            of_object = iou.max(dim=2, keepdim=True).values
            is_best |= ((iou == of_object) & (of_object > 0)).any(dim=1)
        covered = inter / box_area(candidates).clamp(min=1e-6)[:, None]
        in_crowd |= ((covered > CROWD_OVERLAP) & is_crowd[..., None]).any(dim=1)
    kinds = torch.full_like(matched_idxs, IGNORED)
    kinds = kinds.masked_fill(best_iou < negative_iou, NEGATIVE).masked_fill(best_iou >= positive_iou, POSITIVE)
    kinds = kinds.masked_fill(is_best, POSITIVE)
    return matched_idxs, kinds.masked_fill(in_crowd & (kinds == NEGATIVE), IGNORED)


def _objects_and_crowds(targets: Targets, some: slice) -> tuple[Tensor, Tensor]:
    there, iscrowd = targets.labels[:, some] > 0, targets.iscrowd[:, some]
    return there & ~iscrowd, there & iscrowd


def priorities(seeds: Tensor, count: int) -> Tensor:
    """Pseudo-random sampling priorities, (B,) int64 seeds -> (B, count) int64 in [0, 2**32).

    A hash of (seed, position): MurmurHash3's 32-bit finaliser, the same numbers on every device.
    """
    position = torch.arange(count, device=seeds.device, dtype=torch.int64)
    low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
    x = (position[None] * 0x9E3779B1 + low[:, None]) & 0xFFFFFFFF
    for addend in (0, high[:, None]):
        x = (x ^ addend) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        x = x ^ (x >> 16)
    return x


def sample(kinds: Tensor, priority: Tensor, *, size: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Sample `size` candidates an image: at most positive_fraction of them positive, the rest negative.

    Args:
        kinds: (B, A) int64 as `match` gives them
        priority: (B, A) int64, not negative; the highest are taken

    Returns:
        idxs (B, min(size, A)) int64 and their kinds, IGNORED where an image has too few candidates.
        Positives come first, so all of them are in the first int(size * positive_fraction) columns.
    """
    count = kinds.shape[1]
    is_positive = kinds == POSITIVE
    # Positives beyond their share are out; above all negatives rank the chosen ones.
    most = min(max(int(size * positive_fraction), 1), count)
    top, top_idxs = torch.where(is_positive, priority, -1).topk(most, dim=1)
    chosen = torch.zeros_like(is_positive).scatter(1, top_idxs, top >= 0)
    key = torch.where(kinds == NEGATIVE, priority, -1)
    key = torch.where(chosen, priority + (1 << 33), key)
    top, idxs = key.topk(min(size, count), dim=1)
    return idxs, torch.where(top >= 0, kinds.gather(1, idxs), IGNORED)
