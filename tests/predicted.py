"""A finished prediction's folder, made without a model and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from mrcnn.structures import Category
from pipelines.inputs import Chunk, Input, Inputs, Picture
from pipelines.overlays import DrawSettings
from pipelines.predict import PREDICTIONS, SCHEMA_VERSION
from pipelines.predict_folder import ChunkReceipt, Plan, claim, conclude, part_name, read_json, tidy, write_receipt
from pipelines.records import Reject
from pipelines.stages import Stopwatch
from pipelines.storage import Store
from pipelines.tally import tally_part

Find = Callable[[Picture], list[dict[str, Any]]]
"""The detections of an image, best first"""


def plan_of(inputs: Inputs, categories: Sequence[Category], chunk_size: int) -> Plan:
    """As of a model with defaults."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model_sha256": {"config.json": "0" * 64, "model.safetensors": "1" * 64},
        "images": inputs.uri,
        "inputs_sha256": inputs.sha256,
        "score_threshold": 0.05,
        "max_detections": 100,
        "classes": [each.id for each in categories],
        "keypoints": False,
        "tta": [],
        "tile": [],
        "batch_size": 1,
        "max_pixels": 89_478_485,
        "chunk_size": chunk_size,
    }


def finish(
    inputs: Inputs,
    out: Store,
    categories: Sequence[Category],
    find: Find,
    *,
    chunk_size: int = 4,
    model: str = "models:/shapes/1",
) -> tuple[dict[str, Any], DrawSettings]:
    """Write parts, rejects and manifest. Returns the manifest, and what pictures are drawn with."""
    plan = plan_of(inputs, categories, chunk_size)
    claim(out, plan, inputs, chunk_size)
    chunks = list(inputs.chunks(chunk_size))
    for chunk in chunks:
        write_receipt(out, _write_part(inputs, out, find, chunk))
    about = {"model": {"uri": "models:/shapes@champion", "version": model, "config": {}}}
    conclude(out, plan, about, images=inputs.count, chunks=len(chunks))
    tidy(out)
    return read_json(out, "manifest.json"), DrawSettings(inputs.reader, out, tuple(categories))


def _write_part(inputs: Inputs, out: Store, find: Find, chunk: Chunk) -> ChunkReceipt:
    answers = [_answer(inputs, find, item) for item in chunk.inputs]
    rejects = [each for each in answers if isinstance(each, Reject)]
    rows = [each for each in answers if not isinstance(each, Reject)]
    with out.new_file(part_name(chunk.number)) as path:
        with pq.ParquetWriter(path, PREDICTIONS) as writer:
            for start in range(0, len(rows), 2):
                writer.write_table(pa.Table.from_pylist(rows[start : start + 2], schema=PREDICTIONS))
        size, tally = path.stat().st_size, tally_part(path)
    detections = sum(len(row["detections"]) for row in rows)
    return ChunkReceipt(
        chunk.number, len(rows), detections, size, len(rejects), chunk.versions_sha256, tally=tally, rejected=rejects
    )


def _answer(inputs: Inputs, find: Find, item: Input) -> dict[str, Any] | Reject:
    picture = inputs.reader.read(item, Stopwatch())
    if isinstance(picture, Reject):
        return picture
    height, width = picture.source_size
    row = {"image_id": picture.image_id, "uri": picture.uri, "height": height, "width": width}
    return {**row, "detections": find(picture)}


def detection(label: int, score: float, box: Sequence[float], *, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """One of label's; with the size of its image it has a mask that fills its box (x, y, width, height)."""
    rle = None
    if size is not None:
        x, y, width, height = (int(v) for v in box)
        bitmap = np.zeros(size, np.uint8, order="F")
        bitmap[y : y + height, x : x + width] = 1
        rle = {"size": list(size), "counts": coco_mask.encode(bitmap)["counts"].decode()}
    found = {"label": label, "category_id": label, "score": score, "box": list(box)}
    return {**found, "rle": rle, "keypoints": None}
