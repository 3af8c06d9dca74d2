"""Pooling from a feature pyramid: each RoI reads the level that suits its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mrcnn.ops._checks import check_choice, check_positive, check_rois
from mrcnn.ops.roi import Reduction, precise_roi_pool, roi_align, roi_pool, roi_warp

Operator = Literal["align", "pool", "warp", "precise"]


def assign_levels(boxes: Tensor, *, strides: Sequence[int], canonical_size: float = 224.0) -> Tensor:
    """Which feature level each RoI reads: equation 1 of the FPN paper (Lin et al., 2017).

    A RoI of `canonical_size` reads stride 16, one of half that side stride 8, and so on, as far as there are levels.

    Args:
        boxes: (R, 4) xyxy in pixels of the image.
        strides: image pixels per feature pixel of each level, each twice the one before.
        canonical_size: side in pixels, that of the ImageNet crops in the paper.

    Returns:
        (R,) int64, 0 for the first of `strides`, which a NaN box reads too.

    Raises:
        ValueError: boxes of a wrong shape, or strides that do not double from a power of two on.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes is {tuple(boxes.shape)}: give (R, 4): x1, y1, x2, y2")
    check_positive("strides", *strides)
    if not canonical_size > 0:
        raise ValueError(f"canonical_size is {canonical_size}: give pixels, 224 as in the paper")
    if len(strides) == 1:
        return torch.zeros(boxes.shape[0], dtype=torch.int64, device=boxes.device)
    finest = strides[0].bit_length() - 1
    if list(strides) != [1 << (finest + i) for i in range(len(strides))]:
        raise ValueError(f"strides is {list(strides)}: give powers of two, each twice the one before")
    boxes = boxes.detach()
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    scale = (sides[:, 0] * sides[:, 1]).sqrt() / canonical_size
    level = (4 + (scale + 1e-8).log2() + 1e-6).floor()  # the paper's, whose level k has stride 2^k
    return (level - finest).nan_to_num(nan=0.0).clamp(0, len(strides) - 1).to(torch.int64)


def multilevel_roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    *,
    operator: Operator = "align",
    reduce: Reduction = "mean",
    output_size: int,
    strides: Sequence[int],
    sampling_ratio: int = 2,
    aligned: bool = True,
    canonical_size: float = 224.0,
) -> Tensor:
    """RoIs of all sizes pooled from a feature pyramid in one call, each from the level that `assign_levels` gives it.

    Nothing in it waits for the GPU. With a single level that one serves all RoIs.

    Args:
        features: (B, C, H_l, W_l) of each level, finest first.
        rois: (R, 5): index of the image in the batch, then x1, y1, x2, y2 in pixels of the image.
        operator: `roi_align`, `roi_pool`, `roi_warp` (inclusive) or `precise_roi_pool`.
        reduce: of RoIAlign's and RoIWarp's samples. RoIPool is a maximum and precise pooling a mean, whatever this is.
        output_size: side of the square output.
        strides: image pixels per feature pixel of each level, each twice the one before.
        sampling_ratio: of RoIAlign and RoIWarp: see there.
        aligned: of RoIAlign: see there.
        canonical_size: side in pixels of a RoI that reads stride 16.

    Returns:
        (R, C, output_size, output_size) of the features' dtype.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device, or an operator that there is not.
    """
    check_choice("operator", operator, get_args(Operator))
    if len(strides) != len(features):
        raise ValueError(f"strides has {len(strides)} values for {len(features)} feature levels: give one each")
    check_rois(rois, columns=5, device=rois.device)
    levels = assign_levels(rois[:, 1:], strides=strides, canonical_size=canonical_size)
    scales = [1 / stride for stride in strides]
    if operator == "pool":
        return roi_pool(features, rois, levels, output_size=output_size, spatial_scale=scales)
    if operator == "precise":
        return precise_roi_pool(features, rois, levels, output_size=output_size, spatial_scale=scales)
    sampling: dict[str, Any] = {"sampling_ratio": sampling_ratio, "reduce": reduce}
    if operator == "warp":
        return roi_warp(features, rois, levels, output_size=output_size, spatial_scale=scales, **sampling)
    return roi_align(features, rois, levels, output_size=output_size, spatial_scale=scales, aligned=aligned, **sampling)
