"""What torchvision and detectron2 call the parts of our model: one table for each, read both ways.

A part is a tensor's name without its last word (weight, bias, running_mean, ...), which is the same everywhere. Tables
list more indices than any model has, so that they need no knowledge of its depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from mrcnn.config import ModelConfig

Peer = Literal["torchvision", "detectron2"]
Classes = Literal["all", "used"]
"""Of torchvision's models: all that they know, or those that COCO uses"""

T = TypeVar("T")

MAX_BLOCKS = 40
"""Blocks of a stage: ResNet-152 has 36."""
MAX_LAYERS = 16
"""Layers in a row of any head."""


def torchvision_parts(*, fpn_norm: bool, box_convs: int) -> dict[str, str]:
    """Our name of every part -> torchvision's, for models of torchvision.models.detection."""
    table = {"backbone.stem.0": "backbone.body.conv1", "backbone.stem.1": "backbone.body.bn1"}
    for stage in range(4):
        table |= _same_blocks(f"backbone.stages.{stage}", f"backbone.body.layer{stage + 1}")
        for name, blocks in (("lateral", "inner_blocks"), ("output", "layer_blocks")):
            ours, theirs = f"backbone.{name}.{stage}", f"backbone.fpn.{blocks}.{stage}"
            table |= {f"{ours}.{i}": f"{theirs}.{i}" for i in (0, 1)} if fpn_norm else {ours: f"{theirs}.0"}
    for i in range(MAX_LAYERS):
        table[f"rpn.convs.{i}"] = f"rpn.head.conv.{i}.0"
        for part in (0, 1):
            table[f"roi_heads.box_head.convs.{i}.{part}"] = f"roi_heads.box_head.{i}.{part}"
            table[f"roi_heads.mask_head.convs.{i}.{part}"] = f"roi_heads.mask_head.{i}.{part}"
        # with convolutions the box head is one sequence: they, a flattening, fully connected layers with their ReLUs
        fc = f"{box_convs + 1 + 2 * i}" if box_convs else f"fc{6 + i}"
        table[f"roi_heads.box_head.fcs.{i}"] = f"roi_heads.box_head.{fc}"
        table[f"roi_heads.keypoint_head.convs.{i}.0"] = f"roi_heads.keypoint_head.{2 * i}"
    return table | {
        "rpn.objectness": "rpn.head.cls_logits",
        "rpn.deltas": "rpn.head.bbox_pred",
        "roi_heads.box_head.class_logits": "roi_heads.box_predictor.cls_score",
        "roi_heads.box_head.box_deltas": "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_head.deconv": "roi_heads.mask_predictor.conv5_mask",
        "roi_heads.mask_head.mask_logits": "roi_heads.mask_predictor.mask_fcn_logits",
        "roi_heads.keypoint_head.deconv": "roi_heads.keypoint_predictor.kps_score_lowres",
    }


def detectron2_parts(*, fpn: bool, fpn_norm: bool, rpn_convs: int) -> dict[str, str]:
    """Our name of every part -> detectron2's, for its GeneralizedRCNN with FPN or C4 heads."""
    body = "backbone.bottom_up" if fpn else "backbone"
    table = {f"backbone.{ours}": f"{body}.{theirs}" for ours, theirs in detectron2_body_parts().items()}
    if not fpn:  # res5 is the RoI head
        table = {ours: theirs for ours, theirs in table.items() if not ours.startswith("backbone.stages.3.")}
        table |= _renamed_blocks("roi_heads.res5", "roi_heads.res5")
    for level in range(4):
        for name in ("lateral", "output"):
            ours, theirs = f"backbone.{name}.{level}", f"backbone.fpn_{name}{level + 2}"
            table |= {f"{ours}.0": theirs, f"{ours}.1": f"{theirs}.norm"} if fpn_norm else {ours: theirs}
    for i in range(MAX_LAYERS):
        conv = "proposal_generator.rpn_head.conv"
        table[f"rpn.convs.{i}"] = conv if rpn_convs == 1 and i == 0 else f"{conv}.conv{i}"
        table[f"roi_heads.box_head.fcs.{i}"] = f"roi_heads.box_head.fc{i + 1}"
        for head, name in (("box_head", "conv"), ("mask_head", "mask_fcn"), ("keypoint_head", "conv_fcn")):
            table[f"roi_heads.{head}.convs.{i}.0"] = f"roi_heads.{head}.{name}{i + 1}"
            table[f"roi_heads.{head}.convs.{i}.1"] = f"roi_heads.{head}.{name}{i + 1}.norm"
    return table | {
        "rpn.objectness": "proposal_generator.rpn_head.objectness_logits",
        "rpn.deltas": "proposal_generator.rpn_head.anchor_deltas",
        "roi_heads.box_head.class_logits": "roi_heads.box_predictor.cls_score",
        "roi_heads.box_head.box_deltas": "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_head.deconv": "roi_heads.mask_head.deconv",
        "roi_heads.mask_head.mask_logits": "roi_heads.mask_head.predictor",
        "roi_heads.keypoint_head.deconv": "roi_heads.keypoint_head.score_lowres",
    }


def detectron2_body_parts() -> dict[str, str]:
    """Our name of every part of a ResNet, without "backbone." -> detectron2's."""
    table = {"stem.0": "stem.conv1", "stem.1": "stem.conv1.norm"}
    for stage in range(4):
        table |= _renamed_blocks(f"stages.{stage}", f"res{stage + 2}")
    return table


def torchvision_body_parts() -> dict[str, str]:
    """Our name of every part of a ResNet, without "backbone." -> torchvision.models.resnet's."""
    table = {"stem.0": "conv1", "stem.1": "bn1"}
    for stage in range(4):
        table |= _same_blocks(f"stages.{stage}", f"layer{stage + 1}")
    return table


def caffe2_body_parts() -> dict[str, str]:
    """Our name of every part of a ResNet, without "backbone." -> Caffe2's, as in Detectron's model zoo.

    A convolution's tensor is <name>_w; its normalisation's are <name>_bn_s and <name>_bn_b.
    """
    table = {"stem.0": "conv1", "stem.1": "res_conv1_bn"}
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    for stage in range(4):
        for block in range(MAX_BLOCKS):
            ours, theirs = f"stages.{stage}.{block}", f"res{stage + 2}_{block}"
            for conv, branch in branches.items():
                table[f"{ours}.{conv}"] = f"{theirs}_{branch}"
                table[f"{ours}.bn{conv[-1]}"] = f"{theirs}_{branch}_bn"
            table[f"{ours}.downsample.0"] = f"{theirs}_branch1"
            table[f"{ours}.downsample.1"] = f"{theirs}_branch1_bn"
    return table


def _same_blocks(ours: str, theirs: str) -> dict[str, str]:
    """torchvision's blocks, whose names we use."""
    parts = [f"{layer}{i}" for layer in ("conv", "bn") for i in (1, 2, 3)] + ["downsample.0", "downsample.1"]
    return {f"{ours}.{i}.{part}": f"{theirs}.{i}.{part}" for i in range(MAX_BLOCKS) for part in parts}


def _renamed_blocks(ours: str, theirs: str) -> dict[str, str]:
    """detectron2's blocks, where a convolution owns its normalisation."""
    parts = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)}
    parts |= {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}
    return {f"{ours}.{i}.{own}": f"{theirs}.{i}.{peer}" for i in range(MAX_BLOCKS) for own, peer in parts.items()}


def rename(state: Mapping[str, T], parts: Mapping[str, str]) -> tuple[dict[str, T], list[str]]:
    """The values whose part the table `parts` (old -> new) knows under their new names, and the other names."""
    renamed, unknown = {}, []
    for name, value in state.items():
        part, _, word = name.rpartition(".")
        if part in parts:
            renamed[f"{parts[part]}.{word}"] = value
        else:
            unknown.append(name)
    return renamed, unknown


def inverse(parts: Mapping[str, str]) -> dict[str, str]:
    """The table read the other way."""
    return {theirs: ours for ours, theirs in parts.items()}


def modern_torchvision_name(name: str) -> str:
    """torchvision's present name of a tensor: its first detection weights have older ones, which it reads, too."""
    for pattern, replacement in _RENAMED_BY_TORCHVISION:
        name = re.sub(pattern, replacement, name)
    return name


_RENAMED_BY_TORCHVISION: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^roi_heads\.mask_head\.mask_fcn(\d+)\.", lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0."),
)


def parts_for_torchvision(config: ModelConfig) -> dict[str, str]:
    """`torchvision_parts` of a model of ours."""
    return torchvision_parts(fpn_norm=config.backbone.fpn_norm != "none", box_convs=config.roi.box_convs)


def parts_for_detectron2(config: ModelConfig) -> dict[str, str]:
    """`detectron2_parts` of a model of ours."""
    backbone = config.backbone
    return detectron2_parts(
        fpn=backbone.features == "fpn", fpn_norm=backbone.fpn_norm != "none", rpn_convs=config.rpn.convs
    )
