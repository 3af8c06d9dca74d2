"""Box arithmetic. Boxes are (..., 4) xyxy in continuous pixel coordinates: a W-pixel image spans 0..W.

With legacy coding, as Detectron's first weights were trained, a box ends on its last pixel: its width is
x2 - x1 + 1, and an image spans 0..W - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mrcnn.config import BoxCoding

Weights = tuple[float, float, float, float]

# exp(dw) is bounded so that a wild regression cannot overflow: no box grows more than 1000/16-fold.
MAX_LOG_RATIO = math.log(1000.0 / 16)


def last_pixel(coding: BoxCoding) -> float:
    """What a side is longer than the difference of its coordinates."""
    return 1.0 if coding == "legacy" else 0.0


def box_area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...), square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise intersection area of a (..., N, 4) and b (..., M, 4) -> (..., N, M)."""
    ax1, ay1, ax2, ay2 = (part[..., :, None] for part in a.unbind(-1))
    columns = b.transpose(-1, -2).contiguous()  # b is the long one: its coordinates are read side by side
    bx1, by1, bx2, by2 = (part[..., None, :] for part in columns.unbind(-2))
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    return width * height


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise intersection over union of a (..., N, 4) and b (..., M, 4) -> (..., N, M); 0 where both are empty."""
    return iou_of(intersection(a, b), a, b)


def iou_of(inter: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`box_iou` where the intersections (..., N, M) are known already."""
    union = box_area(a)[..., :, None] + box_area(b)[..., None, :] - inter
    return torch.where(union > 0, inter / union, torch.zeros_like(inter))


def clip_boxes(boxes: Tensor, sizes: Tensor, coding: BoxCoding = "continuous") -> Tensor:
    """Clip boxes (B, ..., 4) to images of sizes (B, 2) height, width."""
    height_width = sizes.to(boxes.dtype).reshape(-1, *[1] * (boxes.dim() - 2), 2) - last_pixel(coding)
    limit = torch.cat([height_width.flip(-1)] * 2, dim=-1)  # w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limit)


def encode_boxes(gt_boxes: Tensor, anchors: Tensor, weights: Weights, coding: BoxCoding = "continuous") -> Tensor:
    """box_deltas (dx, dy, dw, dh) that turn anchors (..., 4) into gt_boxes (..., 4), times weights.

    Sides are bounded from below so that the padding rows of a batch, which are weighted by zero later, stay finite.
    """
    x, y, width, height = _centers_and_sides(anchors, coding)
    gt_x, gt_y, gt_width, gt_height = _centers_and_sides(gt_boxes, coding)
    width, height, gt_width, gt_height = (side.clamp(min=1e-6) for side in (width, height, gt_width, gt_height))
    wx, wy, ww, wh = weights
    dx, dy = (gt_x - x) / width * wx, (gt_y - y) / height * wy
    return torch.stack([dx, dy, (gt_width / width).log() * ww, (gt_height / height).log() * wh], dim=-1)


def decode_boxes(box_deltas: Tensor, anchors: Tensor, weights: Weights, coding: BoxCoding = "continuous") -> Tensor:
    """The inverse of `encode_boxes`; dw and dh are bounded by MAX_LOG_RATIO. Shapes (..., 4)."""
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(box_deltas.unbind(-1), weights, strict=True))
    x, y, width, height = _centers_and_sides(anchors, coding)
    center_x, center_y = x + dx * width, y + dy * height
    half_width = 0.5 * width * dw.clamp(max=MAX_LOG_RATIO).exp()
    half_height = 0.5 * height * dh.clamp(max=MAX_LOG_RATIO).exp()
    end = last_pixel(coding)
    return torch.stack(
        [center_x - half_width, center_y - half_height, center_x + half_width - end, center_y + half_height - end],
        dim=-1,
    )


def _centers_and_sides(boxes: Tensor, coding: BoxCoding) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1 + last_pixel(coding), y2 - y1 + last_pixel(coding)
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def gather_boxes(boxes: Tensor, idxs: Tensor) -> Tensor:
    """boxes (B, N, 4) at idxs (B, S) -> (B, S, 4); zeros where there are no boxes at all."""
    if boxes.shape[1] == 0:
        return boxes.new_zeros(*idxs.shape, 4)
    return boxes.gather(1, idxs[..., None].expand(-1, -1, 4))
