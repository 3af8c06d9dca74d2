"""Saving and loading models, and starting one from others' weights: our own, both peers', and their ImageNet bodies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mrcnn.bodies import STEM, Body, adapt_stem, read_body
from mrcnn.checkpoints import read_state
from mrcnn.coco_categories import COCO_CATEGORIES, COCO_CATEGORIES_WITH_GAPS
from mrcnn.config import InputConfig, ModelConfig
from mrcnn.model import MaskRCNN
from mrcnn.peers import (
    PeerModel,
    from_detectron2,
    from_torchvision,
    is_detectron2,
    is_torchvision,
    only_used_classes,
    to_detectron2,
    to_torchvision,
)
from mrcnn.settings import require
from mrcnn.structures import Category

__all__ = [
    "CONFIG_FILE",
    "FORMAT",
    "WEIGHTS_FILE",
    "PeerModel",
    "from_detectron2",
    "from_torchvision",
    "load_model",
    "load_weights",
    "model_files",
    "model_from_files",
    "read_state",
    "save_model",
    "state_bytes",
    "to_detectron2",
    "to_torchvision",
]

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FORMAT = "mrcnn-2"


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
    except ValueError as error:
        raise ValueError(f"{source}/{CONFIG_FILE}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}/{CONFIG_FILE} is damaged ({error!r}): export the model again") from error
    _load_strictly(model, state, f"{source}/{WEIGHTS_FILE}")
    return model.to(device).eval()


def load_weights(model: MaskRCNN, file: str | Path) -> None:
    """Start `model` from a file: a whole model (ours or a peer's) or an ImageNet body (torchvision's, detectron2's).

    A body fills res5 of a C4 head and a second backbone of the RPN, too. Where weights were trained for another order
    or scale of the input's channels than the model has, the first convolution is changed for that exactly; for another
    mean or another place of the stride they are refused.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: when tensors are missing, left over or of another shape, or do not fit the model's settings.
    """
    state = read_state(file)
    backbone = model.config.backbone
    body = read_body(state, norm_eps=backbone.norm_eps)
    if body is not None:
        _load_body(model, body, str(file))
    elif is_torchvision(state):
        _load_peer(model, from_torchvision(state, norm_eps=backbone.norm_eps), str(file))
    elif is_detectron2(state):
        _load_peer(model, from_detectron2(state), str(file))
    else:
        _load_strictly(model, state, str(file))


def _load_body(model: MaskRCNN, body: Body, file: str) -> None:
    _check_stride(model.config, body.stride_in_1x1, file)
    state = {**body.state, STEM: _stem(body.state[STEM], body.input, model.config.input, file)}
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    wanted = {name: body_name(name) for name in own if body_name(name) is not None}
    used = {name for name in wanted.values() if name is not None}
    _check_names(used, {*state, *body.unknown}, file)
    filled = {name: state[source] for name, source in wanted.items() if source is not None}
    _load_strictly(model, {**model.state_dict(), **filled}, file)


def _load_peer(model: MaskRCNN, given: PeerModel, file: str) -> None:
    if given.categories == COCO_CATEGORIES_WITH_GAPS and model.config.num_classes == len(COCO_CATEGORIES):
        given = only_used_classes(given)
    _check_stride(model.config, given.config.backbone.stride_in_1x1, file)
    stem = f"backbone.{STEM}"
    state = {**given.state, stem: _stem(given.state[stem], given.config.input, model.config.input, file)}
    counters = {name: v for name, v in model.state_dict().items() if name.endswith("num_batches_tracked")}
    kept = {name: v for name, v in state.items() if name in counters or not name.endswith("num_batches_tracked")}
    _load_strictly(model, {**counters, **kept}, file)


def body_name(name: str) -> str | None:
    """Which tensor of a body fills the one of this name in our model; None for what is no part of a body."""
    for prefix, place in (("backbone.", ""), ("rpn_backbone.", ""), ("roi_heads.res5.", "stages.3.")):
        rest = name.removeprefix(prefix)
        if rest != name and (place or rest.startswith(("stem.", "stages."))):
            return place + rest
    return None


def _check_stride(config: ModelConfig, stride_in_1x1: bool, file: str) -> None:
    has_1x1 = config.backbone.name not in ("resnet18", "resnet34")
    require(
        not has_1x1 or config.backbone.stride_in_1x1 == stride_in_1x1,
        "backbone.stride_in_1x1",
        config.backbone.stride_in_1x1,
        f"{stride_in_1x1} for {file}",
        "set it so, because the weights were trained with the stride there",
    )


def _stem(weight: Tensor, given: InputConfig, wanted: InputConfig, file: str) -> Tensor:
    try:
        return adapt_stem(weight, given, wanted)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


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
