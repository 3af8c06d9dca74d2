"""The compiled operators again in plain PyTorch: slow, short, for any device and dtype, differentiable.

They take one bilinear sample at a time, as the definition says, and share no code with the kernels, whose
oracle they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mrcnn.structures import RunLengthMasks


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
    """`mrcnn.ops.roi_align`, RoI by RoI, with its arguments and its result."""
    pyramid = [features] if isinstance(features, Tensor) else list(features)
    scales = [spatial_scale] if isinstance(spatial_scale, (int, float)) else list(spatial_scale)
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    pooled = []
    for r, (image, *box) in enumerate(rois.tolist()):
        level = 0 if levels is None else int(levels[r])
        x1, y1, x2, y2 = (value * scales[level] - 0.5 * aligned for value in box)
        plane = pyramid[level][int(image)]
        ys = _sample_points(y1, y2, size[0], sampling_ratio, aligned)
        xs = _sample_points(x1, x2, size[1], sampling_ratio, aligned)
        pooled.append(_mean_of_bins(plane, ys, xs, size))
    return torch.stack(pooled) if pooled else pyramid[0].sum() * pyramid[0].new_zeros(0, pyramid[0].shape[1], *size)


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
    """`mrcnn.ops.rle_roi_align` by decoding each RoI's whole mask, with its arguments; float64."""
    targets = rois.new_zeros(rois.shape[0], output_size, output_size, dtype=torch.float64)
    for r, instance in enumerate(instances.tolist()):
        runs = masks.ends[masks.offsets[instance] : masks.offsets[instance + 1]]
        if len(runs) == 0:
            continue
        bitmap = decode(runs, *sizes[r].tolist()).double()[None, None]
        roi = torch.cat([rois.new_zeros(1), rois[r]])[None].double()
        targets[r] = roi_align(
            bitmap,
            roi,
            output_size=output_size,
            spatial_scale=1.0,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )[0, 0]
    return targets


def decode(ends: Tensor, height: int, width: int) -> Tensor:
    """The (H, W) bool mask of one instance's run ends, which alternate 0, 1, 0, ... down the columns."""
    lengths = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
    ones = torch.arange(len(ends), device=ends.device) % 2 == 1
    return torch.repeat_interleave(ones, lengths).view(width, height).T


def _sample_points(start: float, end: float, bins: int, sampling_ratio: int, aligned: bool) -> list[float]:
    """Where one axis of a RoI is sampled, bin after bin, in pixels of the feature map."""
    length = end - start if aligned else max(end - start, 1.0)
    count = sampling_ratio if sampling_ratio > 0 else max(math.ceil(length / bins), 0)
    return [start + (p + (i + 0.5) / count) * length / bins for p in range(bins) for i in range(count)]


def _mean_of_bins(plane: Tensor, ys: list[float], xs: list[float], size: tuple[int, int]) -> Tensor:
    """(C, height, width): the samples' means; 0 for bins without samples."""
    if not ys or not xs:
        return plane.sum((1, 2), keepdim=True) * plane.new_zeros(size)
    samples = torch.stack([torch.stack([_bilinear(plane, y, x) for x in xs], 1) for y in ys], 1)
    height, width = size
    return samples.view(-1, height, len(ys) // height, width, len(xs) // width).mean((2, 4))


def _bilinear(plane: Tensor, y: float, x: float) -> Tensor:
    """(C,): `plane` (C, H, W) between its four pixels around (y, x); 0 from more than a pixel outside on."""
    height, width = plane.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane[:, 0, 0] * 0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[:, top, left] * (left + 1 - x) + plane[:, top, right] * (x - left)
    lower = plane[:, bottom, left] * (left + 1 - x) + plane[:, bottom, right] * (x - left)
    return upper * (top + 1 - y) + lower * (y - top)
