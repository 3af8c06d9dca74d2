"""Detections of overlapping tiles -> those of the image.

Only detections of the same category and of different tiles are compared. One is cut if its box comes to within
`EDGE` of an edge of its tile that is no edge of the image.

1. Of two that are not cut and overlap by more than the model's own `nms_iou`, the better one stays: an object that
   several tiles show whole.
2. One that is cut goes if at least `SAME` of the smaller of both belongs to both, and the other is not cut: the whole
   object has been seen.
3. Those that are cut and are left become one if they agree on what both tiles show: there at least `SAME` of the
   smaller belongs to both. Mask and box are the union, score and keypoints the best one's. Pairs chain up, so an object
   may span any number of tiles.

Overlap is counted in pixels of the masks, or in area of the boxes from a model without masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipelines.rle import Ends, Window, counts_from_ends, crop_ends, ends_from_counts

EDGE = 0.02  # of a tile's side, and at least two pixels: a cut object's box is found with some error
SAME = 0.5

Entry = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What one tile shows of an object."""

    row: Entry
    """As in the output, in pixels of the image"""
    window: Window
    """The tile"""
    cut: bool
    """The object goes on beyond the tile, perhaps"""

    @cached_property
    def corners(self) -> NDArray[np.float64]:
        """x1, y1, x2, y2 of the box."""
        x, y, width, height = self.row["box"]
        return np.array([x, y, x + width, y + height])

    @cached_property
    def ends(self) -> Ends:
        """Runs of the mask."""
        return ends_from_counts(self.row["rle"]["counts"].encode())


def touches_inner_edge(box: Sequence[float], window: Window, size: tuple[int, int]) -> bool:
    """Whether a box x, y, width, height in an image of (height, width) comes near an edge that is its window's only."""
    x, y, width, height = box
    near = max(2.0, EDGE * max(window.width, window.height))
    right, bottom = window.x + window.width, window.y + window.height
    return (
        (window.x > 0 and x <= window.x + near)
        or (window.y > 0 and y <= window.y + near)
        or (right < size[1] and x + width >= right - near)
        or (bottom < size[0] and y + height >= bottom - near)
    )


def merge_pieces(pieces: Sequence[Piece], size: tuple[int, int], *, nms_iou: float) -> list[Entry]:
    """The objects of an image of (height, width), best first; the same for the same pieces in the same order."""
    order = sorted(range(len(pieces)), key=lambda i: -pieces[i].row["score"])
    ranked = [pieces[i] for i in order]
    near: dict[int, list[int]] = {i: [] for i in range(len(ranked))}
    for i, j in _neighbours(ranked):
        near[i].append(j)
        near[j].append(i)
    whole = _best_whole(ranked, near, nms_iou)
    cut = [i for i, piece in enumerate(ranked) if piece.cut and not _seen_whole(i, ranked, near, whole)]
    groups = _groups(cut, ranked, near)
    rows = [ranked[i].row for i in whole] + [_union([ranked[i] for i in group], size) for group in groups]
    return sorted(rows, key=lambda row: -row["score"])


def _neighbours(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Pairs of one category and different tiles whose boxes overlap. Only tiles that overlap are compared, each with
    each of the other's at once, so that the memory is that of two tiles."""
    tiles: dict[Window, list[int]] = {}
    for i, piece in enumerate(pieces):
        tiles.setdefault(piece.window, []).append(i)
    for (one, ours), (other, theirs) in combinations(tiles.items(), 2):
        if _common(one, other) is None:
            continue
        a, b = (np.stack([pieces[i].corners for i in each]) for each in (ours, theirs))
        low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
        labels = [np.array([pieces[i].row["label"] for i in each]) for each in (ours, theirs)]
        for i, j in np.argwhere((low < high).all(axis=2) & (labels[0][:, None] == labels[1])).tolist():
            yield ours[i], theirs[j]


def _best_whole(pieces: Sequence[Piece], near: dict[int, list[int]], nms_iou: float) -> list[int]:
    """Those that are not cut, without duplicates; `pieces` come best first."""
    kept: dict[int, None] = {}
    for i, piece in enumerate(pieces):
        others = (pieces[j] for j in near[i] if j in kept)
        if not piece.cut and not any(_iou(piece, other) > nms_iou for other in others):
            kept[i] = None
    return list(kept)


def _seen_whole(i: int, pieces: Sequence[Piece], near: dict[int, list[int]], whole: Sequence[int]) -> bool:
    return any(_share(pieces[i], pieces[j]) >= SAME for j in {*near[i]}.intersection(whole))


def _groups(cut: Sequence[int], pieces: Sequence[Piece], near: dict[int, list[int]]) -> list[list[int]]:
    """Pieces of the same objects, best first."""
    left, groups = dict.fromkeys(cut), []
    while left:
        group = [next(iter(left))]
        del left[group[0]]
        for i in group:  # which grows
            same = [j for j in near[i] if j in left and _agree(pieces[i], pieces[j])]
            group += same
            for j in same:
                del left[j]
        groups.append(sorted(group))
    return groups


def _union(pieces: Sequence[Piece], size: tuple[int, int]) -> Entry:
    """One object of several pieces, best first."""
    best = pieces[0].row
    if len(pieces) == 1:
        return best
    corners = np.stack([piece.corners for piece in pieces])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    rle = None
    if best["rle"] is not None:
        merged = coco_mask.merge([piece.row["rle"] for piece in pieces])
        rle = {"size": list(size), "counts": merged["counts"].decode()}
    return {**best, "box": [*low.tolist(), *(high - low).tolist()], "rle": rle}


def _agree(one: Piece, other: Piece) -> bool:
    common = _common(one.window, other.window)
    return common is not None and _share(one, other, common) >= SAME


def _iou(one: Piece, other: Piece) -> float:
    both, a, b = _areas(one, other, None)
    return both / (a + b - both) if both else 0.0


def _share(one: Piece, other: Piece, within: Window | None = None) -> float:
    """What belongs to both, as a share of the smaller one; within a window, if so."""
    both, a, b = _areas(one, other, within)
    return both / min(a, b) if both else 0.0


def _areas(one: Piece, other: Piece, within: Window | None) -> tuple[float, float, float]:
    """Area of both together, and of each."""
    if one.row["rle"] is None:
        return _box_areas(one.corners, other.corners, within)
    if within is None:
        rles = [one.row["rle"], other.row["rle"]]
    else:
        height = one.row["rle"]["size"][0]
        rles = [_cropped(piece, height, within) for piece in (one, other)]
    a, b = (float(area) for area in coco_mask.area(rles))
    return float(coco_mask.area(coco_mask.merge(rles, intersect=True))), a, b


def _cropped(piece: Piece, height: int, window: Window) -> Entry:
    ends = crop_ends(piece.ends, height, window)
    return {"size": [window.height, window.width], "counts": counts_from_ends(ends)}


def _box_areas(
    one: NDArray[np.float64], other: NDArray[np.float64], within: Window | None
) -> tuple[float, float, float]:
    if within is not None:
        low, high = [within.x, within.y], [within.x + within.width, within.y + within.height]
        one, other = (
            np.concatenate([np.clip(each[:2], low, high), np.clip(each[2:], low, high)]) for each in (one, other)
        )
    both = np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])])
    return _area(both), _area(one), _area(other)


def _area(corners: NDArray[np.float64]) -> float:
    return float(np.prod(np.clip(corners[2:] - corners[:2], 0, None)))


def _common(one: Window, other: Window) -> Window | None:
    """What both windows show; None for nothing."""
    y, x = max(one.y, other.y), max(one.x, other.x)
    bottom = min(one.y + one.height, other.y + other.height)
    right = min(one.x + one.width, other.x + other.width)
    return Window(y, x, bottom - y, right - x) if bottom > y and right > x else None
