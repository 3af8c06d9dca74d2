"""From m x m mask probabilities over boxes to masks of the image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

# Pixels of float32 masks that are in flight at once: 64 MiB.
CHUNK_PIXELS = 1 << 24


def paste_masks(probs: Tensor, boxes: Tensor, image_size: tuple[int, int], *, threshold: float = 0.5) -> Tensor:
    """Resample probs (D, M, M) over boxes (D, 4) xyxy -> (D, H, W) bool, `probability >= threshold`.

    A pixel's value is read at its centre, bilinearly, with zeros around the mask, as detectron2 does. Boxes may lie
    partly or wholly outside; a box without area has an empty mask.
    """
    chunks = list(_pasted(probs, boxes, image_size, threshold))
    return torch.cat(chunks) if chunks else torch.zeros(0, *image_size, dtype=torch.bool, device=probs.device)


def encode_masks(
    probs: Tensor, boxes: Tensor, image_size: tuple[int, int], *, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """The same masks as COCO run lengths, `{"size": [H, W], "counts": bytes}`, without holding all bitmaps at once."""
    rles: list[dict[str, Any]] = []
    for chunk in _pasted(probs, boxes, image_size, threshold):
        # pycocotools reads (H, W, D) in Fortran order, which is (D, W, H) in C order
        bitmaps = chunk.transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
        rles += coco_mask.encode(np.transpose(bitmaps, (2, 1, 0)))
    return rles


def _pasted(probs: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float) -> Iterator[Tensor]:
    height, width = image_size
    step = max(1, CHUNK_PIXELS // max(height * width, 1))
    for start in range(0, probs.shape[0], step):
        some, box = probs[start : start + step].float(), boxes[start : start + step].float()
        rows = _interpolation(box[:, 1], box[:, 3], pixels=height, side=some.shape[1])
        columns = _interpolation(box[:, 0], box[:, 2], pixels=width, side=some.shape[2])
        yield rows @ some @ columns.transpose(1, 2) >= threshold


def _interpolation(start: Tensor, end: Tensor, *, pixels: int, side: int) -> Tensor:
    """(D, pixels, side): the share of each of the mask's `side` samples in each pixel of an image axis.

    Bilinear interpolation is separable, so pasting is two small matrix products instead of a gather for every pixel.
    """
    extent = end - start
    center = torch.arange(pixels, device=start.device, dtype=torch.float32) + 0.5
    position = (center[None] - start[:, None]) / extent.clamp(min=1e-12)[:, None] * side - 0.5
    sample = torch.arange(side, device=start.device, dtype=torch.float32)
    share = (1 - (position[..., None] - sample).abs()).clamp(min=0)
    return share * (extent > 0)[:, None, None]
