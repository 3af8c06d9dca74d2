"""The losses. Each takes padded tensors and a weight of 0 or 1 for every row, so no shape depends on the data.

The divisor `count` () comes from mrcnn/distributed.py: the number of rows with weight 1, where nothing else is said.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def objectness_loss(logits: Tensor, is_object: Tensor, *, weights: Tensor, count: Tensor) -> Tensor:
    """Binary cross-entropy over sampled anchors (B, S) with weight 1, divided by `count`."""
    loss = F.binary_cross_entropy_with_logits(logits, is_object.to(logits.dtype), reduction="none")
    return (loss * weights).sum() / count


def box_loss(box_deltas: Tensor, targets: Tensor, *, weights: Tensor, count: Tensor, beta: float) -> Tensor:
    """Smooth L1 over rows (..., 4) with weight 1 (the positives), divided by `count`, the rows that were sampled.

    The quotient is Fast R-CNN's: it keeps the loss of an image independent of how many of its samples are positive.
    """
    loss = F.smooth_l1_loss(box_deltas, targets, beta=beta, reduction="none").sum(dim=-1)
    return (loss * weights).sum() / count


def classification_loss(class_logits: Tensor, labels: Tensor, *, weights: Tensor, count: Tensor) -> Tensor:
    """Cross-entropy of (R, K + 1) logits with labels (R,) 0..K, mean over rows with weight 1."""
    loss = F.cross_entropy(class_logits, labels, reduction="none")
    return (loss * weights).sum() / count


def mask_loss(mask_logits: Tensor, targets: Tensor, *, weights: Tensor, count: Tensor) -> Tensor:
    """Per-pixel sigmoid cross-entropy of the true class's logits (R, M, M), mean over pixels of rows with weight 1."""
    loss = F.binary_cross_entropy_with_logits(mask_logits, targets, reduction="none").mean(dim=(1, 2))
    return (loss * weights).sum() / count


def softmax_mask_loss(
    mask_logits: Tensor, targets: Tensor, channels: Tensor, *, weights: Tensor, count: Tensor
) -> Tensor:
    """Multinomial cross-entropy over all channels of (R, 1 + K, M, M) logits in each pixel (Table 2b).

    A pixel's true channel is the RoI's one, channels (R,), inside the object, targets (R, M, M) >= 0.5, and 0, the
    background, outside; mean over pixels of rows with weight 1.
    """
    true_channels = (targets >= 0.5) * channels[:, None, None]
    loss = F.cross_entropy(mask_logits, true_channels, reduction="none").mean(dim=(1, 2))
    return (loss * weights).sum() / count
