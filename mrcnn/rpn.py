"""Region proposal network (arXiv 1506.01497): on a pyramid with one anchor scale a level, or on one map with all.

Shape letters as in structures.py; A is the anchors of all levels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrcnn import losses
from mrcnn.anchors import grid_anchors, level_anchors
from mrcnn.backbone import spatial_sizes
from mrcnn.boxes import clip_boxes, decode_boxes, encode_boxes, gather_boxes
from mrcnn.config import RPNConfig
from mrcnn.distributed import Count
from mrcnn.matching import POSITIVE, match, priorities, sample
from mrcnn.ops import nms
from mrcnn.structures import Targets, _OnDevice, full_precision

BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Proposals(_OnDevice):
    """Proposals of a batch, best first, padded."""

    boxes: Tensor
    """(B, P, 4) xyxy, zeros where there is only padding"""
    scores: Tensor
    """(B, P) objectness_logits, zeros where there is only padding"""
    valid: Tensor
    """(B, P) bool"""


class RPN(nn.Module):
    """Objectness and box of every anchor, and the best of them as proposals.

    Args:
        channels: of every feature level
        strides: of the feature levels
        config: every setting
    """

    def __init__(self, channels: int, strides: Sequence[int], config: RPNConfig) -> None:
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        self.count = Count()
        cells = level_anchors(config, len(strides))
        for level, cell in enumerate(cells):  # buffers, so that they are on the model's device already
            self.register_buffer(f"cell_anchors_{level}", cell, persistent=False)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.convs))
        self.objectness = nn.Conv2d(channels, len(cells[0]), 1)
        self.deltas = nn.Conv2d(channels, 4 * len(cells[0]), 1)
        for layer in (*self.convs, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        features: Sequence[Tensor],
        sizes: Tensor,
        image_shape: tuple[int, int],
        targets: Targets | None = None,
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals for images of sizes (B, 2), padded to image_shape (H, W); with targets also the two RPN losses."""
        anchors = self.anchors(features, image_shape)
        logits, deltas = self.head(features)
        found = self.propose(anchors, logits, deltas, sizes)
        return found, {} if targets is None else self._losses(anchors, logits, deltas, targets)

    def losses(self, features: Sequence[Tensor], image_shape: tuple[int, int], targets: Targets) -> dict[str, Tensor]:
        """loss_objectness and loss_rpn_box_reg alone."""
        return self._losses(self.anchors(features, image_shape), *self.head(features), targets)

    def anchors(self, features: Sequence[Tensor], image_shape: tuple[int, int]) -> list[Tensor]:
        """Anchors of each level, (A_l, 4)."""
        cells: list[Tensor] = [getattr(self, f"cell_anchors_{level}") for level in range(len(features))]
        grids = spatial_sizes(features)
        strides = [(stride, stride) for stride in self.strides]
        if self.config.strides_from_grid:
            strides = [(image_shape[0] // height, image_shape[1] // width) for height, width in grids]
        return grid_anchors(cells, grids, strides)

    def head(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each level objectness_logits (B, A_l) and box_deltas (B, A_l, 4), ordered as the anchors."""
        logits, deltas = [], []
        for hidden in features:
            for conv in self.convs:
                hidden = F.relu(conv(hidden))
            logits.append(full_precision(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1)))
            delta = self.deltas(hidden).permute(0, 2, 3, 1)
            deltas.append(full_precision(delta.reshape(delta.shape[0], -1, 4)))
        return logits, deltas

    @torch.no_grad()
    def propose(
        self, anchors: Sequence[Tensor], logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Tensor
    ) -> Proposals:
        """Best anchors of each level -> boxes -> NMS within a level -> best of the image."""
        config = self.config
        pre_nms = config.pre_nms_top_n_train if self.training else config.pre_nms_top_n_test
        post_nms = config.post_nms_top_n_train if self.training else config.post_nms_top_n_test
        boxes, scores, levels = [], [], []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            top, idxs = logit.topk(min(pre_nms, logit.shape[1]), dim=1)
            boxes.append(decode_boxes(gather_boxes(delta, idxs), anchor[idxs], BOX_WEIGHTS, config.box_coding))
            scores.append(top)
            levels.append(torch.full_like(idxs, level))
        candidates = clip_boxes(torch.cat(boxes, dim=1), sizes, config.box_coding)
        ranks = torch.cat(scores, dim=1).masked_fill(~large_enough(candidates, config.min_size), -torch.inf)
        idxs, valid = nms(candidates, ranks, torch.cat(levels, dim=1), iou_threshold=config.nms_iou, top_n=post_nms)
        return Proposals(
            boxes=gather_boxes(candidates, idxs).masked_fill(~valid[..., None], 0.0),
            scores=ranks.gather(1, idxs).masked_fill(~valid, 0.0),
            valid=valid,
        )

    def _losses(
        self, anchors_of: list[Tensor], logits_of: list[Tensor], deltas_of: list[Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        """From anchors and outputs of every level."""
        anchors, logits, deltas = torch.cat(anchors_of), torch.cat(logits_of, dim=1), torch.cat(deltas_of, dim=1)
        config = self.config
        matched_idxs, kinds = match(
            anchors[None],
            targets,
            positive_iou=config.positive_iou,
            negative_iou=config.negative_iou,
            keep_best=True,
        )
        idxs, kinds = sample(
            kinds,
            priorities(targets.seeds, anchors.shape[0]),
            size=config.batch_size_per_image,
            positive_fraction=config.positive_fraction,
        )
        is_object, weights = kinds == POSITIVE, (kinds >= 0).to(logits.dtype)
        sampled = weights.sum()
        if config.loss_normalizer == "batch_size":
            sampled = torch.full_like(sampled, config.batch_size_per_image * len(kinds))
        count = self.count(sampled)
        box_targets = encode_boxes(
            gather_boxes(targets.boxes, matched_idxs.gather(1, idxs)), anchors[idxs], BOX_WEIGHTS, config.box_coding
        )
        return {
            "loss_objectness": losses.objectness_loss(logits.gather(1, idxs), is_object, weights=weights, count=count),
            "loss_rpn_box_reg": losses.box_loss(
                gather_boxes(deltas, idxs),
                box_targets,
                weights=is_object.to(deltas.dtype),
                count=count,
                beta=config.smooth_l1_beta,
            ),
        }


def large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """(..., 4) -> (...): both sides have some length, and at least min_size."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return ((sides >= min_size) & (sides > 0)).all(dim=-1)
