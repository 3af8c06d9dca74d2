"""Loads the compiled operators and registers what Python adds: output shapes (fake kernels) and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_C.abi3.so")
REMEDY = (
    "build it with `pip install --no-build-isolation -e .` in the repository's root, "
    "with a C++ compiler and torch >= 2.11"
)


def load(path: Path = LIBRARY) -> None:
    """Registers the operators of a built library as `torch.ops.mrcnn.*`.

    Raises:
        ImportError: the library is missing or does not fit this torch; names the remedy.
    """
    if not path.is_file():
        raise ImportError(f"the compiled operators {path} are missing: {REMEDY}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"the compiled operators do not load with torch {torch.__version__} ({error}): {REMEDY}"
        ) from error


load()


@torch.library.register_fake("mrcnn::roi_align")
def _roi_align_fake(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    spatial_scales: Sequence[float],
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return features[0].new_empty(rois.shape[0], features[0].shape[1], output_height, output_width)


@torch.library.register_fake("mrcnn::roi_align_backward")
def _roi_align_backward_fake(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> list[Tensor]:
    return [level.new_empty(level.shape) for level in features]


@torch.library.register_fake("mrcnn::rle_roi_align")
def _rle_roi_align_fake(
    ends: Tensor,
    offsets: Tensor,
    rois: Tensor,
    instances: Tensor,
    sizes: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return rois.new_empty(rois.shape[0], output_size, output_size)


# RoIAlign is linear in the features: its backward needs only their shapes, and the backward of that is the
# forward again. RoIs have no gradient, as in torchvision and detectron2.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, ctx.scales, _, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(rois, levels, *features)


def _roi_align_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels, *features = ctx.saved_tensors
    grads = torch.ops.mrcnn.roi_align_backward(
        grad, features, rois, levels, ctx.scales, ctx.sampling_ratio, ctx.aligned
    )
    return grads, None, None, None, None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, features, rois, levels, ctx.scales, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.output_size = grad.shape[2:]
    ctx.levels = len(features)
    ctx.save_for_backward(rois, levels)


def _roi_align_backward_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rois, levels = ctx.saved_tensors
    grad = torch.ops.mrcnn.roi_align(grads, rois, levels, ctx.scales, *ctx.output_size, ctx.sampling_ratio, ctx.aligned)
    return grad, [None] * ctx.levels, None, None, None, None, None


torch.library.register_autograd("mrcnn::roi_align", _roi_align_grad, setup_context=_save)
torch.library.register_autograd("mrcnn::roi_align_backward", _roi_align_backward_grad, setup_context=_save_backward)
