"""Keypoints as one-hot heatmaps over RoIs: their cells, the loss, and the way back to the image (section 5).

Kp keypoints of an object; a heatmap is side x side. All but `decode_keypoints` have shapes that no value decides.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_PIXELS = 1 << 24
"""Pixels of upsampled float32 heatmaps that are held at once: 64 MiB."""


def keypoint_targets(keypoints: Tensor, rois: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The heatmap cell in which each keypoint of its RoI's object lies.

    Args:
        keypoints: (R, Kp, 3) x, y, visibility
        rois: (R, 4) xyxy
        side: of the heatmap

    Returns:
        cells (R, Kp) int64, row x side + column, and which of them say something (R, Kp) bool: of keypoints that are
        annotated (visibility > 0) and within the RoI, its far edges included. A cell without meaning is 0.
    """
    low, high = rois[:, None, :2], rois[:, None, 2:]
    points = keypoints[..., :2]
    cell = ((points - low) * (side / (high - low))).floor()
    cell = torch.where(points == high, side - 1, cell)
    valid = ((cell >= 0) & (cell < side)).all(dim=2) & (keypoints[..., 2] > 0)
    column, row = torch.where(valid[..., None], cell, 0).long().unbind(dim=2)
    return row * side + column, valid


def keypoint_loss(logits: Tensor, targets: Tensor, counted: Tensor, *, count: Tensor) -> Tensor:
    """Softmax cross-entropy over the cells of each heatmap, summed over keypoints that count, divided by `count`.

    Args:
        logits: (R, Kp, side, side)
        targets: (R, Kp) int64, as `keypoint_targets` gives them
        counted: (R, Kp) 0 or 1: which keypoints count
        count: () how many do, see mrcnn/distributed.py
    """
    loss = F.cross_entropy(logits.flatten(2).flatten(0, 1), targets.flatten(), reduction="none")
    return (loss * counted.flatten()).sum() / count


def decode_keypoints(logits: Tensor, boxes: Tensor, *, score: Literal["probability", "logit"]) -> Tensor:
    """The peak of each heatmap, upsampled over its box to whole pixels: (D, Kp, 3) x, y, score.

    Args:
        logits: (D, Kp, side, side)
        boxes: (D, 4) xyxy; a side shorter than a pixel counts as one
        score: probability of the peak, by a softmax whose sum runs over the cells of the heatmap before upsampling
            (detectron2), or logit, the upsampled peak itself (torchvision)
    """
    logits = logits.float()
    extent = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = extent.ceil()
    found = [_peaks(maps, *size) for maps, size in zip(logits, pixels.long().tolist(), strict=True)]
    if not found:
        return logits.new_zeros(0, logits.shape[1], 3)
    positions, scores = (torch.stack(part) for part in zip(*found, strict=True))
    places = (positions + 0.5) * (extent / pixels)[:, None] + boxes[:, None, :2]
    if score == "probability":
        scores = (scores - logits.flatten(2).logsumexp(dim=2)).exp()
    return torch.cat([places, scores[..., None]], dim=2)


def _peaks(maps: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Column and row (Kp, 2) of the maximum of maps (Kp, side, side) resized to width x height, and its value (Kp,)."""
    rows, columns = _bicubic(maps, height), _bicubic(maps, width)
    step = max(1, CHUNK_PIXELS // (width * height))
    peaks = [_maxima(rows @ some @ columns.T) for some in maps.split(step)]
    x, y, value = (torch.cat(part) for part in zip(*peaks, strict=True))
    return torch.stack([x, y], dim=1), value


def _maxima(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Column, row and value (Kp,) of the first maximum of maps (Kp, height, width)."""
    row = maps.amax(dim=2).argmax(dim=1)  # by rows, because the maximum is vectorised and the arg-max is not
    line = maps.gather(1, row[:, None, None].expand(-1, 1, maps.shape[2])).squeeze(1)
    value, column = line.max(dim=1)
    return column, row, value


def _bicubic(maps: Tensor, pixels: int) -> Tensor:
    """(pixels, side): the share of each cell in each pixel of an axis. Bicubic interpolation is separable."""
    side = maps.shape[-1]
    identity = torch.eye(side, device=maps.device)[None, None]
    return F.interpolate(identity, size=(pixels, side), mode="bicubic", align_corners=False)[0, 0]
