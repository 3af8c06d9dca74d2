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

R50_FPN = TrainConfig()
"""R-50-FPN: 16 images a step, 160k steps, 512 RoIs of an image in training, 1000 proposals at inference."""


def with_backbone(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The same with other settings of the backbone."""
    return replace(config, model=replace(config.model, backbone=replace(config.model.backbone, **changes)))


def with_roi(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The same with other settings of the RoIs."""
    return replace(config, model=replace(config.model, roi=replace(config.model.roi, **changes)))


def with_mask(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The same with other settings of the mask head."""
    return replace(config, model=replace(config.model, mask=replace(config.model.mask, **changes)))


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

R50_C5 = TrainConfig(
    model=ModelConfig(
        backbone=BackboneConfig(features="c5"), rpn=SINGLE_MAP_RPN, roi=RoIConfig(batch_size_per_image=64)
    )
)
"""R-50-C5 of Table 2d: the FPN's heads on res5 at stride 32. The paper does not give its numbers of RoIs: C4's."""


def with_bodies(name: str, r50: TrainConfig) -> dict[str, TrainConfig]:
    """A feature extractor's presets for all bodies. ResNeXt-101 takes 8 images a step, which makes the learning rate
    the paper's 0.01."""
    resnet = {f"r{depth}_{name}": with_backbone(r50, name=f"resnet{depth}") for depth in (18, 34, 50, 101)}
    resnext = {
        f"x101_{groups}_{name}": replace(with_backbone(r50, name=f"resnext101_{groups}"), global_batch=8)
        for groups in ("32x8d", "64x4d")
    }
    return resnet | resnext


FASTER_RCNN_R50_FPN = with_mask(R50_FPN, head="none")
"""Faster R-CNN with RoIAlign and R-50-FPN (Table 3)."""

KEYPOINT_RCNN_R50_FPN = replace(
    R50_FPN,
    model=replace(
        FASTER_RCNN_R50_FPN.model, num_classes=1, keypoint=KeypointConfig(num_keypoints=17, pixel_offset=0.5)
    ),
    optimizer=OptimizerConfig(decay_at=(60 / 90, 80 / 90)),
    steps=90_000,
    jitter_sides=(640, 672, 704, 736, 768, 800),
)
"""Keypoints of COCO's persons with R-50-FPN: 90k steps, the rate cut at 60k and 80k, shorter sides of 640 to 800 in
training. COCO's coordinates are pixel indices, which the offset of half a pixel makes continuous."""

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
    "r18_fpn",
    "r34_fpn",
    "r50_fpn",
    "r101_fpn",
    "x101_32x8d_fpn",
    "x101_64x4d_fpn",
    "r18_c4",
    "r34_c4",
    "r50_c4",
    "r101_c4",
    "x101_32x8d_c4",
    "x101_64x4d_c4",
    "r18_c5",
    "r34_c5",
    "r50_c5",
    "r101_c5",
    "x101_32x8d_c5",
    "x101_64x4d_c5",
    "r50_fpn_bn",
    "r50_fpn_sync_bn",
    "r50_fpn_gn",
    "r50_c4_softmax",
    "r50_c4_agnostic",
    "r50_c4_roi_align_max",
    "r50_c4_roi_warp",
    "r50_c4_roi_warp_max",
    "r50_c4_roi_pool",
    "r50_c5_roi_pool",
    "r50_fpn_precise_roi_pool",
    "r50_fpn_mlp2",
    "r50_fpn_mlp3",
    "faster_rcnn_r50_fpn",
    "keypoint_rcnn_r50_fpn",
    "keypoint_mask_rcnn_r50_fpn",
    "r18_fpn_small",
    "toy",
]

PRESETS: dict[str, TrainConfig] = {
    **with_bodies("fpn", R50_FPN),
    **with_bodies("c4", R50_C4),
    **with_bodies("c5", R50_C5),
    # other normalisations than the frozen batch norm of all others; group norm starts from scratch
    "r50_fpn_bn": with_backbone(R50_FPN, norm="bn"),
    "r50_fpn_sync_bn": with_backbone(R50_FPN, norm="sync_bn"),
    "r50_fpn_gn": with_mask(with_backbone(R50_FPN, norm="gn", fpn_norm="gn", frozen_stages=0), norm="gn"),
    # Table 2b: classes that compete for every pixel of a mask; and one mask for all classes
    "r50_c4_softmax": with_mask(R50_C4, loss="softmax"),
    "r50_c4_agnostic": with_mask(R50_C4, class_agnostic=True),
    # Tables 2c and 2d: what takes features out of a map; precise is PrRoIPool, younger than the paper
    "r50_c4_roi_align_max": with_roi(R50_C4, reduce="max"),
    "r50_c4_roi_warp": with_roi(R50_C4, operator="warp"),
    "r50_c4_roi_warp_max": with_roi(R50_C4, operator="warp", reduce="max"),
    "r50_c4_roi_pool": with_roi(R50_C4, operator="pool"),
    "r50_c5_roi_pool": with_roi(R50_C5, operator="pool"),
    "r50_fpn_precise_roi_pool": with_roi(R50_FPN, operator="precise"),
    # Table 2e: fully connected mask heads of 1024, 1024 and 1024, 1024, 1024
    "r50_fpn_mlp2": with_mask(R50_FPN, head="mlp", fcs=2),
    "r50_fpn_mlp3": with_mask(R50_FPN, head="mlp", fcs=3),
    # boxes only, Table 3; keypoints alone and with masks, Tables 4 to 6
    "faster_rcnn_r50_fpn": FASTER_RCNN_R50_FPN,
    "keypoint_rcnn_r50_fpn": KEYPOINT_RCNN_R50_FPN,
    "keypoint_mask_rcnn_r50_fpn": with_mask(KEYPOINT_RCNN_R50_FPN, head="fcn"),
    "r18_fpn_small": R18_FPN_SMALL,
    "toy": TOY,
}
