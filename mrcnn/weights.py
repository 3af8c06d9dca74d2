"""Saving, loading and translating weights. Nothing is unpickled but plain tensors (`torch.load(weights_only=True)`)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from mrcnn.config import ModelConfig
from mrcnn.model import MaskRCNN
from mrcnn.structures import Category

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FORMAT = "mrcnn-1"


def save_model(model: MaskRCNN, folder: str | Path) -> None:
    """Write model.safetensors and config.json into a local folder, which is made where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in model_files(model).items():
        (folder / name).write_bytes(data)


def model_files(model: MaskRCNN) -> dict[str, bytes]:
    """The two files of a model by name, for a store that is not a local folder."""
    config = config_json(model.config, model.categories).encode()
    return {WEIGHTS_FILE: state_bytes(model.state_dict()), CONFIG_FILE: config}


def state_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Tensors by name as safetensors."""
    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def config_json(config: ModelConfig, categories: tuple[Category, ...]) -> str:
    """What config.json holds: the format, the model's settings, and what its labels mean."""
    data = {"format": FORMAT, "model": config.to_dict(), "categories": [asdict(c) for c in categories]}
    return json.dumps(data, indent=2) + "\n"


def load_model(folder: str | Path, *, device: torch.device | str = "cpu") -> MaskRCNN:
    """The model that `save_model` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if one of them is not what this version reads.
    """
    folder = Path(folder)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} does not exist: a model is a folder with {WEIGHTS_FILE} and {CONFIG_FILE}"
            )
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)}
    return model_from_files(files, str(folder), device=device)


def model_from_files(files: Mapping[str, bytes], source: str, *, device: torch.device | str = "cpu") -> MaskRCNN:
    """The model of `model_files`, in evaluation mode; errors (ValueError) name `source`."""
    try:
        data = json.loads(files[CONFIG_FILE])
    except ValueError as error:
        raise ValueError(f"{source}/{CONFIG_FILE} is not JSON ({error}): export the model again") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{source}/{CONFIG_FILE} is not of format {FORMAT!r}: export the model with this version")
    try:
        state = load(files[WEIGHTS_FILE])
    except SafetensorError as error:
        raise ValueError(f"{source}/{WEIGHTS_FILE} cannot be read as weights ({error}): export it again") from error
    try:
        config, categories = ModelConfig.from_dict(data["model"]), [Category(**c) for c in data["categories"]]
        model = MaskRCNN(config, categories)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}/{CONFIG_FILE} is damaged ({error!r}): export the model again") from error
    _load_strictly(model, state, f"{source}/{WEIGHTS_FILE}")
    return model.to(device).eval()


def read_state(file: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file or from a PyTorch checkpoint, of which only tensors are read."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a .safetensors or .pth file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read as weights ({first_line}): give .safetensors or .pth") from error
    state = state.get("model", state.get("state_dict", state)) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{file} holds no state dict of tensors: give the weights themselves")
    return dict(state)


def load_weights(model: MaskRCNN, file: str | Path) -> None:
    """Start `model` from a file: our own weights, or a torchvision ResNet's, which fill the body.

    Raises ValueError when tensors are missing, left over or of another shape.
    """
    state = read_state(file)
    if "conv1.weight" in state:
        state = {body_name(name): value for name, value in state.items() if not name.startswith("fc.")}
        own = {f"backbone.{k}" for k in model.backbone.state_dict() if k.startswith(("stem.", "stages."))}
        state = {k: v for k, v in state.items() if k in own or not k.endswith("num_batches_tracked")}
        _check_names(own, set(state), str(file))
        full = model.state_dict()
        state = {**full, **state}
    _load_strictly(model, state, str(file))


def body_name(name: str) -> str:
    """The name in our model of a tensor of torchvision's ResNet: layer1.0.conv1.weight -> backbone.stages.0.0...."""
    head, _, tail = name.partition(".")
    if head.startswith("layer"):
        return f"backbone.stages.{int(head[5:]) - 1}.{tail}"
    return f"backbone.stem.{ {'conv1': 0, 'bn1': 1}.get(head, head) }.{tail}"


def _check_names(expected: set[str], given: set[str], file: str) -> None:
    missing, left_over = sorted(expected - given), sorted(given - expected)
    if missing or left_over:
        raise ValueError(
            f"{file} does not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(left_over)} have no place {left_over[:3]}; check backbone.name and backbone.norm"
        )


def _load_strictly(model: MaskRCNN, state: Mapping[str, Tensor], file: str) -> None:
    own = model.state_dict()
    _check_names(set(own), set(state), file)
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(value.shape)}, but the model's is {tuple(own[name].shape)}: "
                "num_classes or a width differs"
            )
    model.load_state_dict(state)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's maskrcnn_resnet50_fpn state dict under our names; background rows of boxes and masks go."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("backbone.body."):
            new = body_name(name.removeprefix("backbone.body."))
        else:
            new = _TORCHVISION_NAMES[name.rpartition(".")[0]] + "." + name.rpartition(".")[2]
        if new.startswith("roi_heads.box_head.box_deltas"):
            value = value[4:]
        elif new.startswith("roi_heads.mask_head.mask_logits"):
            value = value[1:]
        renamed[new] = value
    return renamed


_TORCHVISION_NAMES = {
    **{f"backbone.fpn.inner_blocks.{i}.0": f"backbone.lateral.{i}" for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.0": f"backbone.output.{i}" for i in range(4)},
    "rpn.head.conv.0.0": "rpn.conv",
    "rpn.head.cls_logits": "rpn.objectness",
    "rpn.head.bbox_pred": "rpn.deltas",
    "roi_heads.box_head.fc6": "roi_heads.box_head.fc1",
    "roi_heads.box_head.fc7": "roi_heads.box_head.fc2",
    "roi_heads.box_predictor.cls_score": "roi_heads.box_head.class_logits",
    "roi_heads.box_predictor.bbox_pred": "roi_heads.box_head.box_deltas",
    **{f"roi_heads.mask_head.{i}.0": f"roi_heads.mask_head.convs.{i}.0" for i in range(4)},
    "roi_heads.mask_predictor.conv5_mask": "roi_heads.mask_head.deconv",
    "roi_heads.mask_predictor.mask_fcn_logits": "roi_heads.mask_head.mask_logits",
}
