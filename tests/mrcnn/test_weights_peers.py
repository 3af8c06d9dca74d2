"""Names, shapes and settings of both peers by the oracles, detectron2 there and back, and what is refused."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from mrcnn import MaskRCNN, ModelConfig
from mrcnn.config import BackboneConfig, InputConfig, KeypointConfig, MaskConfig, RoIConfig, RPNConfig
from mrcnn.weights import from_detectron2, from_torchvision, to_detectron2, to_torchvision

State = dict[str, Tensor]
V2 = "tv_maskrcnn_r50_fpn_v2"


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("name", [*oracle.MODELS, V2])
def test_oracles_names_and_shapes(name: str) -> None:
    state = oracle.empty_state(name)
    found = from_torchvision(state) if name.startswith("tv_") else from_detectron2(state)
    to = to_torchvision if name.startswith("tv_") else to_detectron2
    assert shapes(to(found.state, found.config)) == oracle.named_shapes(name)


@pytest.mark.parametrize(
    ("name", "body", "features", "stride_in_1x1", "std", "num_classes"),
    [
        ("d2_mask_R_50_FPN", "resnet50", "fpn", True, 1.0, 80),
        ("d2_mask_R_50_C4", "resnet50", "c4", True, 1.0, 80),
        ("d2_mask_R_101_FPN", "resnet101", "fpn", True, 1.0, 80),
        ("d2_mask_X_101_FPN", "resnext101_32x8d", "fpn", False, 57.375, 80),
        ("d2_keypoint_R_50_FPN", "resnet50", "fpn", True, 1.0, 1),
    ],
)
def test_detectron2s_settings(
    name: str, body: str, features: str, stride_in_1x1: bool, std: float, num_classes: int
) -> None:
    config = from_detectron2(oracle.empty_state(name)).config
    backbone, c4, keypoints = config.backbone, features == "c4", num_classes == 1
    assert (backbone.name, backbone.features, backbone.stride_in_1x1) == (body, features, stride_in_1x1)
    assert (config.input.channels, config.input.mean[0], config.input.std[0]) == ("bgr", 103.53, std)
    assert (config.num_classes, config.keypoint.num_keypoints) == (num_classes, 17 * keypoints)
    assert (config.roi.aligned, config.roi.sampling_ratio, config.roi.head == "res5") == (True, 0, c4)
    assert (config.rpn.pre_nms_top_n_test, config.input.size_divisor) == ((6000, 1) if c4 else (1000, 32))
    assert config.roi.smooth_l1_beta == (0.5 if keypoints else 0.0)


@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_from_torchvision_to_detectron2_by_the_oracles_map(kind: str) -> None:
    """Bit by bit, but for background: its class row moves to the end, its boxes and masks go."""
    state = oracle.filled_state(f"tv_{kind}rcnn_r50_fpn")
    ours = from_torchvision(state)
    theirs = to_detectron2(ours.state, ours.config)
    names = oracle.read_json(f"name_map_tv_to_d2_{kind}.json")
    assert set(names.values()) == set(theirs)
    for name, renamed in names.items():
        expected = state[name]
        if "cls_score" in name:
            expected = torch.cat([expected[1:], expected[:1]])
        elif "box_predictor.bbox_pred" in name:
            expected = expected[4:]
        elif "mask_fcn_logits" in name:
            expected = expected[1:]
        assert torch.equal(theirs[renamed], expected), name
    again = from_detectron2(theirs, stride_in_1x1=False)
    assert all(torch.equal(again.state[name], value) for name, value in ours.state.items())
    assert again.categories == ours.categories


def ours(**changes: Any) -> tuple[State, ModelConfig]:
    """A small model's state and settings; `changes` are its parts."""
    parts = {"backbone": BackboneConfig(name="resnet18"), **changes}
    config = ModelConfig(**{"num_classes": 3, **parts})
    torch.manual_seed(2)
    state = MaskRCNN(config).state_dict()
    return {name: torch.rand_like(v) if v.is_floating_point() else v for name, v in state.items()}, config


def c4_parts(**backbone: Any) -> dict[str, Any]:
    return {
        "backbone": BackboneConfig(name="resnet18", features="c4", **backbone),
        "roi": RoIConfig(head="res5", box_pool=14),
        "mask": MaskConfig(convs=0),
    }


V2_PARTS = {
    "backbone": BackboneConfig(name="resnet18", norm="bn", fpn_norm="bn"),
    "rpn": RPNConfig(convs=2),
    "roi": RoIConfig(box_convs=2, box_conv_channels=32, box_norm="bn", box_fcs=1, box_channels=64),
    "mask": MaskConfig(convs=2, channels=32, norm="bn"),
}
GN_PARTS = {
    "backbone": BackboneConfig(name="resnet18", norm="gn", fpn_norm="gn"),
    "roi": RoIConfig(box_convs=4, box_norm="gn", box_fcs=1),
    "mask": MaskConfig(norm="gn"),
}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        c4_parts(),
        {"mask": MaskConfig(head="none"), "keypoint": KeypointConfig(num_keypoints=5, convs=3, channels=64)},
        {"keypoint": KeypointConfig(num_keypoints=17)},
        {"mask": MaskConfig(class_agnostic=True)},
        V2_PARTS,
        GN_PARTS,
    ],
)
def test_there_and_back_through_detectron2(parts: dict[str, Any]) -> None:
    state, config = ours(**parts)
    theirs = to_detectron2(state, config)
    found = from_detectron2(theirs)
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], value) for name, value in state.items())
    assert found.config.mask.class_agnostic == config.mask.class_agnostic
    for part in ("norm", "fpn_norm", "features"):
        assert getattr(found.config.backbone, part) == getattr(config.backbone, part)
    again = to_detectron2(found.state, found.config)
    assert all(torch.equal(again[name], value) for name, value in theirs.items())


def test_background_is_detectron2s_last_class() -> None:
    state, config = ours()
    logits = to_detectron2(state, config)["roi_heads.box_predictor.cls_score.weight"]
    own = state["roi_heads.box_head.class_logits.weight"]
    assert torch.equal(logits[-1], own[0])
    assert torch.equal(logits[:-1], own[1:])


@pytest.mark.parametrize(
    ("mean", "channels"), [([123.675, 116.28, 103.53], "rgb"), ([103.53, 116.28, 123.675], "bgr"), ([9.0] * 3, "bgr")]
)
def test_stored_pixel_statistics_set_the_input(mean: list[float], channels: str) -> None:
    state, config = ours()
    theirs = to_detectron2(state, config) | {
        "pixel_mean": torch.tensor(mean).reshape(3, 1, 1),
        "pixel_std": torch.tensor([2.0, 3.0, 4.0]).reshape(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
        "anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    given = from_detectron2(theirs).config.input
    assert (given.channels, given.std) == (channels, (2.0, 3.0, 4.0))
    assert given.mean == pytest.approx(mean)


def test_norms_stored_as_scale_and_shift_get_statistics() -> None:
    state, config = ours(**c4_parts())
    theirs = {name: v for name, v in to_detectron2(state, config).items() if "running" not in name}
    found = from_detectron2(theirs)
    assert found.config.backbone.norm == "frozen_bn"
    norm = found.build().roi_heads.res5[0].bn1
    x = torch.rand(1, len(norm.weight), 2, 2)
    expected = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-6)


def without(state: State, *parts: str) -> State:
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


def test_other_models_of_detectron2_are_refused_by_name() -> None:
    theirs = to_detectron2(*ours())
    dc5 = without({name.replace("bottom_up.", ""): value for name, value in theirs.items()}, "fpn_")
    with pytest.raises(ValueError, match=r"no part of detectron2's.*backbone\.res5\.0\.conv1\.weight"):
        from_detectron2(dc5)
    cascade = {name.replace("box_head.", "box_head.0."): value for name, value in theirs.items()}
    with pytest.raises(ValueError, match=r"no part of detectron2's.*roi_heads\.box_head\.0\.fc1\.weight"):
        from_detectron2(cascade)
    one_box = {n: v[:4] if "bbox_pred" in n else v for n, v in theirs.items()}
    with pytest.raises(ValueError, match=r"roi_heads\.box_predictor\.bbox_pred\.weight has shape \(4, 1024\)"):
        from_detectron2(one_box)


def test_incomplete_weights_are_refused_by_name() -> None:
    theirs = to_detectron2(*ours())
    with pytest.raises(ValueError, match=r"1 tensors are missing \['backbone\.bottom_up\.res4\.1\.conv2\.weight'\]"):
        from_detectron2(without(theirs, "res4.1.conv2.weight"))
    with pytest.raises(ValueError, match=r"nothing for roi_heads\.box_head\.class_logits\.weight"):
        from_detectron2(without(theirs, "box_predictor"))
    with pytest.raises(ValueError, match="nothing for"):
        from_detectron2({})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"mask": MaskConfig(head="mlp")}, "mask.head is 'mlp', but must be fcn or none"),
        ({"mask": MaskConfig(loss="softmax")}, "mask.loss is 'softmax', but must be sigmoid"),
        ({"rpn": RPNConfig(features="own")}, "rpn.features is 'own', but must be shared"),
        ({"backbone": BackboneConfig(name="resnet18", features="c5")}, "backbone.features is 'c5', but must be fpn"),
    ],
)
@pytest.mark.parametrize("to", [to_torchvision, to_detectron2])
def test_what_peers_do_not_have_is_refused(
    to: Callable[[State, ModelConfig], State], parts: dict[str, Any], words: str
) -> None:
    config = ModelConfig(num_classes=3, **{"backbone": BackboneConfig(name="resnet18"), **parts})
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        to({}, config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ModelConfig(backbone=BackboneConfig(stride_in_1x1=True)), "backbone.stride_in_1x1 is True"),
        (ModelConfig(mask=MaskConfig(class_agnostic=True)), "mask.class_agnostic is True"),
        (ModelConfig(**c4_parts()), "backbone.features is 'c4', but must be fpn for torchvision"),
    ],
)
def test_what_only_torchvision_does_not_have_is_refused(config: ModelConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        to_torchvision({}, config)


def test_a_state_of_other_settings_is_refused() -> None:
    state, _ = ours()
    with pytest.raises(ValueError, match=r"backbone\.lateral\.0\.weight.*not the state dict"):
        to_torchvision(state, ModelConfig(backbone=BackboneConfig(name="resnet18", norm="gn", fpn_norm="gn")))


def test_the_stem_is_changed_for_torchvisions_input() -> None:
    """The same image through both: BGR without scaling with our stem, RGB and ImageNet's std with theirs."""
    state, config = ours(input=InputConfig(channels="bgr", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0)))
    rgb = torch.rand(1, 3, 20, 20) * 255
    rgb_mean, rgb_std = (torch.tensor(values)[:, None, None] for values in (InputConfig().mean, InputConfig().std))
    theirs = to_torchvision(state, config)["backbone.body.conv1.weight"]
    expected = nn.functional.conv2d((rgb - rgb_mean).flip(1), state["backbone.stem.0.weight"])
    torch.testing.assert_close(nn.functional.conv2d((rgb - rgb_mean) / rgb_std, theirs), expected, rtol=1e-5, atol=1e-3)
