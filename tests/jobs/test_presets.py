"""Every preset makes a model, and says the paper's numbers."""

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


@pytest.mark.parametrize("name", [name for name in PRESETS if "_c4" in name])
def test_c4_as_in_the_paper(name: str) -> None:
    config = model_of(name)
    assert config.roi.batch_size_per_image == 64
    assert config.rpn.post_nms_top_n_test == 300
    assert (config.roi.box_pool, config.mask.convs) == (14, 0)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("_fpn")])
def test_fpn_as_in_the_paper(name: str) -> None:
    config = model_of(name)
    assert config.roi.batch_size_per_image == 512
    assert config.rpn.post_nms_top_n_test == 1000
    assert (config.mask.pool, config.mask.convs) == (14, 4)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("toy", "r18_fpn_small")])
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
    assert config.model.backbone.norm == "frozen_bn"


def test_what_each_variant_changes() -> None:
    assert model_of("r50_fpn").backbone.name == "resnet50"
    assert model_of("r101_fpn").backbone.name == model_of("r101_c4").backbone.name == "resnet101"
    assert model_of("x101_32x8d_fpn").backbone.name == "resnext101_32x8d"
    assert model_of("x101_64x4d_fpn").backbone.name == "resnext101_64x4d"
    assert model_of("r50_c5").backbone.features == "c5"
    assert (model_of("r50_fpn_mlp").mask.head, model_of("r50_fpn_mlp").mask.fcs) == ("mlp", 2)
    assert model_of("r50_c4_softmax").mask.loss == "softmax"
    assert model_of("r50_c4_agnostic").mask.class_agnostic
    assert model_of("faster_rcnn_r50_fpn").mask.head == model_of("keypoint_rcnn_r50_fpn").mask.head == "none"
    for name in ("keypoint_rcnn_r50_fpn", "keypoint_mask_rcnn_r50_fpn"):
        assert (model_of(name).num_classes, model_of(name).keypoint.num_keypoints) == (1, 17)
