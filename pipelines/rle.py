"""Masks as COCO run lengths, without making bitmaps where that can be avoided.

A mask of H x W pixels is read column by column. Its runs alternate 0, 1, 0, ...; `ends` are their running
sums, as in `mrcnn.structures.RunLengthMasks`: int64 in here, the last one H * W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Ends = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A part of an image, in its pixels."""

    y: int
    x: int
    height: int
    width: int


MAX_RUN = 2**31  # pixels, more than any image has
MAX_COORDINATE = 1e6  # pixels; pycocotools takes memory in proportion to the length of an outline


def ends_from_counts(counts: bytes) -> Ends:
    """Decode COCO's compressed counts: base-32 digits, little end first, differences to the last but one run.

    Source: pycocotools, maskApi.c, rleFrString. Raises ValueError for a string that is not one.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if digits.size == 0 or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("not a compressed COCO run-length string")
    last = np.flatnonzero((digits & 32) == 0)
    starts = np.concatenate([[0], last[:-1] + 1])
    lengths = last - starts + 1
    if lengths.max() > 10:
        raise ValueError("a run of the COCO run-length string is too long")
    place = np.arange(digits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    values -= np.where(digits[last] & 16, np.int64(1) << (5 * lengths), 0)
    if abs(values).max() > MAX_RUN:  # before it is summed up, which would pass int64
        raise ValueError("a run of the COCO run-length string is too long")
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])  # the first run stands alone
    if values.min() < 0 or values.max() > MAX_RUN:
        raise ValueError("a run of the COCO run-length string is negative or too long")
    return np.cumsum(values)


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


def counts_from_ends(ends: Ends, height: int, width: int) -> bytes:
    """The inverse of `ends_from_counts`: COCO's compressed counts of a mask of H x W pixels."""
    lengths = np.diff(ends, prepend=0).tolist()
    return coco_mask.frPyObjects({"counts": lengths, "size": [height, width]}, height, width)["counts"]


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


def counts_from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> bytes:
    """Compressed counts of the union of polygons x1, y1, x2, y2, ..., as pycocotools draws them."""
    points = [np.asarray(each, np.float64) for each in polygons]
    if not all((np.abs(each) <= MAX_COORDINATE).all() for each in points):  # nor where it is NaN
        raise ValueError(f"a coordinate of a polygon is not a number of at most {MAX_COORDINATE:.0e}")
    if any(each.size < 6 for each in points):  # pycocotools takes four numbers for a box
        raise ValueError("a polygon has fewer than three points")
    parts = coco_mask.frPyObjects([each.tolist() for each in points], height, width)
    return coco_mask.merge(parts)["counts"]


def segmentation_ends(segmentation: dict[str, Any] | None, height: int, width: int) -> Ends:
    """Runs of a stored `segmentation` (see pipelines/schema.py); an empty array where there is none.

    Raises ValueError where the runs do not fill an image of H x W.
    """
    if segmentation is None or (segmentation["rle"] is None and not segmentation["polygons"]):
        return np.zeros(0, np.int64)
    if segmentation["rle"] is None:
        ends = ends_from_counts(counts_from_polygons(segmentation["polygons"], height, width))
    else:
        ends = ends_from_counts(segmentation["rle"]["counts"].encode())
    if ends[-1] != height * width:
        raise ValueError(f"a mask has {ends[-1]} pixels, its image {height} x {width}")
    return ends
