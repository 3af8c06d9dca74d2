"""Region proposal network (arXiv 1506.01497) on a feature pyramid: one anchor scale a level, three ratios.

Shape letters as in structures.py; A is the anchors of all levels of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from mrcnn import losses
from mrcnn.anchors import grid_anchors
from mrcnn.backbone import spatial_sizes
from mrcnn.boxes import clip_boxes, decode_boxes, encode_boxes
from mrcnn.config import RPNConfig
from mrcnn.matching import POSITIVE, match, priorities, sample
from mrcnn.structures import Targets

BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Proposals:
    """Proposals of a batch, best first, padded."""

    boxes: Tensor
    """(B, P, 4) xyxy, zeros where there is only padding"""
    valid: Tensor
    """(B, P) bool"""


class RPN(nn.Module):
    """Objectness and box of every anchor, and the best of them as proposals."""

    def __init__(self, channels: int, config: RPNConfig) -> None:
        super().__init__()
        self.config = config
        ratios = len(config.aspect_ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, ratios, 1)
        self.deltas = nn.Conv2d(channels, 4 * ratios, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self, features: Sequence[Tensor], sizes: Tensor, targets: Targets | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals from P2..P6 for images of sizes (B, 2), and with targets the two RPN losses."""
        anchors = grid_anchors(spatial_sizes(features), self.config, features[0].device)
        logits, deltas = self.head(features)
        found = self.propose(anchors, logits, deltas, sizes)
        if targets is None:
            return found, {}
        return found, self.losses(torch.cat(anchors), torch.cat(logits, 1), torch.cat(deltas, 1), targets)

    def head(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each level objectness_logits (B, A_l) and box_deltas (B, A_l, 4), ordered as the anchors."""
        logits, deltas = [], []
        for feature in features:
            hidden = F.relu(self.conv(feature))
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1).float())
            delta = self.deltas(hidden).permute(0, 2, 3, 1)
            deltas.append(delta.reshape(delta.shape[0], -1, 4).float())
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
            chosen = delta.gather(1, idxs[..., None].expand(-1, -1, 4))
            boxes.append(decode_boxes(chosen, anchor[idxs], BOX_WEIGHTS))
            scores.append(top)
            levels.append(torch.full_like(idxs, level))
        all_boxes = clip_boxes(torch.cat(boxes, dim=1), sizes)
        return self._nms(all_boxes, torch.cat(scores, dim=1), torch.cat(levels, dim=1), post_nms)

    def _nms(self, boxes: Tensor, scores: Tensor, levels: Tensor, post_nms: int) -> Proposals:
        sides = boxes[..., 2:] - boxes[..., :2]
        large = (sides >= self.config.min_size).all(dim=-1) & scores.isfinite()
        kept = torch.zeros(boxes.shape[0], min(post_nms, boxes.shape[1]), 4, device=boxes.device)
        valid = torch.zeros(kept.shape[:2], dtype=torch.bool, device=boxes.device)
        for i in range(boxes.shape[0]):
            candidates = boxes[i][large[i]]
            keep = batched_nms(candidates, scores[i][large[i]], levels[i][large[i]], self.config.nms_iou)[:post_nms]
            kept[i, : len(keep)] = candidates[keep]
            valid[i, : len(keep)] = True
        return Proposals(boxes=kept, valid=valid)

    def losses(self, anchors: Tensor, logits: Tensor, deltas: Tensor, targets: Targets) -> dict[str, Tensor]:
        """loss_objectness and loss_rpn_box_reg over the sampled anchors of anchors (A, 4)."""
        config = self.config
        ground_truth = zip(targets.boxes, targets.labels, targets.iscrowd, strict=True)
        matched = [
            match(
                anchors,
                *gt,
                positive_iou=config.positive_iou,
                negative_iou=config.negative_iou,
                keep_best=True,
            )
            for gt in ground_truth
        ]
        matched_idxs, kinds = (torch.stack(part) for part in zip(*matched, strict=True))
        idxs, kinds = sample(
            kinds,
            priorities(targets.seeds, anchors.shape[0]),
            size=config.batch_size_per_image,
            positive_fraction=config.positive_fraction,
        )
        is_object, weights = kinds == POSITIVE, (kinds >= 0).float()
        loss_objectness = losses.objectness_loss(logits.gather(1, idxs), is_object, weights)
        box_targets = encode_boxes(
            gather_boxes(targets.boxes, matched_idxs.gather(1, idxs)), anchors[idxs], BOX_WEIGHTS
        )
        loss_box = losses.box_loss(
            gather_boxes(deltas, idxs),
            box_targets,
            weights=is_object.float(),
            count=weights.sum(),
            beta=config.smooth_l1_beta,
        )
        return {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}


def gather_boxes(boxes: Tensor, idxs: Tensor) -> Tensor:
    """boxes (B, N, 4) at idxs (B, S) -> (B, S, 4); zeros where there are no boxes at all."""
    if boxes.shape[1] == 0:
        return boxes.new_zeros(*idxs.shape, 4)
    return boxes.gather(1, idxs[..., None].expand(-1, -1, 4))
