"""torchvision's Mask R-CNN with the architecture of a preset, and ours with its weights: for comparing speeds.

Both compute as torchvision does (RoIAlign, anchors, pasting, resizing): what differs is whose code computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from mrcnn.config import ModelConfig
from mrcnn.model import MaskRCNN
from mrcnn.peers import from_torchvision

NORM_EPS = 1e-5  # torchvision's own, of layers that no COCO weights were loaded into
NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "frozen_bn": FrozenBatchNorm2d,
    "gn": partial(nn.GroupNorm, 32),
}

# Of the outputs that `find_objects` makes; a delta of 2 moves a box by a fifth of its side
OBJECTNESS_STD, PROPOSAL_STD, LOGIT_STD, BOX_STD = 1.0, 0.4, 3.0, 2.0
MASK_STD, MASK_MEAN = 1.0, 1.5
CANDIDATES = 50


def torchvision_model(config: ModelConfig) -> TorchvisionMaskRCNN:
    """torchvision's model with the body, pyramid, anchors, heads and sizes of a setting of ours, in evaluation mode.

    Weights are random by torch's seed. What torchvision has no setting for is as torchvision has it.
    """
    _check_expressible(config)
    rpn, roi, mask = config.rpn, config.roi, config.mask
    channels, classes = config.backbone.fpn_channels, config.num_classes + 1
    model = TorchvisionMaskRCNN(
        _backbone(config),
        min_size=config.input.shorter_side,
        max_size=config.input.longer_side,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in rpn.anchor_sizes), (rpn.aspect_ratios,) * 5),
        rpn_pre_nms_top_n_test=rpn.pre_nms_top_n_test,
        rpn_post_nms_top_n_test=rpn.post_nms_top_n_test,
        box_head=TwoMLPHead(channels * roi.box_pool**2, roi.box_channels),
        box_predictor=FastRCNNPredictor(roi.box_channels, classes),
        box_detections_per_img=roi.max_detections,
        mask_head=MaskRCNNHeads(channels, (mask.channels,) * mask.convs, 1, norm_layer=NORMS[mask.norm]),
        mask_predictor=MaskRCNNPredictor(mask.channels, mask.channels, classes),
    )
    return model.eval()


def _check_expressible(config: ModelConfig) -> None:
    backbone, roi = config.backbone, config.roi
    assert (backbone.features, roi.head, config.mask.head) == ("fpn", "separate", "fcn")
    assert {backbone.norm, backbone.fpn_norm, config.mask.norm} <= NORMS.keys()
    assert not config.mask.class_agnostic
    assert (roi.box_convs, roi.box_fcs, roi.canonical_size) == (0, 2, 224.0)


def _backbone(config: ModelConfig) -> BackboneWithFPN:
    given = config.backbone
    body = getattr(torchvision.models, given.name)(weights=None, norm_layer=NORMS[given.norm])
    widest = body.fc.in_features
    widths = [widest // 8, widest // 4, widest // 2, widest]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    return BackboneWithFPN(body, layers, widths, given.fpn_channels, norm_layer=NORMS[given.fpn_norm])


def ours_of(peer: TorchvisionMaskRCNN, config: ModelConfig) -> MaskRCNN:
    """The same model as ours: its weights converted, and what no tensor tells taken from the setting."""
    found = from_torchvision(peer.state_dict(), norm_eps=NORM_EPS)
    changed: dict[str, Any] = {
        "input": _with(found.config.input, config.input, "shorter_side", "longer_side"),
        "rpn": _with(found.config.rpn, config.rpn, "anchor_sizes", "aspect_ratios", "pre_nms_top_n_test",
                     "post_nms_top_n_test"),
        "roi": _with(found.config.roi, config.roi, "max_detections"),
    }  # fmt: skip
    return replace(found, config=replace(found.config, **changed)).build()


def _with(found: Any, given: Any, *names: str) -> Any:
    return replace(found, **{name: getattr(given, name) for name in names})


@torch.no_grad()
def find_objects(peer: TorchvisionMaskRCNN, image: Tensor) -> None:
    """Change the last layers of a model with random weights so that it finds things as a trained one does.

    By what the layers give for an image, (3, H, W) from 0 to 1, weights and biases are scaled and shifted: the outputs
    of the RPN and of the box and mask heads get the spreads below, every class the same mean, and background so much
    more that CANDIDATES scores of the image are above the threshold before NMS. On photographs there are then some 10
    to 100 detections, of 20 to 100 pixels mostly, whose masks fill most of their boxes and are as long in run lengths
    as COCO's.
    """
    heads: Any = peer.roi_heads
    images, _ = peer.transform([image])
    features = peer.backbone(images.tensors)
    hidden = [peer.rpn.head.conv(level) for level in features.values()]
    _spread(peer.rpn.head.cls_logits, hidden, OBJECTNESS_STD)
    _spread(peer.rpn.head.bbox_pred, hidden, PROPOSAL_STD)
    proposals, _ = peer.rpn(images, features)
    rois = heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes))
    logits = _spread(heads.box_predictor.cls_score, [rois], LOGIT_STD)
    heads.box_predictor.cls_score.bias[0] += _background(logits, heads.score_thresh)
    _spread(heads.box_predictor.bbox_pred, [rois], BOX_STD)
    boxes = [found["boxes"] for found in heads(features, proposals, images.image_sizes)[0]]
    masks = heads.mask_head(heads.mask_roi_pool(features, boxes, images.image_sizes))
    *layers, last = heads.mask_predictor
    _spread(last, [nn.Sequential(*layers)(masks)], MASK_STD, mean=MASK_MEAN)


def _spread(layer: Any, inputs: Sequence[Tensor], std: float, *, mean: float = 0.0) -> Tensor:
    """Give the outputs of a layer a mean for each channel, and a standard deviation over all. Returns (N, C)."""
    outputs = torch.cat([layer(each).movedim(1, -1).flatten(0, -2) for each in inputs])
    means = outputs.mean(0)
    scale = std / (outputs - means).std()
    layer.weight *= scale
    layer.bias.copy_((layer.bias - means) * scale + mean)
    return (outputs - means) * scale + mean


def _background(logits: Tensor, threshold: float) -> float:
    """What to add to background's logit, in column 0, for CANDIDATES scores above the threshold; by halving."""
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        scores = (logits + torch.eye(1, logits.shape[1]) * middle).softmax(dim=1)[:, 1:]
        low, high = (middle, high) if (scores > threshold).sum() > CANDIDATES else (low, middle)
    return high
