"""Named settings to start from. Each is a change of another one; the command line changes them further."""

from __future__ import annotations

from dataclasses import replace

from jobs.config import OptimizerConfig, TrainConfig
from mrcnn.config import BackboneConfig, InputConfig, ModelConfig, RoIConfig, RPNConfig

R50_FPN = TrainConfig()
"""The paper's R-50-FPN: 16 images a step, 160k steps. Starts from an ImageNet body (--weights)."""

R101_FPN = replace(R50_FPN, model=replace(R50_FPN.model, backbone=replace(R50_FPN.model.backbone, name="resnet101")))
"""The paper's R-101-FPN."""

R18_FPN_SMALL = TrainConfig(
    model=ModelConfig(
        backbone=BackboneConfig(name="resnet18", norm="gn", frozen_stages=0, fpn_channels=128, fpn_norm="gn"),
        rpn=RPNConfig(
            pre_nms_top_n_train=500, pre_nms_top_n_test=500, post_nms_top_n_train=500, post_nms_top_n_test=300
        ),
        roi=RoIConfig(batch_size_per_image=64, box_channels=512, mask_channels=128, mask_norm="gn"),
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
        roi=RoIConfig(
            batch_size_per_image=48,
            box_channels=256,
            mask_channels=64,
            mask_convs=2,
            mask_norm="bn",
            canonical_size=112,
        ),
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

PRESETS = {"r50_fpn": R50_FPN, "r101_fpn": R101_FPN, "r18_fpn_small": R18_FPN_SMALL, "toy": TOY}
