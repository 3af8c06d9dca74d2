"""Counts over a prediction's detections: small, of each chunk, added up when all chunks are there."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

SCORE_BINS = 20  # of 0.05 each
COLUMNS = [f"detections.list.element.{name}" for name in ("label", "score")]


@dataclass(frozen=True)
class Tally:
    """How many detections and images there are of each kind."""

    scores: list[int] = field(default_factory=lambda: [0] * SCORE_BINS)
    """Detections by score: the first are below 0.05"""
    labels: list[int] = field(default_factory=list)
    """Detections by label; of label 0 there are none"""
    images: list[int] = field(default_factory=list)
    """Images by the bits that the number of their detections has: with 0, 1, 2 to 3, 4 to 7 detections, and so on"""

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{each.name: _sum(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)})


def _sum(some: list[int], others: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(some, others, fillvalue=0)]


def tally_part(path: Path) -> Tally:
    """Count what is in a part, of which two columns are read, a group of rows at a time."""
    total = Tally()
    with pq.ParquetFile(path) as part:
        for i in range(part.num_row_groups):
            found = part.read_row_group(i, columns=COLUMNS)["detections"].combine_chunks()
            each = found.flatten()
            total += _tally(
                pc.list_value_length(found).to_numpy(), each.field("label").to_numpy(), each.field("score").to_numpy()
            )
    return total


def _tally(sizes: NDArray[np.integer], labels: NDArray[np.integer], scores: NDArray[np.floating]) -> Tally:
    bins, _ = np.histogram(scores, bins=SCORE_BINS, range=(0.0, 1.0))
    bits = [int(size).bit_length() for size in sizes]
    return Tally(bins.tolist(), np.bincount(labels).tolist(), np.bincount(bits).tolist())
