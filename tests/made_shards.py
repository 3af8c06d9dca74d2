"""Shards made row by row, without a build: any sizes, any objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mrcnn.structures import Category
from pipelines.manifest import Manifest, Totals
from pipelines.schema import SHARD
from pipelines.shards import write_shard
from pipelines.storage import open_store


def instance(box: Sequence[float], *, label: int = 1, iscrowd: bool = False) -> dict[str, Any]:
    """An object that fills its box."""
    x1, y1, x2, y2 = box
    polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
    return {
        "label": label, "category_id": label, "box": list(box), "area": (x2 - x1) * (y2 - y1), "iscrowd": iscrowd,
        "segmentation": {"polygons": [polygon], "rle": None}, "keypoints": None,
    }  # fmt: skip


def row(image_id: int, size: tuple[int, int], instances: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """An image of noise, stored raw."""
    height, width = size
    pixels = np.random.default_rng(image_id).integers(0, 256, (height, width, 3), np.uint8)
    values = {
        "image_id": image_id, "uri": f"made/{image_id}.png", "height": height, "width": width,
        "source_height": height, "source_width": width, "encoding": "raw", "image": pixels.tobytes(),
        "instances": list(instances),
    }  # fmt: skip
    return {field.name: values.get(field.name) for field in SHARD}


def make_shards(folder: Path, rows: Sequence[dict[str, Any]], *, rows_per_shard: int = 4) -> str:
    """A data set of these rows with one category; its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), rows_per_shard)
    paths = [folder / f"shard-{i:05d}.arrow" for i in range(len(starts))]
    infos = [write_shard(path, rows[start : start + rows_per_shard]) for path, start in zip(paths, starts, strict=True)]
    objects = sum(len(each["instances"]) for each in rows)
    totals = Totals(len(rows), len(rows), 0, objects, objects, 0)
    Manifest((Category(1, "thing"),), {}, tuple(infos), totals).write(open_store(str(folder)))
    return str(folder)
