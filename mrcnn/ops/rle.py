"""Operators on run-length masks: mask targets, masks of another size, of polygons, and as COCO stores them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mrcnn.ops import _library  # noqa: F401  importing it registers torch.ops.mrcnn
from mrcnn.ops._checks import check_index, check_positive, check_rois, check_tensor
from mrcnn.structures import RunLengthMasks

MAX_COORDINATE = 1e6  # pixels of a polygon: to draw it takes time in proportion to the length of its outline


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
    _check_masks(masks, device)
    if masks.offsets.shape[0] == 0:
        raise ValueError("masks.offsets is empty: give I + 1 offsets, [0] where there are no instances")
    check_rois(rois, columns=4, device=device)
    check_index("instances", instances, rois)
    check_tensor("sizes", sizes, shape="(R, 2)", dims=2, dtype=torch.int64, device=device)
    if sizes.shape != (rois.shape[0], 2):
        raise ValueError(f"sizes is {tuple(sizes.shape)} but rois is {tuple(rois.shape)}: give (R, 2), one row a RoI")
    check_positive("output_size", output_size)
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


def resize_masks(masks: RunLengthMasks, *, size: tuple[int, int], new_size: tuple[int, int]) -> RunLengthMasks:
    """Binary masks of another size, with their runs alone: no bitmap is made.

    A pixel is set where the antialiased bilinear filter finds at least half of it covered: the pixels of 128 and more
    where the masks, drawn as images of 0 and 255, are resized by Pillow, but for a rare one that is close to half.

    Args:
        masks: run lengths of any number of masks, on the CPU. One without runs stays without.
        size: their height and width.
        new_size: the height and width wanted.

    Raises:
        ValueError: a size below 1, or tensors of a wrong shape, dtype or device.
        RuntimeError: runs that do not fill their image.
    """
    _check_masks(masks, torch.device("cpu"))
    check_positive("size", *size)
    check_positive("new_size", *new_size)
    return RunLengthMasks(*torch.ops.mrcnn.resize_masks(masks.ends, masks.offsets, *size, *new_size))


def draw_polygons(masks: Sequence[Sequence[Sequence[float]]], *, size: tuple[int, int]) -> RunLengthMasks:
    """Masks of polygons, to the pixel as pycocotools draws them.

    Args:
        masks: of each the polygons that it is the union of, each x1, y1, x2, y2, ... in pixels. One without polygons
            has no runs.
        size: their height and width.

    Raises:
        ValueError: a polygon of fewer than three points or of an odd count, a coordinate that is not a number of at
            most 10^6, a size below 1 or of 2^31 pixels and more.
    """
    polygons = [polygon for mask in masks for polygon in mask]
    lengths = [len(polygon or ()) for polygon in polygons]
    if any(length < 6 or length % 2 for length in lengths):
        raise ValueError("a polygon has fewer than three points, or an odd count of numbers")
    check_positive("size", *size)
    # unsafe: what is no number becomes NaN
    points = np.concatenate([[], *polygons], dtype=np.float64, casting="unsafe").reshape(-1, 2)
    if not (np.abs(points) <= MAX_COORDINATE).all():  # nor where it is NaN
        raise ValueError(f"a coordinate of a polygon is not a number of at most {MAX_COORDINATE:.0e}")
    if size[0] * size[1] >= 2**31:
        raise ValueError(f"size is {size[0]} x {size[1]}: give fewer than 2^31 pixels")
    of_polygons, of_masks = _offsets(lengths) // 2, _offsets([len(mask) for mask in masks])
    return RunLengthMasks(*torch.ops.mrcnn.draw_polygons(torch.from_numpy(points), of_polygons, of_masks, *size))


def rle_encode(masks: RunLengthMasks) -> list[bytes]:
    """COCO's compressed `counts` of each mask, empty for one without runs."""
    _check_masks(masks, torch.device("cpu"))
    text, offsets = torch.ops.mrcnn.rle_encode(masks.ends, masks.offsets)
    joined, at = text.numpy().tobytes(), offsets.tolist()
    return [joined[start:end] for start, end in pairwise(at)]


def rle_decode(counts: Sequence[bytes]) -> RunLengthMasks:
    """The inverse of `rle_encode`, but that each has to have runs.

    Raises ValueError for what is no compressed COCO run-length string, or one of 2^31 pixels and more.
    """
    joined = np.frombuffer(bytearray(b"".join(counts)), np.uint8)
    try:
        return RunLengthMasks(
            *torch.ops.mrcnn.rle_decode(torch.from_numpy(joined), _offsets([len(each) for each in counts]))
        )
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0].removeprefix("rle_decode: ")) from None


def _check_masks(masks: RunLengthMasks, device: torch.device) -> None:
    check_tensor("masks.ends", masks.ends, shape="(T,)", dims=1, dtype=torch.int32, device=device)
    check_tensor("masks.offsets", masks.offsets, shape="(I + 1,)", dims=1, dtype=torch.int64, device=device)


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64))
