"""Builds of small sources in this process, for the tests of pipelines/sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import build as build_module
from pipelines.build import build
from pipelines.config import BuildConfig
from pipelines.dataset import Row, ShardDataset
from pipelines.manifest import Totals
from pipelines.rle import bitmap_from_ends, segmentation_ends
from pipelines.tasks import FAILURES, Task


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "run_tasks", _run_here)
        totals = build(BuildConfig(**{**size, **shares, "out": str(out), **settings})).totals
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


def _run_here(function: Callable[[Task], Task], tasks: Iterable[Task]) -> Iterator[Task]:
    for result in map(function, tasks):
        if result.get("failure"):
            raise FAILURES[result["failure"]](result["message"])
        yield result


def masks(row: Row) -> list[np.ndarray]:
    """Of a row's objects, each (H, W) bool."""
    ends = [segmentation_ends(each["segmentation"], *row.size) for each in row.instances]
    return [bitmap_from_ends(each, *row.size).astype(bool) for each in ends]


def write_image(path: Path, height: int = 24, width: int = 32, value: int = 128) -> Path:
    """A plain image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)
    return path
