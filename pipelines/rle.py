"""Masks as COCO run lengths, without making bitmaps where that can be avoided.

A mask of H x W pixels is read column by column. Its runs alternate 0, 1, 0, ...; `ends` are their running
sums, as in `mrcnn.structures.RunLengthMasks`: int64 in here, the last one H * W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mrcnn.ops import draw_polygons, rle_decode, rle_encode
from mrcnn.structures import RunLengthMasks

Ends = NDArray[np.int64]
NOTHING: Ends = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Window:
    """A part of an image, in its pixels."""

    y: int
    x: int
    height: int
    width: int


def ends_from_counts(counts: bytes) -> Ends:
    """Decode COCO's compressed counts. Raises ValueError for a string that is none."""
    try:
        return unpacked(rle_decode([counts]))[0]
    except ValueError:
        raise ValueError("not a compressed COCO run-length string") from None


def packed(masks: Sequence[Ends]) -> RunLengthMasks:
    """Masks as the operators take them."""
    ends = np.concatenate([NOTHING, *masks]).astype(np.int32)
    offsets = np.cumsum([0, *map(len, masks)])
    return RunLengthMasks(torch.from_numpy(ends), torch.from_numpy(offsets))


def unpacked(masks: RunLengthMasks) -> list[Ends]:
    """The inverse of `packed`."""
    ends, offsets = masks.ends.numpy().astype(np.int64), masks.offsets.tolist()
    return [ends[start:end] for start, end in pairwise(offsets)]


def ends_from_bitmap(bitmap: NDArray[Any]) -> Ends:
    """Runs of a bitmap (H, W)."""
    flat = np.asarray(bitmap, order="F").reshape(-1, order="F").astype(bool)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []
    return np.concatenate([first, changes, [flat.size]]).astype(np.int64)


def bitmap_from_ends(ends: Ends, height: int, width: int) -> NDArray[np.uint8]:
    """Bitmap (H, W) of 0 and 1."""
    lengths = np.diff(ends, prepend=0)
    flat = np.repeat(np.arange(len(ends)) % 2, lengths).astype(np.uint8)
    return flat.reshape((height, width), order="F")


def counts_from_ends(ends: Ends) -> bytes:
    """The inverse of `ends_from_counts`."""
    return rle_encode(packed([ends]))[0]


def flip_ends(ends: Ends, height: int, width: int) -> Ends:
    """Mirror a mask left to right: exactly what `bitmap[:, ::-1]` gives, from run lengths alone."""
    low, high, column = _column_pieces(ends, height)
    shift = (width - 1 - 2 * column) * height
    order = np.argsort(low + shift, kind="stable")
    return _joined((low + shift)[order], (high + shift)[order], height * width)


def crop_ends(ends: Ends, height: int, window: Window) -> Ends:
    """Runs of the part of a mask, `height` pixels high, that lies in a window: what slicing its bitmap gives."""
    low, high, column = _column_pieces(ends, height)
    top = column * height + window.y
    low, high = np.maximum(low, top), np.minimum(high, top + window.height)
    inside = (low < high) & (column >= window.x) & (column < window.x + window.width)
    shift = ((column - window.x) * window.height - top)[inside]
    return _joined(low[inside] + shift, high[inside] + shift, window.height * window.width)


def box_from_ends(ends: Ends, height: int) -> list[float] | None:
    """Smallest box x1, y1, x2, y2 around a mask, `height` pixels high; None where it is empty."""
    low, high, column = _column_pieces(ends, height)
    if not column.size:
        return None
    top = column * height
    sides = column.min(), (low - top).min(), column.max() + 1, (high - top).max()
    return [float(each) for each in sides]


def pixels_in(ends: Ends) -> int:
    """How many pixels a mask has."""
    return int(np.diff(ends, prepend=0)[1::2].sum())


def _column_pieces(ends: Ends, height: int) -> tuple[Ends, Ends, Ends]:
    """The runs of ones, cut where columns end: first pixel, pixel after the last, and column of each piece."""
    begin, end = ends[0:-1:2], ends[1::2]
    column_first, column_last = begin // height, (end - 1) // height
    pieces = np.where(end > begin, column_last - column_first + 1, 0)
    run = np.repeat(np.arange(len(begin)), pieces)
    column = column_first[run] + np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.maximum(begin[run], column * height), np.minimum(end[run], (column + 1) * height), column


def _joined(low: Ends, high: Ends, total: int) -> Ends:
    """Ends of sorted stretches of ones, those that touch made one."""
    first = np.concatenate([[True], low[1:] != high[:-1]]) if low.size else np.zeros(0, bool)
    last = np.concatenate([first[1:], [True]]) if low.size else first
    ends = np.stack([low[first], high[last]], axis=1).reshape(-1)
    return ends if ends.size and ends[-1] == total else np.append(ends, total)


def segmentation_ends(segmentation: dict[str, Any] | None, height: int, width: int) -> Ends:
    """Runs of a stored `segmentation` (see pipelines/schema.py), as pycocotools draws polygons; an empty array where
    there is none.

    Raises ValueError where the runs do not fill an image of H x W, for damaged ones, and for what is no polygon.
    """
    return segmentations_ends([segmentation], height, width)[0]


def segmentations_ends(segmentations: Sequence[dict[str, Any] | None], height: int, width: int) -> list[Ends]:
    """`segmentation_ends` of each: all at once, for to begin takes longer than one mask."""
    ends = [NOTHING] * len(segmentations)
    present = [(i, each) for i, each in enumerate(segmentations) if each is not None]
    counts = {i: each["rle"]["counts"].encode() for i, each in present if each["rle"] is not None}
    polygons = {i: each["polygons"] for i, each in present if each["rle"] is None and each["polygons"]}
    if counts:
        for i, mask in zip(counts, unpacked(rle_decode([*counts.values()])), strict=True):
            if mask[-1] != height * width:
                raise ValueError(f"a mask has {mask[-1]} pixels, its image {height} x {width}")
            ends[i] = mask
    if polygons:
        drawn = draw_polygons([*polygons.values()], size=(height, width))
        for i, mask in zip(polygons, unpacked(drawn), strict=True):
            ends[i] = mask
    return ends
