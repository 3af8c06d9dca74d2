"""Loads the compiled operators and registers what Python adds: output shapes (fake kernels) and gradients."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REMEDY = (
    "build it with `pip install --no-build-isolation -e .` in the repository's root, "
    "with a C++ compiler and torch >= 2.11"
)


class Rule(IntEnum):
    """How an operator lays a RoI over the feature map: `enum class Rule` in csrc/sampling.h says what each does."""

    ALIGN = 0
    ALIGN_LEGACY = 1
    WARP_INCLUSIVE = 2
    WARP_EXCLUSIVE = 3
    WARP_MNC = 4
    POOL = 5
    PRECISE = 6


def find() -> Path:
    """The library beside this file; else that of an installed mrcnn, for a copy of the Python code alone."""
    own = Path(__file__).with_name("_C.abi3.so")
    installed = (Path(folder, "mrcnn", "ops", own.name) for folder in sys.path)
    return next((path for path in (own, *installed) if path.is_file()), own)


LIBRARY = find()


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


@torch.library.register_fake("mrcnn::roi_mean")
def _roi_mean_fake(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    spatial_scales: Sequence[float],
    output_height: int,
    output_width: int,
    rule: int,
    sampling_ratio: int,
) -> Tensor:
    return features[0].new_empty(rois.shape[0], features[0].shape[1], output_height, output_width)


@torch.library.register_fake("mrcnn::roi_mean_backward")
def _roi_mean_backward_fake(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    spatial_scales: Sequence[float],
    rule: int,
    sampling_ratio: int,
) -> list[Tensor]:
    return [level.new_empty(level.shape) for level in features]


@torch.library.register_fake("mrcnn::roi_max")
def _roi_max_fake(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    spatial_scales: Sequence[float],
    output_height: int,
    output_width: int,
    rule: int,
    sampling_ratio: int,
) -> tuple[Tensor, Tensor]:
    output = features[0].new_empty(rois.shape[0], features[0].shape[1], output_height, output_width)
    return output, torch.empty_like(output, dtype=torch.int32)


@torch.library.register_fake("mrcnn::roi_max_backward")
def _roi_max_backward_fake(
    grad: Tensor,
    argmax: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    spatial_scales: Sequence[float],
    rule: int,
    sampling_ratio: int,
) -> list[Tensor]:
    return [level.new_empty(level.shape) for level in features]


@torch.library.register_fake("mrcnn::precise_roi_grad")
def _precise_roi_grad_fake(
    grad: Tensor, features: Sequence[Tensor], rois: Tensor, levels: Tensor, spatial_scales: Sequence[float]
) -> Tensor:
    return rois.new_empty(rois.shape)


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


@torch.library.register_fake("mrcnn::resize_masks")
def _resize_masks_fake(
    ends: Tensor, offsets: Tensor, height: int, width: int, new_height: int, new_width: int
) -> tuple[Tensor, Tensor]:
    runs = torch.library.get_ctx().new_dynamic_size()  # depends on the outlines
    return ends.new_empty(runs), torch.empty_like(offsets)


@torch.library.register_fake("mrcnn::rle_encode")
def _rle_encode_fake(ends: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return ends.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8), torch.empty_like(offsets)


@torch.library.register_fake("mrcnn::rle_decode")
def _rle_decode_fake(text: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return text.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32), torch.empty_like(offsets)


@torch.library.register_fake("mrcnn::draw_polygons")
def _draw_polygons_fake(
    points: Tensor, polygons: Tensor, masks: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    return points.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int32), torch.empty_like(masks)


@torch.library.register_fake("mrcnn::enlarge_image")
def _enlarge_image_fake(image: Tensor, out: Tensor) -> None:
    pass  # what it writes is in `out`


@torch.library.register_fake("mrcnn::nms")
def _nms_fake(boxes: Tensor, groups: Tensor, counts: Tensor, iou_threshold: float, top_n: int) -> Tensor:
    return groups.new_empty(boxes.shape[0], top_n)


# A mean is linear in the features: its backward needs only their shapes, and the backward of that is the forward
# again. RoIs have a gradient in precise pooling alone, where the output moves smoothly with them.


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, ctx.scales, _, _, ctx.rule, ctx.sampling_ratio = inputs
    ctx.save_for_backward(rois, levels, *features)


def _roi_mean_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, levels, *features = ctx.saved_tensors
    ops, to_features, to_rois = torch.ops.mrcnn, [None] * len(features), None
    if any(ctx.needs_input_grad[0]):
        to_features = ops.roi_mean_backward(grad, features, rois, levels, ctx.scales, ctx.rule, ctx.sampling_ratio)
    if ctx.rule == Rule.PRECISE and ctx.needs_input_grad[1]:
        to_rois = ops.precise_roi_grad(grad, features, rois, levels, ctx.scales)
    return to_features, to_rois, None, None, None, None, None, None


def _save_mean_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, features, rois, levels, ctx.scales, ctx.rule, ctx.sampling_ratio = inputs
    ctx.output_size = grad.shape[2:]
    ctx.levels = len(features)
    ctx.save_for_backward(rois, levels)


def _roi_mean_backward_grad(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rois, levels = ctx.saved_tensors
    if ctx.rule == Rule.PRECISE and ctx.needs_input_grad[2]:
        _no_second_derivative(ctx)
    grad = torch.ops.mrcnn.roi_mean(grads, rois, levels, ctx.scales, *ctx.output_size, ctx.rule, ctx.sampling_ratio)
    return grad, [None] * ctx.levels, None, None, None, None, None


def _save_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, rois, levels, ctx.scales, _, _, ctx.rule, ctx.sampling_ratio = inputs
    ctx.save_for_backward(output[1], rois, levels, *features)


def _roi_max_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    argmax, rois, levels, *features = ctx.saved_tensors
    grads = torch.ops.mrcnn.roi_max_backward(
        grad, argmax, features, rois, levels, ctx.scales, ctx.rule, ctx.sampling_ratio
    )
    return grads, None, None, None, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("a RoI operator's maximum and its gradient in the RoIs have no second derivative")


torch.library.register_autograd("mrcnn::roi_mean", _roi_mean_grad, setup_context=_save_mean)
torch.library.register_autograd("mrcnn::roi_mean_backward", _roi_mean_backward_grad, setup_context=_save_mean_backward)
torch.library.register_autograd("mrcnn::roi_max", _roi_max_grad, setup_context=_save_max)
torch.library.register_autograd("mrcnn::roi_max_backward", _no_second_derivative, setup_context=_save_nothing)
torch.library.register_autograd("mrcnn::precise_roi_grad", _no_second_derivative, setup_context=_save_nothing)
