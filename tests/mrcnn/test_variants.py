"""What must hold in every variant of the paper: all of it learns, hard batches stay finite, predictions are whole."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from models import SMALL, batch_of, with_keypoints

from mrcnn import BackboneConfig, MaskRCNN, ModelConfig
from mrcnn.structures import Category

TWO_IMAGES = [[[10, 10, 60, 70], [50, 20, 110, 60]], [[5, 30, 40, 90]]]
HARD_BATCHES = {
    "no objects": ([[], []], False),
    "only crowds": ([[[0, 0, 128, 96]]], True),
    "one-pixel boxes": ([[[20, 20, 21, 21], [0, 0, 1, 1]]], False),
    "500 objects": ([[[i % 10 * 10, i // 10 * 1.7, i % 10 * 10 + 30, i // 10 * 1.7 + 12] for i in range(500)]], False),
}
C4 = {"backbone.features": "c4", "roi.head": "res5", "roi.box_pool": 14, "mask.convs": 0}

VARIANTS: dict[str, dict[str, Any]] = {
    "fpn": {},
    "c4": C4,
    "c5": {"backbone.features": "c5", "backbone.norm": "bn"},
    "resnet34, frozen bn": {"backbone.name": "resnet34", "backbone.norm": "frozen_bn", "backbone.frozen_stages": 2},
    "stride in 1x1": {"backbone.name": "resnet50", "backbone.stride_in_1x1": True, "backbone.norm": "bn"},
    "c4 stride in 1x1": {**C4, "backbone.name": "resnet50", "backbone.stride_in_1x1": True},
    "faster r-cnn": {"mask.head": "none"},
    "mlp mask": {"mask.head": "mlp", "mask.fc_channels": 64},
    "mlp mask, three layers": {"mask.head": "mlp", "mask.fc_channels": 64, "mask.fcs": 3},
    "class-agnostic": {"mask.class_agnostic": True},
    "softmax": {"mask.loss": "softmax"},
    "softmax, class-agnostic": {"mask.loss": "softmax", "mask.class_agnostic": True},
    "c4 softmax": {**C4, "mask.loss": "softmax"},
    "c4 mlp": {**C4, "mask.head": "mlp", "mask.fc_channels": 64},
    "keypoints": {"mask.head": "none", "keypoint.num_keypoints": 5, "keypoint.convs": 2, "keypoint.channels": 32},
    "mask and keypoints": {"keypoint.num_keypoints": 5, "keypoint.convs": 2, "keypoint.channels": 32},
    "c4 keypoints": {**C4, "keypoint.num_keypoints": 5, "keypoint.convs": 1, "keypoint.channels": 32},
    "roi max": {"roi.reduce": "max"},
    "roi adaptive": {"roi.sampling_ratio": 0},
    "roi one sample": {"roi.sampling_ratio": 1, "roi.aligned": False},
    "roi pool": {"roi.operator": "pool"},
    "roi warp": {"roi.operator": "warp"},
    "roi warp max": {"roi.operator": "warp", "roi.reduce": "max"},
    "roi precise": {"roi.operator": "precise"},
    "c4 pool": {**C4, "roi.operator": "pool"},
    "own rpn": {"rpn.features": "own", "roi.canonical_size": 22},
    "rpn of two convolutions, conv box head": {
        "rpn.convs": 2,
        "roi.box_convs": 2,
        "roi.box_conv_channels": 32,
        "roi.box_norm": "gn",
        "roi.box_fcs": 1,
    },
    "detectron2's settings": {
        "rpn.loss_normalizer": "batch_size",
        "rpn.smooth_l1_beta": 0.0,
        "roi.smooth_l1_beta": 0.0,
        "rpn.min_size": 0.0,
        "input.channels": "bgr",
    },
    "torchvision's settings": {
        "rpn.round_anchors": True,
        "rpn.strides_from_grid": True,
        "roi.aligned": False,
        "mask.binary_targets": False,
        "mask.paste": "padded",
        "input.resize": "bilinear",
    },
    "sync bn": {"backbone.norm": "sync_bn"},
    "legacy boxes": {"rpn.box_coding": "legacy", "roi.box_coding": "legacy"},
}


def config_of(variant: dict[str, Any]) -> ModelConfig:
    """SMALL with some settings changed, named as on the command line."""
    settings = SMALL.to_dict()
    for name, value in variant.items():
        part, setting = name.split(".")
        settings[part][setting] = value
    return ModelConfig.from_dict(settings)


def model_of(name: str) -> MaskRCNN:
    torch.manual_seed(0)
    config = config_of(VARIANTS[name])
    points = tuple(f"{'left_' if i % 2 else 'right_'}{i // 2}" for i in range(config.keypoint.num_keypoints))
    return MaskRCNN(config, [Category(i, str(i), points) for i in (1, 2, 3)]).train()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_trainable_parameter_learns(name: str) -> None:
    model = model_of(name)
    losses = model(*with_keypoints(*batch_of(TWO_IMAGES), model.config.keypoint.num_keypoints))
    assert ("loss_mask" in losses) == (model.config.mask.head != "none")
    assert ("loss_keypoint" in losses) == (model.config.keypoint.num_keypoints > 0)
    assert all(value.isfinite() and value > 0 for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("batch", HARD_BATCHES)
@pytest.mark.parametrize("name", ["fpn", "c4", "c5", "softmax", "mlp mask", "mask and keypoints", "roi precise"])
def test_hard_batches_give_finite_losses_and_all_gradients(name: str, batch: str) -> None:
    model = model_of(name)
    boxes, crowd = HARD_BATCHES[batch]
    images, targets = with_keypoints(*batch_of(boxes, crowd=crowd), model.config.keypoint.num_keypoints)
    losses = model(images, targets)
    assert all(value.isfinite() for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{parameter_name}: DDP would wait for its gradient"
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", VARIANTS)
def test_predictions_are_whole(name: str) -> None:
    model = model_of(name).eval()
    with torch.no_grad():  # spread the outputs of the random network, so that it finds something
        model.roi_heads.box_head.class_logits.weight.mul_(30)
    image = np.random.default_rng(0).integers(0, 256, (70, 150, 3), np.uint8)
    (found,) = model.predict([image])
    again, same = model.predict([image, image], batch_size=2)
    assert len(found) > 0
    assert torch.equal(again.boxes, same.boxes)
    side = {"c4 mlp": 14}.get(name, 2 * model.config.mask.pool if model.config.backbone.features != "c4" else 14)
    if model.config.mask.head == "none":
        with pytest.raises(ValueError, match="no masks"):
            _ = found.masks
    else:
        assert found.mask_probs is not None
        assert found.mask_probs.shape == (len(found), side, side)
        assert 0 <= found.mask_probs.min() <= found.mask_probs.max() <= 1
        assert found.masks.shape == (len(found), 70, 150)
    count = model.config.keypoint.num_keypoints
    if not count:
        assert found.keypoints is None
        return
    assert found.keypoints is not None
    assert found.keypoints.shape == (len(found), count, 3)
    low, high = found.boxes[:, None, :2], found.boxes[:, None, 2:]
    assert ((found.keypoints[..., :2] >= low - 1) & (found.keypoints[..., :2] <= high + 1)).all()


@pytest.mark.parametrize("body", get_args(get_type_hints(BackboneConfig)["name"]))
@pytest.mark.parametrize("features", ["fpn", "c4", "c5"])
def test_every_body_has_its_strides_and_channels(body: str, features: str) -> None:
    variant = {**(C4 if features == "c4" else {}), "backbone.name": body, "backbone.features": features}
    with torch.device("meta"):
        model = MaskRCNN(config_of({**variant, "backbone.norm": "frozen_bn"}))
        levels = model.backbone(torch.zeros(1, 3, 128, 192))
    strides = {"fpn": (4, 8, 16, 32, 64), "c4": (16,), "c5": (32,)}[features]
    assert model.backbone.strides == strides
    assert [tuple(x.shape[1:]) for x in levels] == [(model.backbone.channels, 128 // s, 192 // s) for s in strides]


@pytest.mark.parametrize("name", ["fpn", "c4", "mask and keypoints"])
def test_leaving_out_what_is_not_positive_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the mask and keypoint heads see only as many RoIs as there are positives; on a GPU all that may be."""
    model = model_of(name)
    images, targets = with_keypoints(*batch_of(TWO_IMAGES), model.config.keypoint.num_keypoints)
    seen = []
    assert model.roi_heads.mask_head is not None
    model.roi_heads.mask_head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trimmed = model(images, targets)
    monkeypatch.setattr("mrcnn.roi_heads.readable", lambda tensor: False)
    whole = model(images, targets)
    assert seen[0] < seen[1] == 16
    for loss, value in whole.items():
        torch.testing.assert_close(trimmed[loss], value)


def test_separate_proposals_give_the_detectors_losses_alone() -> None:
    model = model_of("fpn")
    images, targets = batch_of(TWO_IMAGES)
    proposals, rpn_losses = model.propose(images, targets)
    joint, apart = model(images, targets), model(images, targets, proposals)
    assert joint.keys() == rpn_losses.keys() | apart.keys()
    assert all(torch.equal(joint[name], value) for name, value in {**rpn_losses, **apart}.items())


def test_softmax_masks_let_classes_compete() -> None:
    """Raising another class's logit lowers the mask with softmax, not with sigmoid (the paper's decoupling)."""
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    for name, competes in (("fpn", False), ("softmax", True)):
        model = model_of(name).eval()
        with torch.no_grad():
            model.roi_heads.box_head.class_logits.bias.copy_(torch.tensor([0.0, 9, 0, 0]))  # all of class 1
            (before,) = model.predict([image])
            model.roi_heads.mask_head.mask_logits.bias[-1] += 5  # of class 3
            (after,) = model.predict([image])
        assert before.mask_probs is not None
        assert after.mask_probs is not None
        assert set(before.labels.tolist()) == {1}
        assert (after.mask_probs < before.mask_probs).all() == competes
        assert torch.equal(after.mask_probs, before.mask_probs) != competes


def test_training_on_keypoints_needs_keypoints() -> None:
    with pytest.raises(ValueError, match=r"targets\.keypoints is None.*5 keypoints.*num_keypoints to 0"):
        model_of("keypoints")(*batch_of(TWO_IMAGES))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone.features": "c4"}, "roi.head is 'separate', but must be res5 with backbone.features=c4"),
        ({"roi.head": "res5"}, "roi.head is 'res5'"),
        ({"rpn.anchor_sizes": [8, 16]}, "rpn.anchor_sizes is .8, 16., but must be five numbers"),
        ({"roi.operator": "pool", "roi.reduce": "max"}, "roi.reduce is 'max', but must be mean with operator=pool"),
        ({"roi.operator": "warp", "roi.sampling_ratio": 0}, "roi.sampling_ratio is 0"),
        ({"backbone.stride_in_1x1": True}, "backbone.stride_in_1x1 is True, but must be false with resnet18"),
        ({"mask.loss": "hinge"}, "mask.loss is 'hinge', but must be one of sigmoid, softmax"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(change)
