"""Compiled operators for the CPU and for CUDA: RoIAlign of a feature pyramid, and of run-length masks.

`mrcnn.ops.reference` has the same two functions in plain PyTorch. Shape letters as in `mrcnn.structures`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrcnn.ops import _library  # noqa: F401  importing it registers torch.ops.mrcnn
from mrcnn.structures import RunLengthMasks

__all__ = ["cuda_compiled", "rle_roi_align", "roi_align"]

MAX_LEVELS = 8
"""Feature levels that one call takes (`kMaxLevels` of the kernels)."""
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def cuda_compiled() -> bool:
    """Whether the library was built with CUDA kernels, which says nothing of a GPU being there."""
    return torch.ops.mrcnn.cuda_version() > 0


def roi_align(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, section 3) of one feature map or of all levels of a pyramid at once.

    Every output cell is the mean of bilinear samples on a regular grid in its part of the RoI; nothing is
    rounded. The numbers are those of `torchvision.ops.roi_align`. Differentiable in `features` (twice, if
    need be), not in `rois`. The backward pass uses no atomics: its bits are the same in every run, on the CPU
    and with CUDA.

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

    Returns:
        (R, C, height, width) of the features' dtype.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device.
        RuntimeError: on the CPU, a batch index or a level out of range. On CUDA, where looking would wait for
            the GPU, such a RoI gives 0. There, too, an output over 64x64 has no backward.
    """
    pyramid = [features] if isinstance(features, Tensor) else list(features)
    scales = [spatial_scale] if isinstance(spatial_scale, (int, float)) else list(spatial_scale)
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    _check_pyramid(pyramid, scales)
    _check_rois(rois, columns=5, device=pyramid[0].device)
    _check_positive("output_size", height, width)
    if levels is None:
        if len(pyramid) > 1:
            raise ValueError(f"levels is None but there are {len(pyramid)} feature levels: say which each RoI reads")
        levels = torch.zeros(rois.shape[0], dtype=torch.int64, device=rois.device)
    _check_index("levels", levels, rois)

    dtype = pyramid[0].dtype
    if pyramid[0].device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        pyramid = [level.float() for level in pyramid]
    coordinates = rois.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    output = torch.ops.mrcnn.roi_align(pyramid, coordinates, levels, scales, height, width, sampling_ratio, aligned)
    return output.to(dtype)


def rle_roi_align(
    masks: RunLengthMasks,
    rois: Tensor,
    instances: Tensor,
    sizes: Tensor,
    *,
    output_size: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Mask targets from run lengths: RoIAlign of a binary mask that is never decoded.

    Equals `roi_align` with spatial_scale 1 of the decoded (1, 1, H, W) mask, to float rounding. No gradient.

    Args:
        masks: run lengths of all instances.
        rois: (R, 4) float32 xyxy in pixels of the image. R may be 0.
        instances: (R,) int64, the mask that each RoI reads. One without runs reads as empty.
        sizes: (R, 2) int64, height and width of the image that this mask lies over.
        output_size: side of the square output.
        sampling_ratio: samples per cell along each axis; <= 0 takes as many as the cell is long, rounded up.
        aligned: pixel centres at half-integer coordinates; see `roi_align`.

    Returns:
        (R, output_size, output_size) float32 in 0..1: how much of each cell is inside the mask.

    Raises:
        ValueError: an argument of a wrong shape, dtype or device.
        RuntimeError: on the CPU, an instance out of range or runs that do not fill their image. On CUDA,
            where looking would wait for the GPU, the pixels that no run covers read as 0.
    """
    device = masks.ends.device
    _check_tensor("masks.ends", masks.ends, shape="(T,)", dims=1, dtype=torch.int32, device=device)
    _check_tensor("masks.offsets", masks.offsets, shape="(I + 1,)", dims=1, dtype=torch.int64, device=device)
    if masks.offsets.shape[0] == 0:
        raise ValueError("masks.offsets is empty: give I + 1 offsets, [0] where there are no instances")
    _check_rois(rois, columns=4, device=device)
    _check_index("instances", instances, rois)
    _check_tensor("sizes", sizes, shape="(R, 2)", dims=2, dtype=torch.int64, device=device)
    if sizes.shape != (rois.shape[0], 2):
        raise ValueError(f"sizes is {tuple(sizes.shape)} but rois is {tuple(rois.shape)}: give (R, 2), one row a RoI")
    _check_positive("output_size", output_size)
    return torch.ops.mrcnn.rle_roi_align(
        masks.ends,
        masks.offsets,
        rois.detach().float(),
        instances,
        sizes,
        output_size,
        sampling_ratio,
        aligned,
    )


def _check_pyramid(pyramid: list[Tensor], scales: list[float]) -> None:
    if not 1 <= len(pyramid) <= MAX_LEVELS:
        raise ValueError(f"features has {len(pyramid)} levels: give 1 to {MAX_LEVELS}")
    if len(scales) != len(pyramid):
        raise ValueError(f"spatial_scale has {len(scales)} values for {len(pyramid)} feature levels: give one each")
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


def _check_rois(rois: Tensor, *, columns: int, device: torch.device) -> None:
    if rois.dim() != 2 or rois.shape[1] != columns:
        layout = "batch index, x1, y1, x2, y2" if columns == 5 else "x1, y1, x2, y2"
        raise ValueError(f"rois is {tuple(rois.shape)}: give (R, {columns}): {layout}")
    if rois.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rois is {rois.dtype}: give float32 (half precision is too coarse for coordinates)")
    _check_device("rois", rois, device)


def _check_index(name: str, index: Tensor, rois: Tensor) -> None:
    _check_tensor(name, index, shape="(R,)", dims=1, dtype=torch.int64, device=rois.device)
    if index.shape[0] != rois.shape[0]:
        raise ValueError(f"{name} has {index.shape[0]} entries for {rois.shape[0]} RoIs: give one each")


def _check_tensor(
    name: str, tensor: Tensor, *, shape: str, dims: int, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dim() != dims or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}: give {shape} {dtype}")
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: move it to {device}, where the other arguments are")


def _check_positive(name: str, *values: int) -> None:
    if min(values) < 1:
        raise ValueError(f"{name} is {'x'.join(map(str, values))}: give at least 1")
