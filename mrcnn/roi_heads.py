"""Box and mask heads on sampled RoIs.

The heads see the RoIs of a batch as one list. Shape letters as in structures.py; R = B x S, S RoIs an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from mrcnn import losses
from mrcnn.anchors import STRIDES
from mrcnn.backbone import conv_norm_relu
from mrcnn.boxes import clip_boxes, decode_boxes, encode_boxes
from mrcnn.config import RoIConfig
from mrcnn.matching import POSITIVE, match, priorities, sample
from mrcnn.ops import rle_roi_align, roi_align
from mrcnn.rpn import Proposals, gather_boxes
from mrcnn.structures import Targets

ROI_LEVELS = 4  # P2..P5; P6 is the RPN's alone


def assign_levels(boxes: Tensor, config: RoIConfig) -> Tensor:
    """Pyramid level of boxes (R, 4), 0 for P2 .. 3 for P5: equation 1 of the FPN paper."""
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    scale = (sides[:, 0] * sides[:, 1]).sqrt() / config.canonical_size
    return (4 + (scale + 1e-8).log2() + 1e-6).floor().clamp(2, 2 + ROI_LEVELS - 1).to(torch.int64) - 2


def pool(features: Sequence[Tensor], rois: Tensor, *, side: int, config: RoIConfig) -> Tensor:
    """RoIAlign of rois (R, 5) = image index, xyxy, each from its own level -> (R, C, side, side)."""
    return roi_align(
        features[:ROI_LEVELS],
        rois,
        assign_levels(rois[:, 1:], config),
        output_size=side,
        spatial_scale=[1.0 / stride for stride in STRIDES[:ROI_LEVELS]],
        sampling_ratio=config.sampling_ratio,
        aligned=config.aligned,
    )


def flat_rois(boxes: Tensor) -> Tensor:
    """(B, S, 4) -> (B x S, 5), the image's index first."""
    index = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([index[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


class BoxHead(nn.Module):
    """RoI features -> two fully connected layers -> class_logits (R, K + 1) and box_deltas (R, K, 4)."""

    def __init__(self, channels: int, num_classes: int, config: RoIConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * config.box_pool**2, config.box_channels)
        self.fc2 = nn.Linear(config.box_channels, config.box_channels)
        self.class_logits = nn.Linear(config.box_channels, num_classes + 1)
        self.box_deltas = nn.Linear(config.box_channels, 4 * num_classes)
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(fc.weight, a=1)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        for layer in self.children():
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        deltas = self.box_deltas(x)
        return self.class_logits(x).float(), deltas.reshape(deltas.shape[0], -1, 4).float()


class MaskHead(nn.Module):
    """RoI features -> 3x3 convolutions -> deconvolution -> mask_logits (R, K, M, M), M twice the pooled side."""

    def __init__(self, channels: int, num_classes: int, config: RoIConfig) -> None:
        super().__init__()
        widths = [channels] + [config.mask_channels] * config.mask_convs
        self.convs = nn.Sequential(*(conv_norm_relu(a, b, config.mask_norm) for a, b in pairwise(widths)))
        self.deconv = nn.ConvTranspose2d(widths[-1], config.mask_channels, 2, stride=2)
        self.mask_logits = nn.Conv2d(config.mask_channels, num_classes, 1)
        for layer in (self.deconv, self.mask_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.mask_logits(F.relu(self.deconv(self.convs(x)))).float()


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


@dataclass(frozen=True)
class BoxResult:
    """Final boxes of one image in pixels of the network's input, best first."""

    boxes: Tensor
    """(D, 4)"""
    labels: Tensor
    """(D,) int64, 1..K"""
    scores: Tensor
    """(D,)"""


class RoIHeads(nn.Module):
    """Everything after the proposals."""

    def __init__(self, channels: int, num_classes: int, config: RoIConfig) -> None:
        super().__init__()
        self.config = config
        self.box_head = BoxHead(channels, num_classes, config)
        self.mask_head = MaskHead(channels, num_classes, config)

    @torch.no_grad()
    def sample_rois(self, proposals: Proposals, targets: Targets) -> SampledRoIs:
        """Proposals and the objects' own boxes -> N RoIs an image, at most a quarter of them positive."""
        config = self.config
        is_object = (targets.labels > 0) & ~targets.iscrowd
        boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
        valid = torch.cat([proposals.valid, is_object], dim=1)
        matched = [
            match(*one, positive_iou=config.positive_iou, negative_iou=config.positive_iou, keep_best=False)
            for one in zip(boxes, targets.boxes, targets.labels, targets.iscrowd, strict=True)
        ]
        matched_idxs, kinds = (torch.stack(part) for part in zip(*matched, strict=True))
        idxs, kinds = sample(
            kinds.masked_fill(~valid, -1),
            priorities(~targets.seeds, boxes.shape[1]),  # ~: not the numbers that chose the anchors
            size=config.batch_size_per_image,
            positive_fraction=config.positive_fraction,
        )
        matched_idxs = matched_idxs.gather(1, idxs)
        is_positive = kinds == POSITIVE
        labels = torch.zeros_like(idxs)
        if targets.labels.shape[1]:
            labels = torch.where(is_positive, targets.labels.gather(1, matched_idxs), 0)
        return SampledRoIs(gather_boxes(boxes, idxs), labels, matched_idxs, (kinds >= 0).float())

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """loss_classifier, loss_box_reg and loss_mask."""
        rois = self.sample_rois(proposals, targets)
        return {
            **self._box_losses(features, rois, targets),
            **self._mask_loss(features, rois, sizes, targets),
        }

    def _box_losses(self, features: Sequence[Tensor], rois: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        config = self.config
        pooled = pool(features, flat_rois(rois.boxes), side=config.box_pool, config=config)
        class_logits, box_deltas = self.box_head(pooled)
        labels, weights = rois.labels.flatten(), rois.weights.flatten()
        goal = encode_boxes(gather_boxes(targets.boxes, rois.matched_idxs), rois.boxes, config.box_weights)
        of_class = (labels - 1).clamp(min=0)[:, None, None].expand(-1, 1, 4)
        loss_box_reg = losses.box_loss(
            box_deltas.gather(1, of_class).squeeze(1),
            goal.flatten(0, 1),
            weights=(labels > 0).float(),
            count=weights.sum(),
            beta=config.smooth_l1_beta,
        )
        return {
            "loss_classifier": losses.classification_loss(class_logits, labels, weights),
            "loss_box_reg": loss_box_reg,
        }

    def _mask_loss(
        self, features: Sequence[Tensor], rois: SampledRoIs, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        config = self.config
        most = max(int(config.batch_size_per_image * config.positive_fraction), 1)
        boxes, labels, matched_idxs = (x[:, :most] for x in (rois.boxes, rois.labels, rois.matched_idxs))
        pooled = pool(features, flat_rois(boxes), side=config.mask_pool, config=config)
        of_class = (labels.flatten() - 1).clamp(min=0)
        logits = self.mask_head(pooled)
        side = logits.shape[-1]
        logits = logits.gather(1, of_class[:, None, None, None].expand(-1, 1, side, side)).squeeze(1)
        instances = self._instances(matched_idxs, targets)
        goal = self.mask_targets(boxes, instances, sizes, targets, side=side)
        # an object that was annotated with a box alone says nothing about masks
        runs = targets.masks.offsets.diff()
        has_mask = runs[instances] > 0 if len(runs) else torch.zeros_like(instances, dtype=torch.bool)
        return {"loss_mask": losses.mask_loss(logits, goal, ((labels.flatten() > 0) & has_mask).float())}

    def _instances(self, matched_idxs: Tensor, targets: Targets) -> Tensor:
        """Which of the batch's B x N masks each of (B, S) RoIs was matched with: (B x S,)."""
        first = torch.arange(matched_idxs.shape[0], device=matched_idxs.device) * targets.boxes.shape[1]
        return (first[:, None] + matched_idxs).flatten()

    @torch.no_grad()
    def mask_targets(self, boxes: Tensor, instances: Tensor, sizes: Tensor, targets: Targets, *, side: int) -> Tensor:
        """The matched object's mask within each of boxes (B, S, 4), resampled: (B x S, side, side) float32."""
        B, S = boxes.shape[:2]
        if targets.boxes.shape[1] == 0:
            return boxes.new_zeros(B * S, side, side)
        soft = rle_roi_align(
            targets.masks,
            boxes.flatten(0, 1),
            instances,
            sizes[:, None].expand(-1, S, -1).flatten(0, 1),
            output_size=side,
            aligned=self.config.aligned,
        )
        return (soft >= 0.5).float() if self.config.binary_mask_targets else soft

    def detect(self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> list[BoxResult]:
        """Proposals -> classified, regressed, suppressed boxes, at most max_detections an image."""
        config = self.config
        pooled = pool(features, flat_rois(proposals.boxes), side=config.box_pool, config=config)
        class_logits, box_deltas = self.box_head(pooled)
        B, P = proposals.valid.shape
        scores = class_logits.softmax(dim=1)[:, 1:].reshape(B, P, -1)
        scores = torch.where(proposals.valid[..., None], scores, 0.0)
        box_deltas = box_deltas.reshape(B, P, -1, 4)
        return [self._select(scores[i], box_deltas[i], proposals.boxes[i], sizes[i : i + 1]) for i in range(B)]

    def _select(self, scores: Tensor, box_deltas: Tensor, proposals: Tensor, size: Tensor) -> BoxResult:
        config = self.config
        row, column = (scores > config.score_threshold).nonzero(as_tuple=True)
        boxes = decode_boxes(box_deltas[row, column], proposals[row], config.box_weights)
        boxes = clip_boxes(boxes[None], size)[0]
        large = ((boxes[:, 2:] - boxes[:, :2]) >= config.min_size).all(dim=1).nonzero().squeeze(1)
        row, column, boxes = row[large], column[large], boxes[large]
        keep = batched_nms(boxes, scores[row, column], column, config.nms_iou)[: config.max_detections]
        return BoxResult(boxes=boxes[keep], labels=column[keep] + 1, scores=scores[row, column][keep])

    def masks(self, features: Sequence[Tensor], found: Sequence[BoxResult]) -> list[Tensor]:
        """Mask probabilities of the predicted class over each final box: for each image (D, M, M)."""
        counts = [len(one.boxes) for one in found]
        index = torch.cat([torch.full((n, 1), float(i)) for i, n in enumerate(counts)]).to(features[0].device)
        rois = torch.cat([index, torch.cat([one.boxes for one in found])], dim=1)
        logits = self.mask_head(pool(features, rois, side=self.config.mask_pool, config=self.config))
        of_class = torch.cat([one.labels for one in found]) - 1
        probs = logits[torch.arange(len(of_class), device=logits.device), of_class].sigmoid()
        return list(probs.split(counts))
