"""Box arithmetic. Boxes are (..., 4) xyxy in continuous pixel coordinates: a W-pixel image spans 0..W."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(dw) is bounded so that a wild regression cannot overflow: no box grows more than 1000/16-fold.
MAX_LOG_RATIO = math.log(1000.0 / 16)


def box_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...), square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise intersection area of a (N, 4) and b (M, 4) -> (N, M)."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    side = (high - low).clamp(min=0)
    return side[..., 0] * side[..., 1]


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise intersection over union of a (N, 4) and b (M, 4) -> (N, M); 0 where both are empty."""
    inter = intersection(a, b)
    union = box_area(a)[:, None] + box_area(b)[None, :] - inter
    return torch.where(union > 0, inter / union, torch.zeros_like(inter))


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (B, ..., 4) to images of sizes (B, 2) height, width."""
    height_width = sizes.to(boxes.dtype).reshape(-1, *[1] * (boxes.dim() - 2), 2)
    limit = torch.cat([height_width.flip(-1)] * 2, dim=-1)  # w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limit)


def encode_boxes(gt_boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """box_deltas (dx, dy, dw, dh) that turn anchors (..., 4) into gt_boxes (..., 4), times weights.

    Sides are bounded from below so that the padding rows of a batch, which are weighted by zero later, stay finite.
    """
    width, height = ((anchors[..., 2 + i] - anchors[..., i]).clamp(min=1e-6) for i in (0, 1))
    gt_width, gt_height = ((gt_boxes[..., 2 + i] - gt_boxes[..., i]).clamp(min=1e-6) for i in (0, 1))
    dx = (gt_boxes[..., 0] + 0.5 * gt_width - anchors[..., 0] - 0.5 * width) / width
    dy = (gt_boxes[..., 1] + 0.5 * gt_height - anchors[..., 1] - 0.5 * height) / height
    deltas = torch.stack([dx, dy, (gt_width / width).log(), (gt_height / height).log()], dim=-1)
    return deltas * deltas.new_tensor(weights)


def decode_boxes(box_deltas: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """The inverse of `encode_boxes`; dw and dh are bounded by MAX_LOG_RATIO. Shapes (..., 4)."""
    dx, dy, dw, dh = (box_deltas / box_deltas.new_tensor(weights)).unbind(-1)
    width, height = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    center_x = anchors[..., 0] + 0.5 * width + dx * width
    center_y = anchors[..., 1] + 0.5 * height + dy * height
    half_width = 0.5 * width * dw.clamp(max=MAX_LOG_RATIO).exp()
    half_height = 0.5 * height * dh.clamp(max=MAX_LOG_RATIO).exp()
    return torch.stack(
        [center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height], dim=-1
    )
