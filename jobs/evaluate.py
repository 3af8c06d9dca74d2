"""`mrcnn evaluate`: COCO's numbers on every row of validation shards, in pixels of the source images.

Polygons, boxes and areas come back from the shards as they were annotated, but for float32's rounding. Run-length masks
were resized with the image, and are resized back: exact only where the shards hold the source's size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from mrcnn.config import ModelConfig
from mrcnn.evaluation import Kind, Metrics, coco_results, evaluate_coco
from mrcnn.model import MaskRCNN
from mrcnn.structures import Category
from mrcnn.weights import model_from_files
from pipelines.dataset import Row, ShardDataset
from pipelines.patience import patiently
from pipelines.predict import ModelFiles, model_pool, place_model
from pipelines.scaling import Scaling, scale_instance
from pipelines.storage import split_uri

ROWS_A_BATCH = 8  # that an actor takes at a time; the model sees them one by one


@dataclass(frozen=True)
class JudgedRow:
    """One image with what is in it and what was found, as COCO has them, in source pixels."""

    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class EvaluationSummary:
    """What an evaluation found."""

    metrics: Metrics
    model: str
    data: str
    images_per_second: float
    out: str | None

    def __str__(self) -> str:
        written = f"\nwritten to {self.out}" if self.out else ""
        return (
            f"{self.model} on {self.metrics.images} images of {self.data}, "
            f"{self.images_per_second:.1f} images/s\n"
            f"{self.metrics.table()}{written}"
        )


def evaluate(model: str, data: str, out: str | None = None) -> EvaluationSummary:
    """Measure a model (a folder or models:/...) on shards, with all CPUs or GPUs of the running Ray.

    Raises ValueError where the model's categories are not the data's.
    """
    from jobs.registry import resolve_model

    dataset = ShardDataset(data)
    if out and Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder: name the JSON file to write")
    resolved = resolve_model(model)
    loaded = model_from_files(resolved.files, model)
    check_categories(loaded, model, dataset)
    started = time.monotonic()
    rows = _judge_in_parallel(resolved.files, dataset)
    seconds = time.monotonic() - started
    metrics = metrics_of(rows, dataset.categories, found_kinds(loaded.config))
    if out:
        store, name = split_uri(out)
        content = {
            **metrics.to_dict(),
            "model": model,
            "data": dataset.uri,
            "data_digest": dataset.manifest.digest,
        }
        store.write_bytes(name, json.dumps(content, indent=1).encode())
    return EvaluationSummary(metrics, model, dataset.uri, len(dataset) / seconds, out)


def check_categories(model: MaskRCNN, name: str, dataset: ShardDataset) -> None:
    """Raise ValueError unless the model knows every category of the data, with its keypoints if it finds any.

    It may know more: torchvision's models have ten that COCO never uses. What it finds of those does not count.
    """
    with_keypoints = model.config.keypoint.num_keypoints > 0
    ours, theirs = (meanings(x.categories, with_keypoints=with_keypoints) for x in (model, dataset))
    if not set(theirs) <= set(ours):
        raise ValueError(
            f"the model {name} knows the categories {ours}, but {dataset.uri} has {theirs}: "
            "evaluate on data with the model's categories"
        )


def meanings(categories: Sequence[Category], *, with_keypoints: bool) -> list[str]:
    """What labels stand for, in words: ids and names, and the names of keypoints where they matter."""
    points = [f" ({', '.join(c.keypoints)})" if with_keypoints and c.keypoints else "" for c in categories]
    return [f"{c.id} {c.name}{names}" for c, names in zip(categories, points, strict=True)]


def found_kinds(config: ModelConfig) -> set[Kind]:
    """What a model of these settings finds, and so what it is measured by."""
    heads: dict[Kind, bool] = {
        "box": True,
        "mask": config.mask.head != "none",
        "keypoints": config.keypoint.num_keypoints > 0,
    }
    return {kind for kind, is_there in heads.items() if is_there}


def judge_rows(model: MaskRCNN, dataset: ShardDataset, indices: Iterable[int]) -> list[JudgedRow]:
    """Truth and detections of the rows of these numbers.

    Images go through the model one by one, so that no result depends on which other images are
    evaluated, or on how many workers. A storage that is away is waited for.
    """
    judged = []
    known = {category.id for category in dataset.categories}
    for index in indices:
        row = patiently(partial(dataset.read, index))
        (found,) = model.predict([row.image], source_sizes=[row.source_size])
        height, width = row.source_size
        judged.append(
            JudgedRow(
                image={"id": row.image_id, "file_name": row.uri, "height": height, "width": width},
                annotations=[_annotation(row, instance, dataset.categories) for instance in row.instances],
                results=[
                    result
                    for result in coco_results(row.image_id, found, model.categories)
                    if result["category_id"] in known
                ],
            )
        )
    return judged


def metrics_of(
    rows: Sequence[JudgedRow], categories: Sequence[Category], kinds: Collection[Kind] | None = None
) -> Metrics:
    """pycocotools' numbers over all rows, whatever their order, of the `kinds` of `found_kinds`."""
    ordered = sorted(rows, key=lambda row: row.image["id"])
    annotations = [annotation for row in ordered for annotation in row.annotations]
    truth = {
        "images": [row.image for row in ordered],
        "annotations": [{**annotation, "id": i} for i, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": c.id, "name": c.name, "keypoints": list(c.keypoints)} for c in categories],
    }
    return evaluate_coco(truth, [result for row in ordered for result in row.results], kinds)


class _RowJudge:
    """Actor: numbers of rows -> JudgedRows as JSON, for Arrow to carry."""

    def __init__(self, files: ray.ObjectRef[ModelFiles], dataset: ShardDataset) -> None:
        self.model, self.dataset = place_model(model_from_files(ray.get(files), "the model")), dataset

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        rows = judge_rows(self.model, self.dataset, batch["id"].tolist())
        return {"row": [json.dumps(vars(row)) for row in rows]}


def _judge_in_parallel(files: ModelFiles, dataset: ShardDataset) -> list[JudgedRow]:
    blocks = -(-len(dataset) // ROWS_A_BATCH)
    numbers = ray.data.from_items([{"id": i} for i in range(len(dataset))], override_num_blocks=blocks)
    judged = numbers.map_batches(
        _RowJudge,
        fn_constructor_args=(ray.put(dict(files)), dataset),
        batch_size=ROWS_A_BATCH,
        **model_pool(blocks).arguments,
    )
    return [JudgedRow(**json.loads(row["row"])) for row in judged.iter_rows()]


def _annotation(row: Row, instance: dict[str, Any], categories: Sequence[Category]) -> dict[str, Any]:
    """As COCO has it. Keypoints of a category that names none are nobody's to find."""
    named = categories[instance["label"] - 1].keypoints
    stored = (row.image.shape[0], row.image.shape[1])
    source = scale_instance(instance, Scaling(stored, row.source_size))
    x1, y1, x2, y2 = source["box"]
    segmentation = source["segmentation"] or {"polygons": [], "rle": None}
    return {
        "image_id": row.image_id,
        "category_id": source["category_id"],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": source["area"],
        "iscrowd": int(source["iscrowd"]),
        "segmentation": segmentation["rle"] or segmentation["polygons"],
        "keypoints": (named and source["keypoints"]) or [],
    }
