"""Models between our folder and the peers' files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mrcnn import load_model, save_model
from mrcnn.checkpoints import read_state
from mrcnn.config import ModelConfig
from mrcnn.peer_names import Classes, Peer
from mrcnn.peer_settings import detectron2_settings
from mrcnn.peers import PeerModel, from_detectron2, from_torchvision, to_detectron2, to_torchvision


@dataclass(frozen=True)
class Conversion:
    """What was recognised, and where it went."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def convert_from(
    peer: Peer,
    file: str,
    out: str,
    *,
    classes: Classes = "all",
    norm_eps: float | None = None,
    stride_in_1x1: bool | None = None,
) -> Conversion:
    """A peer's file of weights -> a model's folder.

    The last three are arguments of `from_torchvision` and `from_detectron2`, which say what they mean.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not understood, or `out` is a file.
    """
    _refuse_uris(file, out)
    _refuse(Path(out).is_file(), f"{out} is a file: give the folder for the model")
    state = read_state(file)
    try:
        model = _from(peer, state, classes=classes, norm_eps=norm_eps, stride_in_1x1=stride_in_1x1)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    save_model(model.build(), out)
    named = [category.name for category in model.categories]
    return Conversion(
        (
            f"{peer}: {architecture_line(model.config)}",
            f"classes: {len(named)}, {', '.join(named[:3])}{', ...' if len(named) > 3 else ''}",
            *settings_lines(model.config),
            f"{len(model.state)} tensors written to {out}",
        )
    )


def convert_to(peer: Peer, folder: str, out: str) -> Conversion:
    """A model's folder -> a peer's state dict in a .pth file.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if the peer has no such model, or `out` is a folder.
    """
    _refuse_uris(folder, out)
    _refuse(Path(out).is_dir(), f"{out} is a folder: give the .pth file for the weights")
    model = load_model(folder)
    to = to_torchvision if peer == "torchvision" else to_detectron2
    state = to(model.state_dict(), model.config)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.save(state if peer == "torchvision" else {"model": state}, out)
    written = f"{len(state)} tensors written to {out} for {peer}"
    if peer == "torchvision":
        return Conversion((architecture_line(model.config), written, f"num_classes={model.config.num_classes + 1}"))
    settings = (f"{name} {value}" for name, value in detectron2_settings(model.config).items())
    return Conversion((architecture_line(model.config), written, "its configuration has to say:", *settings))


def architecture_line(config: ModelConfig) -> str:
    """One line that says what a model is made of."""
    heads = ["boxes"] + ["masks"] * (config.mask.head != "none")
    heads += [f"{config.keypoint.num_keypoints} keypoints"] * (config.keypoint.num_keypoints > 0)
    backbone = config.backbone
    norm = f"{backbone.norm} with eps {backbone.norm_eps:g}"
    return f"{backbone.name} with {backbone.features.upper()}, {norm}, heads for {', '.join(heads)}"


def settings_lines(config: ModelConfig) -> tuple[str, ...]:
    """What was taken for granted of a peer's model beside its tensors."""
    given, body = config.input, config.backbone
    pixels = (
        f"input: {given.channels.upper()}, mean {given.mean}, std {given.std}, shorter side {given.shorter_side}, "
        f"longer at most {given.longer_side}, {given.resize}"
    )
    if body.name in ("resnet18", "resnet34"):  # their blocks have no 1x1 convolution to stride in
        return (pixels,)
    stride = "the 1x1" if body.stride_in_1x1 else "the 3x3"
    return (pixels, f"bottlenecks halve the resolution in {stride} convolution")


def _from(
    peer: Peer,
    state: dict[str, torch.Tensor],
    *,
    classes: Classes,
    norm_eps: float | None,
    stride_in_1x1: bool | None,
) -> PeerModel:
    if peer == "torchvision":
        _refuse(stride_in_1x1 is not None, "stride_in_1x1 is detectron2's: leave it out for torchvision")
        return from_torchvision(state, norm_eps=norm_eps, classes=classes)
    _refuse(norm_eps is not None, "norm_eps is torchvision's: leave it out for detectron2, which has 1e-5")
    _refuse(classes != "all", "classes is torchvision's: leave it out for detectron2, whose classes are all used")
    return from_detectron2(state, stride_in_1x1=stride_in_1x1)


def _refuse_uris(*paths: str) -> None:
    for path in paths:
        _refuse("://" in path, f"{path} is a URI, but weights are converted between local files: copy it first")


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)
