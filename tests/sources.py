"""Builds of small sources in this process, for the tests of pipelines/sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from inline import build_here
from PIL import Image

from pipelines.config import BuildConfig
from pipelines.dataset import Row, ShardDataset
from pipelines.manifest import Totals
from pipelines.rle import bitmap_from_ends, segmentation_ends


@dataclass(frozen=True)
class Built:
    """What a build made, and of what it made nothing."""

    rows: list[Row]
    totals: Totals
    classes: list[str]
    rejects: dict[str, str]
    """Stage and reason by the name of the image"""
    lost: list[tuple[int | None, str]]
    """Rejected annotations: id, stage and reason"""


def built(out: Path, **settings: Any) -> Built:
    """Build without Ray, with any number of rejects; images of `write_image`'s size are not scaled."""
    size = {"shorter_side": 24, "longer_side": 32}
    shares = {"max_reject_share": 1.0, "max_rejected_annotation_share": 1.0}
    totals = build_here(BuildConfig(**{**size, **shares, "out": str(out), **settings})).totals
    dataset = ShardDataset(str(out))
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    lost = pq.read_table(out / "rejected_annotations.parquet").to_pylist()
    return Built(
        rows=[dataset.read(i) for i in range(len(dataset))],
        totals=totals,
        classes=[each.name for each in dataset.categories],
        rejects={each["uri"].rsplit("/", 1)[-1]: f"{each['stage']}: {each['reason']}" for each in rejects},
        lost=[(each["annotation_id"], f"{each['stage']}: {each['reason']}") for each in lost],
    )


def masks(row: Row) -> list[np.ndarray]:
    """Of a row's objects, each (H, W) bool."""
    ends = [segmentation_ends(each["segmentation"], *row.size) for each in row.instances]
    return [bitmap_from_ends(each, *row.size).astype(bool) for each in ends]


def write_image(path: Path, height: int = 24, width: int = 32, value: int = 128) -> Path:
    """A plain image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)
    return path
