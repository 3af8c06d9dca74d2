"""The paper's RoI operators, each on one feature map or on all levels of a pyramid at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mrcnn.ops._checks import check_choice, check_index, check_positive, check_pyramid, check_rois
from mrcnn.ops._library import Rule

Reduction = Literal["mean", "max"]
WarpVariant = Literal["inclusive", "exclusive", "mnc"]

_WARP_RULES = {"inclusive": Rule.WARP_INCLUSIVE, "exclusive": Rule.WARP_EXCLUSIVE, "mnc": Rule.WARP_MNC}


def roi_align(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = True,
    reduce: Reduction = "mean",
) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, section 3) of one feature map or of all levels of a pyramid at once.

    Every output cell is the mean, or the maximum, of bilinear samples on a regular grid in its part of the RoI;
    nothing is rounded. The means are those of `torchvision.ops.roi_align`. Differentiable in `features` (the mean
    twice, if need be), not in `rois`. The backward pass uses no atomics: its bits are the same in every run, on
    the CPU and with CUDA.

    Args:
        features: (B, C, H_l, W_l), or one such tensor a level, at most 8. float32 or float64; float16 and
            bfloat16 too: the CUDA kernels sum them in float32, the CPU converts them to float32 and back.
        rois: (R, 5) float32 or float64: index of the image in the batch, then x1, y1, x2, y2 in pixels of the
            image. R may be 0. Computed with in float32 unless the features are float64.
        levels: (R,) int64, the level that each RoI reads. May be left out where there is one level.
        output_size: height and width of the output, or the side of a square.
        spatial_scale: feature pixels per image pixel (1 / stride), one for each level.
        sampling_ratio: samples per cell along each axis; <= 0 takes as many as the cell is long, rounded up.
        aligned: pixel centres at half-integer coordinates (detectron2's ROIAlignV2). False samples half a
            pixel off and enlarges RoIs to at least one feature pixel, as torchvision's detectors do.
        reduce: "mean", or "max", whose gradient goes to the first sample that has the maximum. A sample more than
            a pixel outside the map counts as 0 in both.

    Returns:
        (R, C, height, width) of the features' dtype; 0 where a cell has no samples.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device.
        RuntimeError: on the CPU, a batch index or a level out of range. On CUDA, where looking would wait for
            the GPU, such a RoI gives 0. There, too, a mean's output over 64x64 has no backward.
    """
    check_choice("reduce", reduce, ("mean", "max"))
    call = _Call.of(features, rois, levels, output_size=output_size, spatial_scale=spatial_scale)
    return call.run(Rule.ALIGN if aligned else Rule.ALIGN_LEGACY, sampling_ratio, reduce)


def roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
) -> Tensor:
    """RoIPool (Girshick, Fast R-CNN, section 2.1): corners and cells rounded to pixels, their maximum taken.

    The numbers are those of `torchvision.ops.roi_pool`. A NaN in a cell is its maximum. The gradient, in `features`
    alone, goes to the first pixel that has the maximum.

    Args, Returns and Raises: see `roi_align`.
    """
    call = _Call.of(features, rois, levels, output_size=output_size, spatial_scale=spatial_scale)
    return call.run(Rule.POOL, 0, "max")


def roi_warp(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    sampling_ratio: int = 2,
    reduce: Reduction = "mean",
    variant: WarpVariant = "inclusive",
) -> Tensor:
    """RoIWarp (Dai et al., MNC, 2016), as the Mask R-CNN paper compares with it in its Table 2c.

    The RoI's corners are rounded to the feature grid, halves away from zero; the rounded RoI is then sampled
    bilinearly as RoIAlign would.

    Args:
        sampling_ratio: samples per cell along each axis; <= 0 takes as many as the cell is long, rounded up, at
            least one.
        variant: "inclusive" counts the pixels of both corners, as RoIPool does, so a RoI is at least a pixel long;
            "exclusive" is one shorter; "mnc" is MNC's own kernel: exclusive, one sample at the beginning of each cell
            whatever `sampling_ratio` and `reduce` are, 0 where that is over half a pixel outside.

    Other Args, Returns and Raises: see `roi_align`.
    """
    check_choice("reduce", reduce, ("mean", "max"))
    check_choice("variant", variant, tuple(_WARP_RULES))
    call = _Call.of(features, rois, levels, output_size=output_size, spatial_scale=spatial_scale)
    return call.run(_WARP_RULES[variant], sampling_ratio, reduce)


def precise_roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
) -> Tensor:
    """Precise RoI pooling (Jiang et al., IoU-Net, 2018): the mean of the interpolated map over each cell, exactly.

    The map is interpolated bilinearly, with zeros around it; its first pixel lies at 0, not at 0.5. A RoI without
    area, or reversed, gives 0. Differentiable in `features` and in the coordinates of `rois` (the batch index
    receives 0), in both without atomics.

    Args, Returns and Raises: see `roi_align`.
    """
    call = _Call.of(features, rois, levels, output_size=output_size, spatial_scale=spatial_scale)
    return call.run(Rule.PRECISE, 0, "mean")


@dataclass(frozen=True)
class _Call:
    """Checked arguments in the form that the kernels take them."""

    pyramid: list[Tensor]
    rois: Tensor
    levels: Tensor
    scales: list[float]
    size: tuple[int, int]

    @classmethod
    def of(
        cls,
        features: Tensor | Sequence[Tensor],
        rois: Tensor,
        levels: Tensor | None,
        *,
        output_size: int | tuple[int, int],
        spatial_scale: float | Sequence[float],
    ) -> _Call:
        pyramid = [features] if isinstance(features, Tensor) else list(features)
        scales = [spatial_scale] if isinstance(spatial_scale, (int, float)) else list(spatial_scale)
        size = (output_size, output_size) if isinstance(output_size, int) else output_size
        check_pyramid(pyramid, scales)
        check_rois(rois, columns=5, device=pyramid[0].device)
        check_positive("output_size", *size)
        if levels is None:
            if len(pyramid) > 1:
                raise ValueError(
                    f"levels is None but there are {len(pyramid)} feature levels: say which each RoI reads"
                )
            levels = torch.zeros(rois.shape[0], dtype=torch.int64, device=rois.device)
        check_index("levels", levels, rois)
        return cls(pyramid, rois, levels, scales, size)

    def run(self, rule: Rule, sampling_ratio: int, reduce: Reduction) -> Tensor:
        pyramid, dtype = self.pyramid, self.pyramid[0].dtype
        if pyramid[0].device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            pyramid = [level.float() for level in pyramid]
        rois = self.rois if rule == Rule.PRECISE else self.rois.detach()
        rois = rois.to(torch.float64 if dtype == torch.float64 else torch.float32)
        arguments = (pyramid, rois, self.levels, self.scales, *self.size, int(rule), sampling_ratio)
        if reduce == "mean":
            return torch.ops.mrcnn.roi_mean(*arguments).to(dtype)
        return torch.ops.mrcnn.roi_max(*arguments)[0].to(dtype)
