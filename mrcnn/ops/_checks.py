"""Argument checks of the operators: the message names the argument, its value, the bound and the remedy."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

MAX_LEVELS = 8
"""Feature levels that one call takes (`kMaxLevels` of the kernels)."""
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_pyramid(pyramid: list[Tensor], scales: list[float]) -> None:
    if not 1 <= len(pyramid) <= MAX_LEVELS:
        raise ValueError(f"features has {len(pyramid)} levels: give 1 to {MAX_LEVELS}")
    if len(scales) != len(pyramid):
        raise ValueError(f"spatial_scale has {len(scales)} values for {len(pyramid)} feature levels: give one each")
    if not all(isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"spatial_scale is {scales}: give 1 / stride of each level")
    first = pyramid[0]
    for i, level in enumerate(pyramid):
        if level.dim() != 4:
            raise ValueError(f"features[{i}] is {tuple(level.shape)}: give (B, C, H, W)")
        if level.dtype not in _DTYPES:
            raise ValueError(f"features[{i}] is {level.dtype}: give float32, float64, float16 or bfloat16")
        if level.shape[:2] != first.shape[:2] or level.dtype != first.dtype or level.device != first.device:
            raise ValueError(
                f"features[{i}] is {tuple(level.shape)} {level.dtype} on {level.device} but features[0] is "
                f"{tuple(first.shape)} {first.dtype} on {first.device}: B, C, dtype and device must agree"
            )


def check_rois(rois: Tensor, *, columns: int, device: torch.device) -> None:
    if rois.dim() != 2 or rois.shape[1] != columns:
        layout = "batch index, x1, y1, x2, y2" if columns == 5 else "x1, y1, x2, y2"
        raise ValueError(f"rois is {tuple(rois.shape)}: give (R, {columns}): {layout}")
    if rois.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rois is {rois.dtype}: give float32 (half precision is too coarse for coordinates)")
    check_device("rois", rois, device)


def check_index(name: str, index: Tensor, rois: Tensor) -> None:
    check_tensor(name, index, shape="(R,)", dims=1, dtype=torch.int64, device=rois.device)
    if index.shape[0] != rois.shape[0]:
        raise ValueError(f"{name} has {index.shape[0]} entries for {rois.shape[0]} RoIs: give one each")


def check_tensor(name: str, tensor: Tensor, *, shape: str, dims: int, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dim() != dims or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}: give {shape} {dtype}")
    check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: move it to {device}, where the other arguments are")


def check_positive(name: str, *values: int) -> None:
    if not values or not all(isinstance(value, int) and value >= 1 for value in values):
        raise ValueError(f"{name} is {'x'.join(map(str, values))}: give at least 1")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: give {' or '.join(map(repr, choices))}")
