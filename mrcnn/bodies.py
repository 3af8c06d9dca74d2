"""ImageNet weights of a body: whose they are, what they expect of their input, and our names for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mrcnn.config import InputConfig
from mrcnn.peer_names import caffe2_body_parts, detectron2_body_parts, inverse, rename, torchvision_body_parts

State = Mapping[str, Tensor]

STEM = "stem.0.weight"

TORCHVISION_INPUT = InputConfig()
MSRA_INPUT = InputConfig(channels="bgr", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0))
X101_INPUT = InputConfig(channels="bgr", mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395))


@dataclass(frozen=True)
class Body:
    """A ResNet's weights."""

    source: str
    """Whose they are"""
    state: dict[str, Tensor]
    """Under our names, without "backbone." """
    unknown: list[str]
    """Names in the file that are no part of a ResNet"""
    input: InputConfig
    """Order, mean and std of the channels that its first convolution was trained for"""
    stride_in_1x1: bool
    """Where its bottlenecks halve the resolution"""


def read_body(state: State, *, norm_eps: float) -> Body | None:
    """The body in torchvision's ResNet, detectron2's or Caffe2's names; None if it is something else.

    Caffe2's normalisation has a scale and a shift only: it gets mean 0 and a variance with which norm_eps makes 1.
    """
    readers: dict[str, Callable[[State], Body]] = {
        "conv1.weight": _torchvision_body, "stem.conv1.weight": _detectron2_body, "conv1_w": _caffe2_body,
    }  # fmt: skip
    for first, reader in readers.items():
        if first in state:
            body = reader({name: v for name, v in state.items() if not name.endswith("num_batches_tracked")})
            add_statistics(body.state, eps=norm_eps)
            return body
    return None


def _torchvision_body(state: State) -> Body:
    known = {name: value for name, value in state.items() if not name.startswith("fc.")}
    renamed, unknown = rename(known, inverse(torchvision_body_parts()))
    return Body("torchvision", renamed, unknown, TORCHVISION_INPUT, stride_in_1x1=False)


def _detectron2_body(state: State) -> Body:
    """What detectron2 makes of torchvision's file: only names differ."""
    known = {name: value for name, value in state.items() if not name.startswith("stem.fc.")}
    renamed, unknown = rename(known, inverse(detectron2_body_parts()))
    return Body("torchvision, as detectron2 has it", renamed, unknown, TORCHVISION_INPUT, stride_in_1x1=False)


def _caffe2_body(state: State) -> Body:
    """MSRA's ResNets, or Detectron's ResNeXt, which has grouped convolutions and another input.

    The classifier, a bias of the first convolution and the optimiser's momentum have no use in a detector.
    """
    useless = r"(fc1000|pred|last_out)_|conv1_b$|.*_momentum$"
    words = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
    dotted = {}
    for name, value in state.items():
        part, _, word = name.rpartition("_")
        if not re.match(useless, name):
            dotted[f"{part}.{words.get(word, word)}"] = value
    renamed, unknown = rename(dotted, inverse(caffe2_body_parts()))
    conv = renamed.get("stages.0.0.conv2.weight")
    if conv is not None and conv.shape[0] != conv.shape[1]:
        return Body("Detectron's ResNeXt", renamed, unknown, X101_INPUT, stride_in_1x1=False)
    return Body("MSRA", renamed, unknown, MSRA_INPUT, stride_in_1x1=True)


def add_statistics(state: dict[str, Tensor], *, eps: float) -> None:
    """Give normalisation that is a scale and a shift only the mean and the variance that leave it so, in place."""
    for name in [name for name in state if re.search(r"(bn\d|downsample\.1|stem\.1)\.weight$", name)]:
        part = name.removesuffix(".weight")
        if f"{part}.running_mean" not in state:
            state[f"{part}.running_mean"] = torch.zeros_like(state[name])
            state[f"{part}.running_var"] = torch.full_like(state[name], 1.0 - eps)


def adapt_stem(weight: Tensor, given: InputConfig, wanted: InputConfig) -> Tensor:
    """The first convolution (C, 3, 7, 7) for another order and scale of its input channels; the same if they agree.

    The mean cannot be moved into a convolution without bias, which pads with zeros.

    Raises:
        ValueError: where the means differ by more than a grey level.
    """
    swap = given.channels != wanted.channels
    mean, std = (_reordered(values, swap) for values in (given.mean, given.std))
    if max(abs(a - b) for a, b in zip(mean, wanted.mean, strict=True)) > 1:
        raise ValueError(
            f"input.mean is {wanted.mean}, but the weights were trained with {mean} in the order "
            f"{wanted.channels}: set input.mean to that"
        )
    if swap:
        weight = weight.flip(1)
    if std == tuple(wanted.std):
        return weight
    scale = weight.new_tensor(wanted.std, dtype=torch.float64) / weight.new_tensor(std, dtype=torch.float64)
    return (weight.double() * scale[:, None, None]).to(weight.dtype)


def _reordered(values: Sequence[float], swap: bool) -> tuple[float, ...]:
    return tuple(reversed(values)) if swap else tuple(values)
