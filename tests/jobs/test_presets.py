"""Every preset makes a model, and says the paper's numbers."""

from dataclasses import asdict
from typing import get_args

import pytest
import torch

from jobs.config import TrainConfig
from jobs.presets import PRESETS, Preset
from mrcnn import MaskRCNN, ModelConfig


def model_of(name: str) -> ModelConfig:
    return PRESETS[name].model


def test_the_command_line_knows_every_preset() -> None:
    assert get_args(Preset) == tuple(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_model(name: str) -> None:
    config = PRESETS[name]
    assert TrainConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        model = MaskRCNN(config.model)
    has_masks, has_keypoints = config.model.mask.head != "none", config.model.keypoint.num_keypoints > 0
    assert (model.roi_heads.mask_head is not None) == has_masks
    assert (model.roi_heads.keypoint_head is not None) == has_keypoints
    assert (model.roi_heads.res5 is not None) == (config.model.backbone.features == "c4")


def test_no_two_presets_are_the_same() -> None:
    configs = list(PRESETS.values())
    assert all(config not in configs[:i] for i, config in enumerate(configs))


BODIES = ("r18", "r34", "r50", "r101", "x101_32x8d", "x101_64x4d")
NOT_THE_PAPERS = ("toy", "r18_fpn_small")


@pytest.mark.parametrize("features", ["fpn", "c4", "c5"])
@pytest.mark.parametrize("body", BODIES)
def test_every_body_with_every_kind_of_features(body: str, features: str) -> None:
    backbone = model_of(f"{body}_{features}").backbone
    assert backbone.features == features
    assert backbone.name == (body.replace("x101", "resnext101") if body.startswith("x") else f"resnet{body[1:]}")


@pytest.mark.parametrize("name", [name for name in PRESETS if "_c4" in name])
def test_c4_as_in_the_paper(name: str) -> None:
    config = model_of(name)
    assert config.roi.batch_size_per_image == 64
    assert config.rpn.post_nms_top_n_test == 300
    assert (config.roi.head, config.roi.box_pool, config.mask.convs) == ("res5", 14, 0)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("_fpn")])
def test_fpn_as_in_the_paper(name: str) -> None:
    config = model_of(name)
    assert config.roi.batch_size_per_image == 512
    assert config.rpn.post_nms_top_n_test == 1000
    assert (config.mask.pool, config.mask.convs) == (14, 4)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NOT_THE_PAPERS])
def test_the_papers_training(name: str) -> None:
    """The rate is for 16 images a step and in proportion to what a step has: ResNeXt's is 0.01 for its 8."""
    config = PRESETS[name]
    per_step = config.optimizer.base_lr * config.global_batch / 16
    keypoints, resnext = name.startswith("keypoint"), name.startswith("x101")
    assert per_step == pytest.approx(0.01 if resnext else 0.02)
    assert config.steps == (90_000 if keypoints else 160_000)
    cuts = [share * config.steps for share in config.optimizer.decay_at]
    assert cuts == pytest.approx([60_000, 80_000] if keypoints else [120_000])
    assert not config.model.backbone.stride_in_1x1  # torchvision's ImageNet weights
    # what is not loaded from ImageNet must not be frozen
    assert (config.model.backbone.norm == "gn") == (config.model.backbone.frozen_stages == 0)


BASES = ("r50_fpn", "r50_c4", "r50_c5")
CHANGES = {
    "r50_fpn_bn": {"backbone.norm": "bn"},
    "r50_fpn_sync_bn": {"backbone.norm": "sync_bn"},
    "r50_fpn_gn": {"backbone.norm": "gn", "backbone.fpn_norm": "gn", "backbone.frozen_stages": 0, "mask.norm": "gn"},
    "r50_c4_softmax": {"mask.loss": "softmax"},
    "r50_c4_agnostic": {"mask.class_agnostic": True},
    "r50_c4_roi_align_max": {"roi.reduce": "max"},
    "r50_c4_roi_warp": {"roi.operator": "warp"},
    "r50_c4_roi_warp_max": {"roi.operator": "warp", "roi.reduce": "max"},
    "r50_c4_roi_pool": {"roi.operator": "pool"},
    "r50_c5_roi_pool": {"roi.operator": "pool"},
    "r50_fpn_precise_roi_pool": {"roi.operator": "precise"},
    "r50_fpn_mlp2": {"mask.head": "mlp"},
    "r50_fpn_mlp3": {"mask.head": "mlp", "mask.fcs": 3},
    "faster_rcnn_r50_fpn": {"mask.head": "none"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_variant_changes_what_it_claims_and_nothing_else(name: str) -> None:
    base, variant = (asdict(model_of(each)) for each in (next(b for b in BASES if b in name), name))
    changed = {
        f"{part}.{field}": value
        for part, fields in variant.items()
        if isinstance(fields, dict)
        for field, value in fields.items()
        if value != base[part][field]
    }
    assert changed == CHANGES[name]


def test_every_variant_is_listed() -> None:
    systematic = {f"{body}_{features}" for body in BODIES for features in ("fpn", "c4", "c5")}
    keypoints = {"keypoint_rcnn_r50_fpn", "keypoint_mask_rcnn_r50_fpn"}
    assert set(PRESETS) == systematic | set(CHANGES) | keypoints | set(NOT_THE_PAPERS)


@pytest.mark.parametrize("name", ["keypoint_rcnn_r50_fpn", "keypoint_mask_rcnn_r50_fpn"])
def test_keypoints_of_persons(name: str) -> None:
    assert (model_of(name).num_classes, model_of(name).keypoint.num_keypoints) == (1, 17)
    assert (model_of(name).mask.head == "none") == ("mask" not in name)
