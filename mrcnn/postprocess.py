"""From M x M mask probabilities over boxes to masks of the image.

Bilinear interpolation is separable: pasting is two small matrix products over the pixels that a box covers. They round
otherwise than the samplers of both peers, which matters only where a probability all but equals the threshold; masks
with such a pixel are read by the peers' own sampler, so that masks equal theirs bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

Paste = Literal["continuous", "padded"]

PADDING = 1
"""Zero pixels around a mask that is pasted the padded way."""
LARGEST_REREAD = 1 << 26
"""Pixels of a box beyond which a mask is never read by the peers' sampler, which makes all of them, seen or not."""


def paste_masks(
    probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
    paste: Paste = "continuous",
) -> Tensor:
    """Resample probs (D, M, M) over boxes (D, 4) xyxy -> (D, H, W) bool, `probability >= threshold`.

    Boxes may lie partly or wholly outside; a mask of which the image has no pixel is empty (on a CPU both peers raise).

    Args:
        probs: probability of each detection's own class
        boxes: in pixels of the image
        image_size: height and width
        threshold: a pixel belongs to the object from this probability on
        paste: continuous reads the mask at pixel centres, zeros around it, and a box without area has an empty mask
            (detectron2); padded is torchvision's: a mask with a zero pixel around it is resized to a box that grew as
            much and lost its fractions, whose last pixel counts (width = x2 - x1 + 1)
    """
    masks = torch.zeros(len(probs), *image_size, dtype=torch.bool, device=probs.device)
    for mask, (window, bitmap) in zip(masks, _pasted(probs, boxes, image_size, threshold, paste), strict=True):
        mask[window] = bitmap
    return masks


def encode_masks(
    probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
    paste: Paste = "continuous",
) -> list[dict[str, Any]]:
    """The same masks as COCO run lengths, `{"size": [H, W], "counts": bytes}`, without a bitmap of the whole image."""
    return [
        _run_lengths(bitmap.cpu().numpy(), window, image_size)
        for window, bitmap in _pasted(probs, boxes, image_size, threshold, paste)
    ]


Window = tuple[slice, slice]
"""Rows and columns of the image"""


def _run_lengths(bitmap: np.ndarray, window: Window, image_size: tuple[int, int]) -> dict[str, Any]:
    """COCO run lengths of an image that is zero but for `bitmap` in its window."""
    height, width = image_size
    top, left = window[0].start, window[1].start
    rows = bitmap.shape[0] + (bitmap.shape[0] < height)
    columns = np.zeros((bitmap.shape[1], rows), np.int8)  # a column ends with a zero unless it goes on in the next one
    columns[:, : bitmap.shape[0]] = bitmap.T
    changes = np.flatnonzero(np.diff(columns.reshape(-1), prepend=0, append=0))
    column, row = np.divmod(changes, rows)
    ends = (left + column) * height + top + row
    counts = np.diff(ends, prepend=0, append=height * width)
    if len(ends) and ends[-1] == height * width:
        counts = counts[:-1]  # the last run is an object's
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _pasted(
    probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float, paste: Paste
) -> Iterator[tuple[Window, Tensor]]:
    """For each detection the part of the image that it may cover, and the mask in it."""
    if not len(probs):
        return
    if paste not in PASTINGS:
        raise ValueError(f"paste is {paste!r}, but must be one of {', '.join(PASTINGS)}: take one of these")
    pasting = PASTINGS[paste](probs.float(), boxes.float(), image_size)
    # two roundings of a position, which is at most M, and one of a value
    rounding = 2 * torch.finfo(torch.float32).eps * (probs.shape[-1] + 2)
    for i, (x1, y1, x2, y2) in enumerate(pasting.windows.tolist()):
        window = slice(y1, y2), slice(x1, x2)
        mask = pasting.masks[i]
        soft = _shares(pasting.y[i, window[0]], len(mask)) @ mask @ _shares(pasting.x[i, window[1]], len(mask)).T
        bitmap = soft >= threshold + rounding
        if not torch.equal(bitmap, soft >= threshold - rounding):
            bitmap = pasting.reread(i, window, soft) >= threshold
        yield window, bitmap


class _Continuous:
    """Masks read at pixel centres."""

    def __init__(self, probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> None:
        self.masks = probs
        self.grid_y, self.grid_x = (self._grid(boxes[:, 1 - i :: 2], pixels) for i, pixels in enumerate(image_size))
        self.y, self.x = (((grid + 1) * probs.shape[-1] - 1) / 2 for grid in (self.grid_y, self.grid_x))
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
        low, high = boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1  # as detectron2 bounds it on a CPU
        self.windows = _windows(torch.where(has_area, low, 0), torch.where(has_area, high, 0), image_size)

    @staticmethod
    def _grid(ends: Tensor, pixels: int) -> Tensor:
        """(D, pixels): each pixel's centre, -1 at the start and 1 at the end of the box, in detectron2's arithmetic."""
        center = torch.arange(pixels, device=ends.device, dtype=torch.float32) + 0.5
        return (center - ends[:, :1]) / (ends[:, 1:] - ends[:, :1]) * 2 - 1

    def reread(self, i: int, window: Window, soft: Tensor) -> Tensor:
        y, x = self.grid_y[i, window[0]], self.grid_x[i, window[1]]
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=2)
        return F.grid_sample(self.masks[i][None, None], grid[None], align_corners=False)[0, 0]


class _Padded:
    """Padded masks resized to grown boxes of whole pixels."""

    def __init__(self, probs: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> None:
        self.masks = F.pad(probs, (PADDING,) * 4)
        half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * (self.masks.shape[-1] / probs.shape[-1])
        center = (boxes[:, 2:] + boxes[:, :2]) * 0.5
        self.low, high = (center - half).long(), (center + half).long() + 1
        self.sizes = (high - self.low).clamp(min=1)
        self.windows = _windows(self.low, high, image_size)
        self.y, self.x = (self._positions(1 - i, pixels) for i, pixels in enumerate(image_size))

    def _positions(self, axis: int, pixels: int) -> Tensor:
        """(D, pixels): where in the padded mask each pixel of an image axis is read."""
        side = self.masks.shape[-1]
        pixel = torch.arange(pixels, device=self.low.device) - self.low[:, axis, None]
        return (side / self.sizes[:, axis, None].float() * (pixel + 0.5) - 0.5).clamp(0, side - 1)

    def reread(self, i: int, window: Window, soft: Tensor) -> Tensor:
        (left, top), (width, height) = self.low[i].tolist(), self.sizes[i].tolist()
        if height * width > LARGEST_REREAD:
            return soft
        whole = F.interpolate(self.masks[i][None, None], size=(height, width), mode="bilinear", align_corners=False)
        rows, columns = window
        return whole[0, 0, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


PASTINGS: dict[str, type[_Continuous] | type[_Padded]] = {"continuous": _Continuous, "padded": _Padded}


def _shares(position: Tensor, side: int) -> Tensor:
    """(pixels, side): the share of each of a mask's `side` samples in each pixel of an image axis."""
    sample = torch.arange(side, device=position.device, dtype=torch.float32)
    return (1 - (position[:, None] - sample).abs()).clamp(min=0)


def _windows(low: Tensor, high: Tensor, image_size: tuple[int, int]) -> Tensor:
    """(D, 4) int64 x1, y1, x2, y2: the image's pixels between two corners, none where there is none or NaN."""
    bound = torch.tensor(image_size[::-1], device=low.device)
    low, high = (torch.minimum(corner.clamp(min=0), bound) for corner in (low, high))
    return torch.cat([low, torch.maximum(low, high)], dim=1).long()
