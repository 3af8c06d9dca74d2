"""Which RoIs a training step learns from, and what each should become."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrcnn.boxes import gather_boxes
from mrcnn.config import RoIConfig
from mrcnn.matching import POSITIVE, match, priorities, sample
from mrcnn.rpn import Proposals
from mrcnn.structures import Targets


@dataclass(frozen=True)
class SampledRoIs:
    """RoIs chosen for training and what each should become, (B, S, ...); positives come first."""

    boxes: Tensor
    """(B, S, 4)"""
    labels: Tensor
    """(B, S) int64, 0 for background"""
    matched_idxs: Tensor
    """(B, S) int64: the object of the same image that a positive learns from"""
    weights: Tensor
    """(B, S) float32: 0 where there is only padding"""

    def first(self, count: int) -> SampledRoIs:
        """The first `count` of each image."""
        return SampledRoIs(*(x[:, :count] for x in (self.boxes, self.labels, self.matched_idxs, self.weights)))

    @property
    def instances(self) -> tuple[Tensor, Tensor]:
        """Image and object that each of B x S RoIs was matched with, as indices into (B, N, ...)."""
        B, S = self.labels.shape
        image = torch.arange(B, device=self.labels.device)[:, None].expand(B, S)
        return image.flatten(), self.matched_idxs.flatten()


@torch.no_grad()
def sample_rois(proposals: Proposals, targets: Targets, config: RoIConfig) -> SampledRoIs:
    """Proposals and the objects' own boxes -> N RoIs an image, at most a quarter of them positive."""
    is_object = (targets.labels > 0) & ~targets.iscrowd
    boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
    valid = torch.cat([proposals.valid, is_object], dim=1)
    matched_idxs, kinds = match(
        boxes, targets, positive_iou=config.positive_iou, negative_iou=config.positive_iou, keep_best=False
    )
    idxs, kinds = sample(
        kinds.masked_fill(~valid, -1),
        priorities(~targets.seeds, boxes.shape[1]),  # ~: not the numbers that chose the anchors
        size=config.batch_size_per_image,
        positive_fraction=config.positive_fraction,
    )
    matched_idxs = matched_idxs.gather(1, idxs)
    labels = torch.zeros_like(idxs)
    if targets.labels.shape[1]:
        labels = torch.where(kinds == POSITIVE, targets.labels.gather(1, matched_idxs), 0)
    return SampledRoIs(gather_boxes(boxes, idxs), labels, matched_idxs, (kinds >= 0).to(boxes.dtype))
