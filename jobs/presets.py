"""Named settings to start from. Each is a change of another one; the command line changes them further.

The paper's variants (arXiv 1703.06870v3) are set up to start from torchvision's ImageNet bodies (--weights): stride in
the 3x3, RGB, frozen batch norm, stem and res2 as loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from jobs.config import OptimizerConfig, TrainConfig
from mrcnn.config import (
    BackboneConfig,
    InputConfig,
    KeypointConfig,
    MaskConfig,
    ModelConfig,
    RoIConfig,
    RPNConfig,
)

DeepBody = Literal["resnet101", "resnext101_32x8d", "resnext101_64x4d"]

R50_FPN = TrainConfig()
"""R-50-FPN: 16 images a step, 160k steps, 512 RoIs of an image in training, 1000 proposals at inference."""


def with_body(config: TrainConfig, name: DeepBody) -> TrainConfig:
    """The same with another body."""
    return replace(config, model=replace(config.model, backbone=replace(config.model.backbone, name=name)))


def with_mask(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The same with other settings of the mask head."""
    return replace(config, model=replace(config.model, mask=replace(config.model.mask, **changes)))


R101_FPN = with_body(R50_FPN, "resnet101")
"""R-101-FPN."""

X101_32X8D_FPN = replace(with_body(R50_FPN, "resnext101_32x8d"), global_batch=8)
"""X-101-FPN with 32 groups of 8: 8 images a step, so that the learning rate is the paper's 0.01."""

X101_64X4D_FPN = with_body(X101_32X8D_FPN, "resnext101_64x4d")
"""X-101-FPN with 64 groups of 4."""

SINGLE_MAP_RPN = RPNConfig(
    pre_nms_top_n_train=12000, pre_nms_top_n_test=6000, post_nms_top_n_train=2000, post_nms_top_n_test=300
)
"""15 anchors at each place of one map. The paper has 300 proposals at inference; the numbers before NMS and in training
are detectron2's."""

R50_C4 = TrainConfig(
    model=ModelConfig(
        backbone=BackboneConfig(features="c4"),
        rpn=SINGLE_MAP_RPN,
        roi=RoIConfig(batch_size_per_image=64, head="res5", box_pool=14),
        mask=MaskConfig(convs=0),
    )
)
"""R-50-C4: res5 is the head of boxes and masks, 64 RoIs of an image in training, 14x14 masks."""

R101_C4 = with_body(R50_C4, "resnet101")
"""R-101-C4."""

R50_C5 = TrainConfig(
    model=ModelConfig(
        backbone=BackboneConfig(features="c5"), rpn=SINGLE_MAP_RPN, roi=RoIConfig(batch_size_per_image=64)
    )
)
"""R-50-C5 of Table 2d: the FPN's heads on res5 at stride 32. The paper does not give its numbers of RoIs: C4's."""

R50_FPN_MLP = with_mask(R50_FPN, head="mlp", fcs=2)
"""R-50-FPN with fully connected mask heads of 1024, 1024 (Table 2e); the deeper one has --model.mask.fcs 3."""

R50_C4_SOFTMAX = with_mask(R50_C4, loss="softmax")
"""R-50-C4 where classes compete for every pixel of a mask (Table 2b)."""

R50_C4_AGNOSTIC = with_mask(R50_C4, class_agnostic=True)
"""R-50-C4 with one mask for all classes."""

FASTER_RCNN_R50_FPN = with_mask(R50_FPN, head="none")
"""Faster R-CNN with RoIAlign and R-50-FPN (Table 3)."""

KEYPOINT_RCNN_R50_FPN = replace(
    R50_FPN,
    model=replace(
        FASTER_RCNN_R50_FPN.model, num_classes=1, keypoint=KeypointConfig(num_keypoints=17, pixel_offset=0.5)
    ),
    optimizer=OptimizerConfig(decay_at=(60 / 90, 80 / 90)),
    steps=90_000,
)
"""Keypoints of COCO's persons with R-50-FPN: 90k steps, the rate cut at 60k and 80k. COCO's coordinates are pixel
indices, which the offset of half a pixel makes continuous."""

KEYPOINT_MASK_RCNN_R50_FPN = with_mask(KEYPOINT_RCNN_R50_FPN, head="fcn")
"""Keypoints and masks of persons together (Table 5)."""

R18_FPN_SMALL = TrainConfig(
    model=ModelConfig(
        backbone=BackboneConfig(name="resnet18", norm="gn", frozen_stages=0, fpn_channels=128, fpn_norm="gn"),
        rpn=RPNConfig(
            pre_nms_top_n_train=500, pre_nms_top_n_test=500, post_nms_top_n_train=500, post_nms_top_n_test=300
        ),
        roi=RoIConfig(batch_size_per_image=64, box_channels=512),
        mask=MaskConfig(channels=128, norm="gn"),
        input=InputConfig(shorter_side=320, longer_side=533),
    ),
    optimizer=OptimizerConfig(base_lr=0.08, warmup_steps=20, clip_norm=10.0),
    steps=2000,
    global_batch=4,
    evaluate_every=1000,
    checkpoint_every=500,
)
"""ResNet-18 at 320 pixels with group norm, from scratch: to try things on a laptop, not for accuracy."""

TOY = TrainConfig(
    model=ModelConfig(
        backbone=BackboneConfig(name="resnet18", norm="bn", frozen_stages=0, fpn_channels=64, fpn_norm="bn"),
        rpn=RPNConfig(
            anchor_sizes=(16.0, 32.0, 64.0, 96.0, 128.0),
            batch_size_per_image=64,
            pre_nms_top_n_train=200,
            pre_nms_top_n_test=200,
            post_nms_top_n_train=200,
            post_nms_top_n_test=100,
        ),
        roi=RoIConfig(batch_size_per_image=48, box_channels=256, canonical_size=112),
        mask=MaskConfig(channels=64, convs=2, norm="bn"),
        input=InputConfig(shorter_side=128, longer_side=256),
    ),
    optimizer=OptimizerConfig(base_lr=0.04, warmup_steps=50, decay_at=(0.7, 0.9), clip_norm=10.0),
    steps=600,
    global_batch=8,
    log_every=20,
    evaluate_every=300,
    checkpoint_every=150,
)
"""The demo's: learns the toy data set from scratch on two CPU cores in minutes."""

Preset = Literal[
    "r50_fpn",
    "r101_fpn",
    "x101_32x8d_fpn",
    "x101_64x4d_fpn",
    "r50_c4",
    "r101_c4",
    "r50_c5",
    "r50_fpn_mlp",
    "r50_c4_softmax",
    "r50_c4_agnostic",
    "faster_rcnn_r50_fpn",
    "keypoint_rcnn_r50_fpn",
    "keypoint_mask_rcnn_r50_fpn",
    "r18_fpn_small",
    "toy",
]

PRESETS: dict[str, TrainConfig] = {
    "r50_fpn": R50_FPN,
    "r101_fpn": R101_FPN,
    "x101_32x8d_fpn": X101_32X8D_FPN,
    "x101_64x4d_fpn": X101_64X4D_FPN,
    "r50_c4": R50_C4,
    "r101_c4": R101_C4,
    "r50_c5": R50_C5,
    "r50_fpn_mlp": R50_FPN_MLP,
    "r50_c4_softmax": R50_C4_SOFTMAX,
    "r50_c4_agnostic": R50_C4_AGNOSTIC,
    "faster_rcnn_r50_fpn": FASTER_RCNN_R50_FPN,
    "keypoint_rcnn_r50_fpn": KEYPOINT_RCNN_R50_FPN,
    "keypoint_mask_rcnn_r50_fpn": KEYPOINT_MASK_RCNN_R50_FPN,
    "r18_fpn_small": R18_FPN_SMALL,
    "toy": TOY,
}
