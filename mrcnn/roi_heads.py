"""Everything after the proposals: RoI features, the heads, their losses and what they find.

The heads see the RoIs of a batch as one list. Shape letters as in structures.py; R = B x S.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from mrcnn import losses
from mrcnn.backbone import resnet, stage_channels
from mrcnn.boxes import clip_boxes, decode_boxes, encode_boxes, gather_boxes
from mrcnn.config import ModelConfig
from mrcnn.distributed import Count
from mrcnn.heads import BoxHead, FCNMaskHead, KeypointHead, MLPMaskHead
from mrcnn.inputs import readable
from mrcnn.keypoints import decode_keypoints, keypoint_loss, keypoint_targets
from mrcnn.ops import multilevel_roi_pool, rle_roi_align
from mrcnn.roi_sampling import SampledRoIs, sample_rois
from mrcnn.rpn import Proposals, large_enough
from mrcnn.structures import Targets


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
    """Box, mask and keypoint heads on RoI features of the backbone.

    Args:
        channels: of every feature level
        strides: of the levels that RoIs are read from
        config: the whole model's settings
    """

    def __init__(self, channels: int, strides: Sequence[int], config: ModelConfig) -> None:
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        self.count = Count()
        roi, mask, K = config.roi, config.mask, config.num_classes
        self.res5 = resnet(config.backbone)[1][3] if roi.head == "res5" else None
        if self.res5 is not None and config.backbone.frozen_stages == 5:
            self.res5.requires_grad_(False)
        # res5 halves the resolution
        width = channels if self.res5 is None else stage_channels(config.backbone)[3]
        box_side, mask_side = (roi.box_pool, mask.pool) if self.res5 is None else [(roi.box_pool + 1) // 2] * 2
        self.box_head = BoxHead(width, box_side, K, roi)
        outputs = (1 if mask.class_agnostic else K) + (mask.loss == "softmax")
        self.mask_head: nn.Module | None = None
        if mask.head == "fcn":
            self.mask_head = FCNMaskHead(width, outputs, mask)
        elif mask.head == "mlp":
            self.mask_head = MLPMaskHead(width, mask_side, outputs, mask)
        self.keypoint_head = KeypointHead(channels, config.keypoint) if config.keypoint.num_keypoints else None
        self.register_buffer("wanted", None, persistent=False)
        self.wanted: Tensor | None

    def find_only(self, labels: Collection[int]) -> None:
        """Detect objects of these labels (1..K) alone: others take no place among the `max_detections`."""
        wanted = torch.zeros(self.config.num_classes, dtype=torch.bool, device=next(self.parameters()).device)
        wanted[[label - 1 for label in labels]] = True
        self.wanted = wanted

    def train(self, mode: bool = True) -> RoIHeads:
        """A frozen res5 keeps its batch statistics, too."""
        super().train(mode)
        if self.res5 is not None and self.config.backbone.frozen_stages == 5:
            self.res5.eval()
        return self

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """loss_classifier, loss_box_reg, and loss_mask and loss_keypoint where there are such heads."""
        roi = self.config.roi
        rois = sample_rois(proposals, targets, roi)
        positives = rois.first(self._positive_columns(rois))
        box_features = self.roi_features(features, flat_rois(rois.boxes), side=roi.box_pool)
        found = self._box_losses(box_features, rois, targets)
        if self.mask_head is not None:
            if self.res5 is not None:  # shared: the positives' features are there already
                by_image = box_features.unflatten(0, rois.labels.shape)
                mask_features = by_image[:, : positives.labels.shape[1]].flatten(0, 1)
            else:
                mask_features = self.roi_features(features, flat_rois(positives.boxes), side=self.config.mask.pool)
            found["loss_mask"] = self._mask_loss(mask_features, positives, sizes, targets)
        if self.keypoint_head is not None:
            found["loss_keypoint"] = self._keypoint_loss(features, positives, targets)
        return found

    def _positive_columns(self, rois: SampledRoIs) -> int:
        """Columns of the sampled RoIs, at least one, beyond which none is positive: for mask and keypoint heads.

        As many as there can be, so that nothing waits for a GPU. On the CPU, where looking is free, only those that
        there are, unless rows depend on each other: batch norm's statistics would be others than on a GPU.
        """
        roi = self.config.roi
        most = max(int(roi.batch_size_per_image * roi.positive_fraction), 1)
        if readable(rois.labels) and self.config.mask.norm != "bn":
            most = min(most, max(int((rois.labels.numpy() > 0).sum(axis=1).max()), 1))
        return most

    def roi_features(self, features: Sequence[Tensor], rois: Tensor, *, side: int) -> Tensor:
        """Features of rois (R, 5) = image index, xyxy for box and mask head: pooled, and through res5 with C4."""
        pooled = self.pool(features, rois, side=side)
        return pooled if self.res5 is None else self.res5(pooled)

    def pool(self, features: Sequence[Tensor], rois: Tensor, *, side: int) -> Tensor:
        """RoI features of rois (R, 5), each from its own level -> (R, C, side, side)."""
        roi = self.config.roi
        return multilevel_roi_pool(
            features[: len(self.strides)],
            rois,
            operator=roi.operator,
            reduce=roi.reduce,
            output_size=side,
            strides=self.strides,
            sampling_ratio=roi.sampling_ratio,
            aligned=roi.aligned,
            canonical_size=roi.canonical_size,
        )

    def _box_losses(self, box_features: Tensor, rois: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        roi = self.config.roi
        class_logits, box_deltas = self.box_head(box_features)
        labels, weights = rois.labels.flatten(), rois.weights.flatten()
        gt_boxes = gather_boxes(targets.boxes, rois.matched_idxs)
        goal = encode_boxes(gt_boxes, rois.boxes, roi.box_weights, roi.box_coding).flatten(0, 1)
        count = self.count(weights.sum())
        of_class = (labels - 1).clamp(min=0)[:, None, None].expand(-1, 1, 4)
        loss_box_reg = losses.box_loss(
            box_deltas.gather(1, of_class).squeeze(1),
            goal,
            weights=(labels > 0).to(goal.dtype),
            count=count,
            beta=roi.smooth_l1_beta,
        )
        return {
            "loss_classifier": losses.classification_loss(class_logits, labels, weights=weights, count=count),
            "loss_box_reg": loss_box_reg,
        }

    def _mask_loss(self, mask_features: Tensor, rois: SampledRoIs, sizes: Tensor, targets: Targets) -> Tensor:
        assert self.mask_head is not None
        logits: Tensor = self.mask_head(mask_features)
        image, matched = rois.instances
        instances = image * targets.labels.shape[1] + matched
        goal = self.mask_targets(rois.boxes, instances, sizes, targets, side=logits.shape[-1]).to(logits.dtype)
        labels = rois.labels.flatten()
        weights = (labels > 0).to(logits.dtype) * _has_mask(targets, instances)
        count = self.count(weights.sum())
        channels = self._mask_channels(labels)
        if self.config.mask.loss == "softmax":
            return losses.softmax_mask_loss(logits, goal, channels, weights=weights, count=count)
        return losses.mask_loss(_take_channel(logits, channels), goal, weights=weights, count=count)

    def _mask_channels(self, labels: Tensor) -> Tensor:
        """The mask head's channel of each label (R,); any one for background."""
        first = int(self.config.mask.loss == "softmax")  # channel 0 is the background's
        classes = torch.zeros_like(labels) if self.config.mask.class_agnostic else (labels - 1).clamp(min=0)
        return classes + first

    @torch.no_grad()
    def mask_targets(self, boxes: Tensor, instances: Tensor, sizes: Tensor, targets: Targets, *, side: int) -> Tensor:
        """The matched object's mask within each of boxes (B, S, 4), resampled: (B x S, side, side) float32."""
        B, S = boxes.shape[:2]
        if targets.labels.shape[1] == 0:
            return boxes.new_zeros(B * S, side, side)
        soft = rle_roi_align(
            targets.masks,
            boxes.flatten(0, 1).float(),
            instances,
            sizes[:, None].expand(-1, S, -1).flatten(0, 1),
            output_size=side,
            aligned=self.config.roi.aligned,
        )
        return (soft >= 0.5).float() if self.config.mask.binary_targets else soft

    def _keypoint_loss(self, features: Sequence[Tensor], rois: SampledRoIs, targets: Targets) -> Tensor:
        assert self.keypoint_head is not None
        config = self.config.keypoint
        boxes = flat_rois(rois.boxes)
        heatmaps = self.keypoint_head(self.pool(features, boxes, side=config.pool))
        annotated = _gather_keypoints(targets, rois, config.num_keypoints)
        shifted = torch.cat([annotated[..., :2] + config.pixel_offset, annotated[..., 2:]], dim=-1)
        cells, valid = keypoint_targets(shifted, boxes[:, 1:], heatmaps.shape[-1])
        counted = (valid & (rois.labels.flatten() > 0)[:, None]).to(heatmaps.dtype)
        return keypoint_loss(heatmaps, cells, counted, count=self.count(counted.sum()))

    @torch.no_grad()
    def detect(self, features: Sequence[Tensor], proposals: Proposals, sizes: Tensor) -> list[BoxResult]:
        """Proposals -> classified, regressed, suppressed boxes, at most max_detections an image."""
        rois = flat_rois(proposals.boxes)
        class_logits, box_deltas = self.box_head(self.roi_features(features, rois, side=self.config.roi.box_pool))
        B, P = proposals.valid.shape
        scores = class_logits.softmax(dim=1)[:, 1:].reshape(B, P, -1)
        scores = torch.where(proposals.valid[..., None], scores, 0.0)
        if self.wanted is not None:
            scores = torch.where(self.wanted, scores, 0.0)
        box_deltas = box_deltas.reshape(B, P, -1, 4)
        return [self._select(scores[i], box_deltas[i], proposals.boxes[i], sizes[i : i + 1]) for i in range(B)]

    def _select(self, scores: Tensor, box_deltas: Tensor, proposals: Tensor, size: Tensor) -> BoxResult:
        roi = self.config.roi
        row, column = (scores > roi.score_threshold).nonzero(as_tuple=True)
        boxes = decode_boxes(box_deltas[row, column], proposals[row], roi.box_weights, roi.box_coding)
        boxes = clip_boxes(boxes[None], size, roi.box_coding)[0]
        large = large_enough(boxes, roi.min_size).nonzero().squeeze(1)
        row, column, boxes = row[large], column[large], boxes[large]
        keep = batched_nms(boxes, scores[row, column], column, roi.nms_iou)[: roi.max_detections]
        return BoxResult(boxes=boxes[keep], labels=column[keep] + 1, scores=scores[row, column][keep])

    @torch.no_grad()
    def masks(self, features: Sequence[Tensor], found: Sequence[BoxResult]) -> list[Tensor]:
        """Mask probabilities of the predicted class over each final box: for each image (D, M, M)."""
        assert self.mask_head is not None
        pooled = self.roi_features(features, _rois_of(found), side=self._mask_pool)
        logits: Tensor = self.mask_head(pooled)
        channels = self._mask_channels(torch.cat([one.labels for one in found]))
        if self.config.mask.loss == "softmax":
            probs = _take_channel(logits.softmax(dim=1), channels)
        else:
            probs = _take_channel(logits, channels).sigmoid()
        return list(probs.split([len(one.boxes) for one in found]))

    @property
    def _mask_pool(self) -> int:
        return self.config.mask.pool if self.res5 is None else self.config.roi.box_pool

    def heatmaps(self, features: Sequence[Tensor], found: Sequence[BoxResult]) -> list[Tensor]:
        """Keypoint heatmaps over each final box: for each image (D, keypoints, side, side) logits."""
        assert self.keypoint_head is not None
        logits = self.keypoint_head(self.pool(features, _rois_of(found), side=self.config.keypoint.pool))
        return list(logits.split([len(one.boxes) for one in found]))

    @torch.no_grad()
    def keypoints(self, features: Sequence[Tensor], found: Sequence[BoxResult]) -> list[Tensor]:
        """Keypoints of each final box, x, y in network pixels and a score: for each image (D, keypoints, 3)."""
        score = self.config.keypoint.score
        pairs = zip(self.heatmaps(features, found), found, strict=True)
        return [decode_keypoints(logits, one.boxes, score=score) for logits, one in pairs]


def flat_rois(boxes: Tensor) -> Tensor:
    """(B, S, 4) -> (B x S, 5), the image's index first."""
    index = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([index[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2).flatten(0, 1)


def _rois_of(found: Sequence[BoxResult]) -> Tensor:
    """The final boxes of all images as (R, 5)."""
    return torch.cat([torch.cat([torch.full_like(one.boxes[:, :1], i), one.boxes], 1) for i, one in enumerate(found)])


def _take_channel(maps: Tensor, channels: Tensor) -> Tensor:
    """(R, channels, M, M) at channels (R,) -> (R, M, M)."""
    index = channels[:, None, None, None].expand(-1, 1, *maps.shape[2:])
    return maps.gather(1, index).squeeze(1)


def _has_mask(targets: Targets, instances: Tensor) -> Tensor:
    """(R,) bool: the instance has run lengths. An object annotated without a mask trains none."""
    offsets = targets.masks.offsets
    if len(offsets) == 1:  # no instances at all
        return torch.zeros_like(instances, dtype=torch.bool)
    return offsets[instances + 1] > offsets[instances]


def _gather_keypoints(targets: Targets, rois: SampledRoIs, count: int) -> Tensor:
    """The matched objects' keypoints, (R, count, 3)."""
    keypoints = targets.keypoints
    if keypoints is None:
        raise ValueError(
            f"targets.keypoints is None, but the model has a head for {count} keypoints: "
            "train on data with keypoints, or set keypoint.num_keypoints to 0"
        )
    image, matched = rois.instances
    if keypoints.shape[1] == 0:
        return keypoints.new_zeros(len(image), count, 3)
    return keypoints[image, matched]
