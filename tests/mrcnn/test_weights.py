"""Starting a model from weights: ImageNet bodies under their three kinds of names, and whole models of both peers."""

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from mrcnn import MaskRCNN, ModelConfig, load_weights, save_model
from mrcnn.bodies import adapt_stem, read_body
from mrcnn.config import BackboneConfig, InputConfig, MaskConfig, RoIConfig, RPNConfig
from mrcnn.weights import from_torchvision, to_detectron2

State = dict[str, Tensor]
BGR = InputConfig(channels="bgr", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0))
NARROW = {"roi": RoIConfig(box_channels=32), "mask": MaskConfig(convs=1, channels=32)}
C4 = {"roi": RoIConfig(head="res5", box_pool=14), "mask": MaskConfig(convs=0, channels=32)}


def spread(module: nn.Module) -> State:
    """The module's state dict with numbers of which no two are alike."""
    torch.manual_seed(4)
    return {k: v + torch.rand(v.shape) if v.is_floating_point() else v for k, v in module.state_dict().items()}


@pytest.fixture(scope="module")
def body50() -> State:
    """torchvision's ResNet-50."""
    return spread(resnet50(weights=None))


@pytest.fixture(scope="module")
def body18() -> State:
    """torchvision's ResNet-18."""
    return spread(resnet18(weights=None))


def model_of(**parts: Any) -> MaskRCNN:
    return MaskRCNN(ModelConfig(**{"num_classes": 3, **NARROW, **parts}))


def caffe2(state: State) -> State:
    """torchvision's ResNet under Caffe2's names, batch norm as a scale and a shift, with what else is in such files."""
    blobs = {"conv1_b": torch.ones(64), "fc1000_w": torch.ones(2, 2), "pred_b": torch.ones(2)}
    for name, value in state.items():
        if name.startswith("fc.") or name.rpartition(".")[2] not in ("weight", "bias"):
            continue
        name = re.sub(r"^conv1\.weight", "conv1_w", name)
        name = re.sub(r"^bn1\.", "res_conv1_bn.", name)
        name = re.sub(r"^layer(\d)\.(\d+)\.", lambda found: f"res{int(found[1]) + 1}_{found[2]}_", name)
        name = re.sub(r"downsample\.0\.weight", "branch1_w", name).replace("downsample.1", "branch1_bn")
        name = re.sub(r"conv([123])\.weight", lambda found: f"branch2{' abc'[int(found[1])]}_w", name)
        name = re.sub(r"_bn([123])\.", lambda found: f"_branch2{' abc'[int(found[1])]}_bn.", name)
        blobs[name.replace(".weight", "_s").replace(".bias", "_b")] = value
    return blobs | {"conv1_w_momentum": torch.ones(1)}


def pickled(folder: Path, state: State, **around: Any) -> Path:
    file = folder / "weights.pkl"
    arrays = {name: value.numpy() for name, value in state.items()}
    file.write_bytes(pickle.dumps({**around, "model": arrays} if around else arrays))
    return file


def saved(folder: Path, state: State) -> Path:
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def test_torchvisions_body_fills_the_detectors_and_the_rpns(body18: State, tmp_path: Path) -> None:
    model = model_of(backbone=BackboneConfig(name="resnet18"), rpn=RPNConfig(features="own"))
    load_weights(model, saved(tmp_path, body18))
    for body in (model.backbone, model.rpn_backbone):
        assert torch.equal(body.stem[0].weight, body18["conv1.weight"])
        assert torch.equal(body.stages[3][1].bn2.running_var, body18["layer4.1.bn2.running_var"])


@pytest.mark.parametrize("features", ["c4", "c5"])
def test_torchvisions_body_fills_res5(body18: State, tmp_path: Path, features: str) -> None:
    model = model_of(backbone=BackboneConfig(name="resnet18", features=features), **(C4 if features == "c4" else {}))
    load_weights(model, saved(tmp_path, body18))
    res5 = model.roi_heads.res5 if features == "c4" else model.backbone.stages[3]
    for part, value in res5.state_dict().items():
        assert torch.equal(value, body18[f"layer4.{part}"]), part
    assert torch.equal(model.backbone.stages[2][0].conv1.weight, body18["layer3.0.conv1.weight"])


def test_caffe2_names(body50: State, tmp_path: Path) -> None:
    """MSRA's file in the model that it is made for: BGR, stride in the 1x1, scale and shift as they are."""
    model = model_of(backbone=BackboneConfig(stride_in_1x1=True, features="c4"), input=BGR, **C4)
    load_weights(model, pickled(tmp_path, caffe2(body50)))
    assert torch.equal(model.backbone.stem[0].weight, body50["conv1.weight"])
    assert torch.equal(model.roi_heads.res5[2].conv3.weight, body50["layer4.2.conv3.weight"])
    assert torch.equal(model.backbone.stages[1][0].downsample[1].bias, body50["layer2.0.downsample.1.bias"])
    x = torch.rand(1, 64, 3, 3)
    scale, shift = (body50[f"layer1.0.bn2.{word}"][:, None, None] for word in ("weight", "bias"))
    torch.testing.assert_close(model.backbone.stages[0][0].bn2(x), x * scale + shift, rtol=1e-6, atol=1e-6)


def test_caffe2_names_want_the_stride_where_it_was(body50: State, tmp_path: Path) -> None:
    file = pickled(tmp_path, caffe2(body50))
    with pytest.raises(ValueError, match=r"backbone\.stride_in_1x1 is False, but must be True for .*weights\.pkl"):
        load_weights(model_of(input=BGR), file)
    with pytest.raises(ValueError, match=r"backbone\.stride_in_1x1 is True, but must be False for .*weights\.pth"):
        load_weights(model_of(backbone=BackboneConfig(stride_in_1x1=True)), saved(tmp_path, body50))


def test_the_stem_is_changed_for_the_models_input(body50: State, tmp_path: Path) -> None:
    """MSRA's weights in a model that sees RGB by ImageNet's std: its first convolution gives the same."""
    model = model_of(backbone=BackboneConfig(stride_in_1x1=True))
    load_weights(model, pickled(tmp_path, caffe2(body50)))
    rgb = torch.rand(1, 3, 20, 20) * 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.input.mean, model.config.input.std))
    expected = nn.functional.conv2d((rgb - mean).flip(1), body50["conv1.weight"])
    found = nn.functional.conv2d((rgb - mean) / std, model.backbone.stem[0].weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_the_stem_stays_where_inputs_agree_and_goes_back() -> None:
    weight = torch.rand(4, 3, 7, 7)
    assert adapt_stem(weight, BGR, BGR) is weight
    there = adapt_stem(weight, BGR, InputConfig())
    torch.testing.assert_close(adapt_stem(there, InputConfig(), BGR), weight, rtol=1e-6, atol=0)


def test_another_mean_is_refused(body18: State, tmp_path: Path) -> None:
    model = model_of(backbone=BackboneConfig(name="resnet18"), input=InputConfig(mean=(0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match=r"weights\.pth: input\.mean is \(0\.0, 0\.0, 0\.0\).*\(123\.675, 116\.28"):
        load_weights(model, saved(tmp_path, body18))


def test_detectrons_resnext_is_told_from_msras_resnets() -> None:
    names = {"conv1_w": torch.rand(64, 3, 7, 7), "res_conv1_bn_s": torch.rand(64)}
    resnext = read_body({**names, "res2_0_branch2b_w": torch.rand(256, 8, 3, 3)}, norm_eps=1e-5)
    msra = read_body({**names, "res2_0_branch2b_w": torch.rand(64, 64, 3, 3)}, norm_eps=1e-5)
    assert resnext is not None
    assert msra is not None
    assert (resnext.stride_in_1x1, resnext.input.std, resnext.input.channels) == (False, (57.375, 57.12, 58.395), "bgr")
    assert (msra.stride_in_1x1, msra.input.std, msra.input.channels) == (True, (1.0, 1.0, 1.0), "bgr")


def test_detectron2s_names_of_torchvisions_body(body18: State, tmp_path: Path) -> None:
    renamed = {}
    for name, value in body18.items():
        name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name if name.startswith("res") else f"stem.{name}"] = value
    model = model_of(backbone=BackboneConfig(name="resnet18"))
    load_weights(model, pickled(tmp_path, renamed, __author__="torchvision", matching_heuristics=True))
    assert torch.equal(model.backbone.stem[1].running_mean, body18["bn1.running_mean"])
    assert torch.equal(model.backbone.stages[2][0].downsample[0].weight, body18["layer3.0.downsample.0.weight"])


def test_a_trained_batch_norm_keeps_its_own_counter(body18: State, tmp_path: Path) -> None:
    model = model_of(backbone=BackboneConfig(name="resnet18", norm="bn"))
    load_weights(model, saved(tmp_path, {k: v for k, v in body18.items() if "num_batches" not in k}))
    assert torch.equal(model.backbone.stem[1].running_mean, body18["bn1.running_mean"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer1.0.conv1.weight": None}, r"1 tensors are missing \['stages\.0\.0\.conv1\.weight'\]"),
        ({"layer5.0.conv1.weight": torch.zeros(1)}, r"1 have no place \['layer5\.0\.conv1\.weight'\]"),
        ({"layer1.0.conv1.weight": torch.zeros(1)}, r"backbone\.stages\.0\.0\.conv1\.weight has shape \(1,\)"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(
    body18: State, tmp_path: Path, change: dict[str, Tensor | None], words: str
) -> None:
    state = {name: value for name, value in {**body18, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        load_weights(model_of(backbone=BackboneConfig(name="resnet18")), saved(tmp_path, state))


def test_our_own_model_is_loaded(tmp_path: Path) -> None:
    given = model_of(backbone=BackboneConfig(name="resnet18"))
    save_model(given, tmp_path)
    model = model_of(backbone=BackboneConfig(name="resnet18"))
    load_weights(model, tmp_path / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in given.state_dict().items())


@pytest.fixture(scope="module")
def peer() -> State:
    """torchvision's Mask R-CNN of COCO's 91 classes with trained batch norm."""
    return spread(TorchvisionMaskRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 91))


@pytest.mark.parametrize("num_classes", [80, 90])
def test_torchvisions_detector_starts_a_model_of_80_or_90_classes(
    peer: State, tmp_path: Path, num_classes: int
) -> None:
    """Into frozen batch norm, which has no counters."""
    given = from_torchvision(peer, classes="used" if num_classes == 80 else "all")
    model = MaskRCNN(ModelConfig(num_classes=num_classes, backbone=BackboneConfig(name="resnet18")))
    load_weights(model, saved(tmp_path, peer))
    assert all(torch.equal(value, given.state[name]) for name, value in model.state_dict().items())


def test_a_detector_of_other_classes_is_refused(peer: State, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"class_logits\.weight has shape \(91, 1024\).*num_classes or a width differs"
    ):
        load_weights(
            MaskRCNN(ModelConfig(num_classes=7, backbone=BackboneConfig(name="resnet18"))), saved(tmp_path, peer)
        )


def test_detectron2s_detector_starts_a_model(tmp_path: Path) -> None:
    """In a pickle, as its model zoo has them; into a model with its input, and into one with another."""
    config = ModelConfig(num_classes=3, backbone=BackboneConfig(name="resnet18"), input=BGR)
    given = spread(MaskRCNN(config))
    file = pickled(tmp_path, to_detectron2(given, config), __author__="Detectron2 Model Zoo")
    same, other = MaskRCNN(config), MaskRCNN(replace(config, input=InputConfig()))
    load_weights(same, file)
    load_weights(other, file)
    stem = "backbone.stem.0.weight"
    for name, value in given.items():
        assert torch.equal(same.state_dict()[name], value), name
        assert name == stem or torch.equal(other.state_dict()[name], value), name
    expected = adapt_stem(given[stem], BGR, InputConfig())
    assert torch.equal(other.state_dict()[stem], expected)
