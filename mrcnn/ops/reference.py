"""The compiled operators again in plain PyTorch: slow, short, for any device and dtype, differentiable.

They take one bilinear sample, pixel or box at a time, as the definition says, and share no code with the kernels,
whose oracle they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

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
    reduce: str = "mean",
) -> Tensor:
    """`mrcnn.ops.roi_align`, RoI by RoI, with its arguments and its result."""

    def axis(start: Tensor, end: Tensor, bins: int) -> list[list[float]]:
        shift, least = (0.5, -math.inf) if aligned else (0.0, 1.0)
        first = start.item() - shift
        length = max(end.item() - shift - first, least)
        count = sampling_ratio if sampling_ratio > 0 else max(math.ceil(length / bins), 0)
        return [[first + (p + (i + 0.5) / count) * length / bins for i in range(count)] for p in range(bins)]

    def cell(plane: Tensor, ys: list[float], xs: list[float]) -> Tensor:
        return _reduced(plane, [_bilinear(plane, y, x) for y, x in product(ys, xs)], reduce)

    return _pooled(features, rois, levels, output_size, spatial_scale, _cells(axis, cell))


def roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
) -> Tensor:
    """`mrcnn.ops.roi_pool`, pixel by pixel, with its arguments and its result."""

    def axis(start: Tensor, end: Tensor, bins: int) -> list[list[int]]:
        first = _round(start.item())
        side = torch.tensor(max(_round(end.item()) - first + 1, 1) / bins, dtype=start.dtype)  # rounds as the RoI does
        return [list(range(first + math.floor(side * p), first + math.ceil(side * (p + 1)))) for p in range(bins)]

    def cell(plane: Tensor, ys: list[int], xs: list[int]) -> Tensor:
        height, width = plane.shape[1:]
        inside = [(y, x) for y, x in product(ys, xs) if 0 <= y < height and 0 <= x < width]
        return _reduced(plane, [plane[:, y, x] for y, x in inside], "max")

    return _pooled(features, rois, levels, output_size, spatial_scale, _cells(axis, cell))


def roi_warp(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    sampling_ratio: int = 2,
    reduce: str = "mean",
    variant: str = "inclusive",
) -> Tensor:
    """`mrcnn.ops.roi_warp`, sample by sample, with its arguments and its result."""
    extra = int(variant == "inclusive")

    def axis(start: Tensor, end: Tensor, bins: int) -> list[list[float]]:
        first = _round(start.item())
        side = max(_round(end.item()) - first + extra, extra) / bins
        if variant == "mnc":
            return [[first + p * side] for p in range(bins)]
        count = sampling_ratio if sampling_ratio > 0 else max(math.ceil(side), 1)
        return [[first + (p + (i + 0.5) / count) * side for i in range(count)] for p in range(bins)]

    def cell(plane: Tensor, ys: list[float], xs: list[float]) -> Tensor:
        margin = 0.5 if variant == "mnc" else 0.0
        return _reduced(plane, [_bilinear(plane, y, x, margin) for y, x in product(ys, xs)], reduce)

    return _pooled(features, rois, levels, output_size, spatial_scale, _cells(axis, cell))


def precise_roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None = None,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
) -> Tensor:
    """`mrcnn.ops.precise_roi_pool`: differences of antiderivatives, differentiable in `rois` by autograd."""

    def antiderivative(limits: Tensor, size: int) -> Tensor:
        """(bins + 1, size): the integral of each pixel's hat up to each limit."""
        t = (limits[:, None] - torch.arange(size, dtype=limits.dtype, device=limits.device)).clamp(-1, 1)
        return torch.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2)

    def roi(plane: Tensor, box: Tensor, height: int, width: int) -> Tensor:
        x1, y1, x2, y2 = box
        if not (x1 < x2 and y1 < y2):
            return plane.sum((1, 2))[:, None, None] * plane.new_zeros(height, width)
        rows, columns = (
            antiderivative(a + (b - a) * torch.linspace(0, 1, bins + 1, dtype=box.dtype, device=box.device), size).diff(
                dim=0
            )
            for a, b, bins, size in ((y1, y2, height, plane.shape[1]), (x1, x2, width, plane.shape[2]))
        )
        area = (x2 - x1) * (y2 - y1) / (height * width)
        return rows.to(plane.dtype) @ plane @ columns.to(plane.dtype).T / area.to(plane.dtype)

    return _pooled(features, rois, levels, output_size, spatial_scale, roi)


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


def resize_masks(masks: RunLengthMasks, *, size: tuple[int, int], new_size: tuple[int, int]) -> list[Tensor]:
    """`mrcnn.ops.resize_masks` as a product of weights and pixels; (H, W) bool of each mask that has runs."""
    rows, columns = (_triangle_weights(*lengths) for lengths in zip(size, new_size, strict=True))
    resized = []
    for i in range(len(masks.offsets) - 1):
        runs = masks.ends[masks.offsets[i] : masks.offsets[i + 1]]
        if len(runs):
            halfway = torch.floor(decode(runs, *size).double() @ columns.T * 255 + 0.5 + 1e-6)
            resized.append(rows @ halfway >= 127.5 - 1e-6)
    return resized


def _triangle_weights(before: int, after: int) -> Tensor:
    """(after, before) float64: how much of each source pixel is in each pixel, for the antialiased bilinear filter."""
    scale = before / after
    centres = (torch.arange(after, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(before, dtype=torch.float64) + 0.5 - centres).abs()
    weights = (1 - distance / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def enlarge_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w, 3) uint8 -> (H, W, 3) uint8: columns, then rows, each rounded to whole levels."""
    for axis in (1, 0):
        image = _between(image.transpose(0, axis), size[axis]).transpose(0, axis)
    return image.byte()


def _between(rows: Tensor, count: int) -> Tensor:
    """(count, ...) int64: each of them between two of the rows, weighed in 32768ths."""
    place = ((torch.arange(count, dtype=torch.float64) + 0.5) * len(rows) / count - 0.5).clamp(0, len(rows) - 1)
    low = place.long()
    weight = ((place - low) * 32768 + 0.5).long().clamp(max=32767).view(-1, 1, 1)
    a, b = rows[low].long(), rows[(low + 1).clamp(max=len(rows) - 1)].long()
    return a + ((b - a) * weight + 16384 >> 15)


def nms(boxes: Tensor, scores: Tensor, groups: Tensor, *, iou_threshold: float, top_n: int) -> tuple[Tensor, Tensor]:
    """`mrcnn.ops.nms`, box by box, with its arguments and its result."""
    kept = torch.zeros(boxes.shape[0], min(top_n, boxes.shape[1]), dtype=torch.int64, device=boxes.device)
    valid = torch.zeros_like(kept, dtype=torch.bool)
    for b, image in enumerate(boxes.float()):
        taking_part = [i for i, score in enumerate(scores[b].tolist()) if score > -math.inf]
        survivors: list[int] = []
        for i in sorted(taking_part, key=lambda i: -scores[b, i].item()):
            of_group = [k for k in survivors if groups[b, k] == groups[b, i]]
            if not any(_iou(image[k], image[i]) > iou_threshold for k in of_group):
                survivors.append(i)
        best = survivors[: kept.shape[1]]
        kept[b, : len(best)] = torch.tensor(best, dtype=torch.int64)
        valid[b, : len(best)] = True
    return kept, valid


def _pooled(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    pool: Callable[[Tensor, Tensor, int, int], Tensor],
) -> Tensor:
    """(R, C, height, width) of pool(feature map of one image (C, H, W), box in its pixels (4,), height, width)."""
    pyramid = [features] if isinstance(features, Tensor) else list(features)
    scales = [spatial_scale] if isinstance(spatial_scale, (int, float)) else list(spatial_scale)
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    if len(rois) == 0:
        return pyramid[0].sum() * pyramid[0].new_zeros(0, pyramid[0].shape[1], height, width)
    chosen = [0] * len(rois) if levels is None else levels.tolist()
    return torch.stack(
        [
            pool(pyramid[level][int(roi[0])], roi[1:] * scales[level], height, width)
            for level, roi in zip(chosen, rois, strict=True)
        ]
    )


def _cells(
    axis: Callable[[Tensor, Tensor, int], list[list[float]]] | Callable[[Tensor, Tensor, int], list[list[int]]],
    cell: Callable[[Tensor, list, list], Tensor],
) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """Pools a RoI cell by cell: axis(start, end, bins) says where each bin reads, cell(plane, ys, xs) reads it."""

    def pool(plane: Tensor, box: Tensor, height: int, width: int) -> Tensor:
        x1, y1, x2, y2 = box.detach()
        rows, columns = axis(y1, y2, height), axis(x1, x2, width)
        return torch.stack([torch.stack([cell(plane, ys, xs) for xs in columns], 1) for ys in rows], 1)

    return pool


def _reduced(plane: Tensor, samples: list[Tensor], reduce: str) -> Tensor:
    """(C,): the mean of the samples (C,) or the first of their maxima, 0 where there are none."""
    if not samples:
        return plane.sum((1, 2)) * 0
    values = torch.stack(samples)
    if reduce == "mean":
        return values.mean(0)
    first = (values == values.amax(0)).int().argmax(0)  # amax alone would share the gradient among equals
    return values.gather(0, first[None])[0]


def decode(ends: Tensor, height: int, width: int) -> Tensor:
    """The (H, W) bool mask of one instance's run ends, which alternate 0, 1, 0, ... down the columns."""
    lengths = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
    ones = torch.arange(len(ends), device=ends.device) % 2 == 1
    return torch.repeat_interleave(ones, lengths).view(width, height).T


def _round(value: float) -> int:
    """Halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _iou(a: Tensor, b: Tensor) -> float:
    """Of two boxes (4,) in their own precision; NaN where both are without area."""
    shared = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return (shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)).item()


def _bilinear(plane: Tensor, y: float, x: float, margin: float = 0.0) -> Tensor:
    """(C,): `plane` (C, H, W) between its four pixels around (y, x); 0 from more than a pixel outside on.

    `margin` takes half a pixel off that at each end, for MNC.
    """
    height, width = plane.shape[1:]
    if not (margin - 1 <= y <= height - margin and margin - 1 <= x <= width - margin):
        return plane[:, 0, 0] * 0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[:, top, left] * (left + 1 - x) + plane[:, top, right] * (x - left)
    lower = plane[:, bottom, left] * (left + 1 - x) + plane[:, bottom, right] * (x - left)
    return upper * (top + 1 - y) + lower * (y - top)
