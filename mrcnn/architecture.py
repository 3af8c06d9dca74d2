"""The settings that can be read off a model's tensors: their names (ours) and shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from mrcnn.config import BackboneConfig, KeypointConfig, MaskConfig, ModelConfig, RoIConfig, RPNConfig
from mrcnn.model import MaskRCNN

State = Mapping[str, Tensor]

BODIES: dict[tuple[int, bool, tuple[int, ...]], Any] = {
    (2, False, (64, 64)): "resnet18",
    (6, False, (64, 64)): "resnet34",
    (6, True, (64, 64)): "resnet50",
    (23, True, (64, 64)): "resnet101",
    (23, True, (256, 8)): "resnext101_32x8d",
    (23, True, (256, 4)): "resnext101_64x4d",
}
"""Blocks of res4, whether they have a third convolution, channels in and out of res2's first 3x3 -> the body."""


def architecture(state: State) -> ModelConfig:
    """Settings of the model with these tensors; what tensors do not tell keeps its default.

    Raises:
        ValueError: for a model that ours cannot be, naming what says so.
    """
    c4 = has(state, "roi_heads.res5")
    num_classes = _shape(state, "roi_heads.box_head.class_logits.weight")[0] - 1
    return ModelConfig(
        num_classes=num_classes,
        backbone=_backbone(state, c4=c4),
        rpn=_rpn(state, c4=c4),
        roi=_roi(state, c4=c4),
        mask=_mask(state, c4=c4, num_classes=num_classes),
        keypoint=_keypoint(state),
    )


def norm_of(names: Collection[str], part: str) -> Any:
    """Normalisation with the tensors `part`.*: bn, frozen_bn, gn or none."""
    if f"{part}.num_batches_tracked" in names:
        return "bn"
    if f"{part}.running_mean" in names:
        return "frozen_bn"
    return "gn" if f"{part}.weight" in names else "none"


def has(names: Collection[str], part: str) -> bool:
    """There is a tensor within this part of the model."""
    return any(name.startswith(f"{part}.") for name in names)


def check_complete(state: State, config: ModelConfig, parts: Mapping[str, str]) -> None:
    """Raise ValueError unless a model of ours with these settings has exactly these tensors, in these shapes.

    parts: our names of parts -> the peer's, for the message
    """

    def theirs(name: str) -> str:
        part, _, word = name.rpartition(".")
        return f"{parts.get(part, part)}.{word}"

    with torch.device("meta"):
        expected = MaskRCNN(config).state_dict()
    missing = [name for name in expected if name not in state]
    left_over = [name for name in state if name not in expected]
    if missing or left_over:
        raise ValueError(
            f"the weights do not make up a model: {len(missing)} tensors are missing {[*map(theirs, missing[:3])]}, "
            f"{len(left_over)} have no place {[*map(theirs, left_over[:3])]}: give a whole checkpoint"
        )
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{theirs(name)} has shape {tuple(state[name].shape)}, but {tuple(value.shape)} fits the "
                "other tensors: this variant of the model is not supported"
            )


def _backbone(state: State, *, c4: bool) -> BackboneConfig:
    three = has(state, "backbone.stages.0.0.conv3")
    conv = _shape(state, "backbone.stages.0.0.conv2.weight")[:2]
    blocks = _count(state, r"backbone\.stages\.2\.(\d+)\.")
    if (blocks, three, conv) not in BODIES:
        raise ValueError(
            f"the body has {blocks} blocks in res4 and channels {conv} in res2's 3x3 convolutions, "
            f"which is none of {', '.join(BODIES.values())}: no other body is supported"
        )
    lateral = "backbone.lateral.0"
    fpn_norm = norm_of(state, f"{lateral}.1")
    if c4:
        return BackboneConfig(name=BODIES[blocks, three, conv], features="c4", norm=norm_of(state, "backbone.stem.1"))
    conv_of = lateral if fpn_norm == "none" else f"{lateral}.0"
    return BackboneConfig(
        name=BODIES[blocks, three, conv],
        norm=norm_of(state, "backbone.stem.1"),
        fpn_channels=_shape(state, f"{conv_of}.weight")[0],
        fpn_norm=fpn_norm,
    )


def _rpn(state: State, *, c4: bool) -> RPNConfig:
    config = RPNConfig(convs=_count(state, r"rpn\.convs\.(\d+)\."))
    anchors = _shape(state, "rpn.objectness.weight")[0]
    expected = len(config.aspect_ratios) * (len(config.anchor_sizes) if c4 else 1)
    if anchors != expected:
        raise ValueError(f"the RPN has {anchors} anchors at each place, but {expected} are supported here")
    return config


def _roi(state: State, *, c4: bool) -> RoIConfig:
    if c4:
        return RoIConfig(head="res5", box_pool=14)
    convs, first = _count(state, r"roi_heads\.box_head\.convs\.(\d+)\."), "roi_heads.box_head.convs.0"
    inputs = _shape(state, f"{first}.0.weight")[0] if convs else _shape(state, "rpn.objectness.weight")[1]
    width, features = _shape(state, "roi_heads.box_head.fcs.0.weight")
    return RoIConfig(
        box_pool=isqrt(features // inputs),
        box_convs=convs,
        box_conv_channels=inputs if convs else RoIConfig.box_conv_channels,
        box_norm=norm_of(state, f"{first}.1"),
        box_fcs=_count(state, r"roi_heads\.box_head\.fcs\.(\d+)\."),
        box_channels=width,
    )


def _mask(state: State, *, c4: bool, num_classes: int) -> MaskConfig:
    head = "roi_heads.mask_head"
    if not has(state, head):
        return MaskConfig(head="none", convs=0 if c4 else MaskConfig.convs)
    return MaskConfig(
        convs=_count(state, r"roi_heads\.mask_head\.convs\.(\d+)\."),
        channels=_shape(state, f"{head}.deconv.weight")[1],
        norm=norm_of(state, f"{head}.convs.0.1"),
        class_agnostic=num_classes > 1 and _shape(state, f"{head}.mask_logits.weight")[0] == 1,
    )


def _keypoint(state: State) -> KeypointConfig:
    head = "roi_heads.keypoint_head"
    if not has(state, head):
        return KeypointConfig()
    return KeypointConfig(
        num_keypoints=_shape(state, f"{head}.deconv.weight")[1],
        convs=_count(state, r"roi_heads\.keypoint_head\.convs\.(\d+)\."),
        channels=_shape(state, f"{head}.deconv.weight")[0],
    )


def _shape(state: State, name: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"there is nothing for {name}: give the checkpoint of a whole detector")
    return tuple(state[name].shape)


def _count(state: State, pattern: str) -> int:
    """How many different numbers the group of a regular expression finds: layers, blocks."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})
