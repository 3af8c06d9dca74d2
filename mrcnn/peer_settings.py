"""How torchvision and detectron2 compute: each of their differences is a setting of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mrcnn.bodies import MSRA_INPUT, TORCHVISION_INPUT, X101_INPUT
from mrcnn.config import InputConfig, ModelConfig


def torchvision_config(found: ModelConfig, *, norm_eps: float | None = None) -> ModelConfig:
    """Settings of torchvision.models.detection for the architecture that was found.

    norm_eps: of frozen batch norm; None is the 0 that torchvision sets when it loads its COCO weights. Trained batch
        norm has 1e-5.
    """
    frozen = found.backbone.norm == "frozen_bn"
    return replace(
        found,
        backbone=replace(
            found.backbone,
            norm_eps=(norm_eps or 0.0) if frozen else 1e-5,
            frozen_stages=2 if frozen else 0,
            stride_in_1x1=False,
        ),
        rpn=replace(
            found.rpn,
            round_anchors=True,
            strides_from_grid=True,
            post_nms_top_n_train=2000,
            min_size=1e-3,
            smooth_l1_beta=1 / 9,
            loss_normalizer="sampled",
        ),
        roi=replace(found.roi, sampling_ratio=2, aligned=False, smooth_l1_beta=1 / 9, min_size=1e-2),
        mask=replace(found.mask, binary_targets=False, paste="padded"),
        keypoint=replace(found.keypoint, pixel_offset=0.0, score="logit"),
        input=replace(TORCHVISION_INPUT, resize="bilinear"),
    )


def detectron2_config(
    found: ModelConfig, *, stride_in_1x1: bool | None = None, pixels: InputConfig | None = None
) -> ModelConfig:
    """Settings of detectron2's own models for the architecture that was found.

    stride_in_1x1: None is true for ResNets with frozen batch norm, which start from MSRA's weights, else false
    pixels: order, mean and std of the channels; None is MSRA's, or those of detectron2's ResNeXt
    """
    resnext, c4 = found.backbone.name.startswith("resnext"), found.backbone.features == "c4"
    with_keypoints = found.keypoint.num_keypoints > 0
    if stride_in_1x1 is None:
        msra = found.backbone.norm == "frozen_bn" and not resnext
        stride_in_1x1 = msra and found.backbone.name not in ("resnet18", "resnet34")
    rpn = replace(
        found.rpn,
        round_anchors=False,
        strides_from_grid=False,
        post_nms_top_n_train=1500 if with_keypoints else 1000,
        min_size=0.0,
        smooth_l1_beta=0.0,
        loss_normalizer="batch_size",
    )
    if c4:
        rpn = replace(rpn, pre_nms_top_n_train=12000, pre_nms_top_n_test=6000, post_nms_top_n_train=2000)
    return replace(
        found,
        backbone=replace(found.backbone, norm_eps=1e-5, frozen_stages=2, stride_in_1x1=stride_in_1x1),
        rpn=rpn,
        roi=replace(
            found.roi,
            sampling_ratio=0,
            aligned=True,
            smooth_l1_beta=0.5 if with_keypoints else 0.0,
            min_size=0.0,
        ),
        mask=replace(found.mask, binary_targets=True, paste="continuous"),
        keypoint=replace(found.keypoint, pixel_offset=0.5, score="probability"),
        input=replace(pixels or (X101_INPUT if resnext else MSRA_INPUT), resize="pillow", size_divisor=1 if c4 else 32),
    )


def detectron2_pixels(mean: Sequence[float], std: Sequence[float]) -> InputConfig:
    """The input by detectron2's pixel_mean and pixel_std, which have the order of its channels: RGB or BGR.

    ImageNet's red is its largest mean, its blue the smallest; anything else is taken for BGR, detectron2's default.
    """
    red_first = mean[0] > mean[2]
    three = [(values[0], values[1], values[2]) for values in (mean, std)]
    return InputConfig(channels="rgb" if red_first else "bgr", mean=three[0], std=three[1])


def detectron2_settings(config: ModelConfig) -> dict[str, object]:
    """Settings by detectron2's names without which it would read the weights of `to_detectron2` wrongly."""
    return {
        "MODEL.ROI_HEADS.NUM_CLASSES": config.num_classes,
        "MODEL.RESNETS.STRIDE_IN_1X1": config.backbone.stride_in_1x1,
        "INPUT.FORMAT": config.input.channels.upper(),
        "MODEL.PIXEL_MEAN": list(config.input.mean),
        "MODEL.PIXEL_STD": list(config.input.std),
    }
