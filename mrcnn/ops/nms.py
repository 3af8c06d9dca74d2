"""Non-maximum suppression whose result has a fixed shape, so that nothing waits for the GPU to count it."""

from __future__ import annotations

import torch
from torch import Tensor

from mrcnn.ops import _library  # noqa: F401  importing it registers torch.ops.mrcnn
from mrcnn.ops._checks import check_device, check_tensor


def nms(boxes: Tensor, scores: Tensor, groups: Tensor, *, iou_threshold: float, top_n: int) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression within each group of each image, best score first.

    What survives is what `torchvision.ops.nms` leaves of each group alone: IoU in float32, a box suppressed where
    it is above the threshold. Of equal scores the lower position comes first.

    Args:
        boxes: (B, P, 4) xyxy, float32; float64 is rounded to float32.
        scores: (B, P) floating point. An entry of score -inf or NaN takes no part.
        groups: (B, P) int64: pyramid level or class. Boxes of different groups leave each other alone.
        iou_threshold: 0..1.
        top_n: the most survivors of an image, all groups together.

    Returns:
        idxs: (B, min(top_n, P)) int64, the survivors' positions in P, best first; 0 where not valid.
        valid: (B, min(top_n, P)) bool.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, or out of its bounds.
    """
    _check(boxes, scores, groups, iou_threshold=iou_threshold, top_n=top_n)
    scores = scores.detach()
    scores, order = scores.masked_fill(scores.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True)
    kept = torch.ops.mrcnn.nms(
        boxes.detach().float().gather(1, order[..., None].expand(-1, -1, 4)),
        groups.gather(1, order),
        (scores > -torch.inf).sum(dim=1),
        iou_threshold,
        min(top_n, boxes.shape[1]),
    )
    valid = kept >= 0
    return torch.where(valid, order.gather(1, kept.clamp(min=0)), 0), valid


def _check(boxes: Tensor, scores: Tensor, groups: Tensor, *, iou_threshold: float, top_n: int) -> None:
    if boxes.dim() != 3 or boxes.shape[2] != 4 or boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"boxes is {tuple(boxes.shape)} {boxes.dtype}: give (B, P, 4) float32")
    if scores.shape != boxes.shape[:2] or not scores.is_floating_point():
        raise ValueError(
            f"scores is {tuple(scores.shape)} {scores.dtype} but boxes is {tuple(boxes.shape)}: give (B, P) float32"
        )
    check_device("scores", scores, boxes.device)
    check_tensor("groups", groups, shape="(B, P)", dims=2, dtype=torch.int64, device=boxes.device)
    if groups.shape != boxes.shape[:2]:
        raise ValueError(f"groups is {tuple(groups.shape)} but boxes is {tuple(boxes.shape)}: give (B, P), one a box")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold}: give 0..1")
    if top_n < 0:
        raise ValueError(f"top_n is {top_n}: give at least 0")
