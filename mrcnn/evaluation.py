"""COCO average precision of boxes and masks: pycocotools' twelve numbers, without its printing."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn.structures import Category, Detections

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""pycocotools' twelve, in its order: average precision over IoU 0.50:0.95, at 0.50 and 0.75, of small, medium
and large ones; average recall with 1, 10 and 100 detections an image, and of small, medium and large ones."""


@dataclass(frozen=True)
class Metrics:
    """What pycocotools says of a set of detections.

    Every number is in 0..1, or nan where there is no ground truth to measure it on (pycocotools' -1).
    """

    box: dict[str, float]
    """The twelve `NUMBERS` of the boxes."""
    mask: dict[str, float]
    """The twelve `NUMBERS` of the masks, small to large by the area of the mask."""
    box_per_category: dict[str, float]
    """AP of the boxes by category name."""
    mask_per_category: dict[str, float]
    """AP of the masks by category name."""
    images: int
    """Images of the ground truth, with or without objects in them."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: as the fields are, with None in the place of nan."""
        groups = ("box", "mask", "box_per_category", "mask_per_category")
        plain = {name: {key: _none_if_nan(x) for key, x in getattr(self, name).items()} for name in groups}
        return {**plain, "images": self.images}

    def table(self) -> str:
        """Two rows of twelve numbers in percent under their names, `-` where there is no ground truth."""

        def cells(numbers: dict[str, float]) -> list[str]:
            return ["-" if math.isnan(numbers[n]) else f"{100 * numbers[n]:.1f}" for n in NUMBERS]

        rows = [["", *NUMBERS], ["box", *cells(self.box)], ["mask", *cells(self.mask)]]
        return "\n".join(f"{row[0]:<5}" + "".join(f"{cell:>7}" for cell in row[1:]) for row in rows)


def coco_results(image_id: int, detections: Detections, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """The detections of one image as entries of a COCO results file.

    Each is `{"image_id", "category_id", "bbox": [x, y, w, h], "score", "segmentation": {"size", "counts"}}`,
    in pixels of `detections.image_size`, with `counts` as text so that the list can go into JSON.
    `categories[label - 1]` gives the category id.
    """
    boxes = detections.boxes.cpu().double().numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    rows = zip(boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), detections.rles, strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": categories[label - 1].id,
            "bbox": box,
            "score": score,
            "segmentation": {"size": [int(x) for x in rle["size"]], "counts": _text(rle["counts"])},
        }
        for box, label, score, rle in rows
    ]


def evaluate_coco(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Metrics:
    """pycocotools' judgement of results, as `coco_results` makes them, against a COCO annotation dict.

    Neither argument is changed. No results at all is a valid, bad answer: zeros. Masks are measured without
    their boxes in the results, as detectron2 does it: with them, pycocotools would call a mask small, medium
    or large by its box. An object without a mask has an empty one, which no detection can match.

    Raises ValueError for a result whose image or category the ground truth does not have.
    """
    _check_known(ground_truth, results)
    truth = _truth(ground_truth)
    box = _evaluate(truth, _box_annotations(results), "bbox")
    mask = _evaluate(truth, _mask_annotations(results), "segm")
    return Metrics(
        box=_numbers(box),
        mask=_numbers(mask),
        box_per_category=_per_category(box, truth),
        mask_per_category=_per_category(mask, truth),
        images=len(truth.imgs),
    )


def _check_known(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in ground_truth[table]}
        unknown = {result[key] for result in results} - known
        if unknown:
            raise ValueError(
                f"results have {key} {min(unknown)}, which is not among the {len(known)} {table} "
                "of the ground truth: evaluate against the annotations of the same images"
            )


def _truth(ground_truth: Mapping[str, Any]) -> COCO:
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    # pycocotools takes a match with annotation 0 for no match, so annotations get ids from 1.
    annotations = [
        {**a, "id": i, "segmentation": a.get("segmentation") or _empty_mask(*sizes[a["image_id"]])}
        for i, a in enumerate(ground_truth["annotations"], start=1)
    ]
    return _coco(ground_truth["images"], ground_truth["categories"], annotations)


def _empty_mask(height: int, width: int) -> dict[str, Any]:
    return {"size": [height, width], "counts": [height * width]}


def _coco(
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    annotations: list[dict[str, Any]],
) -> COCO:
    coco = COCO()
    coco.dataset = {"images": list(images), "categories": list(categories), "annotations": annotations}
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _common(i: int, result: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("image_id", "category_id", "score")
    return {"id": i, "iscrowd": 0, **{key: result[key] for key in keys}}


def _box_annotations(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**_common(i, r), "bbox": r["bbox"], "area": r["bbox"][2] * r["bbox"][3]}
        for i, r in enumerate(results, start=1)
    ]


def _mask_annotations(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # One mask at a time: pycocotools' area of a list fails from 256 masks on.
    return [
        {
            **_common(i, r),
            "segmentation": r["segmentation"],
            "area": float(mask_utils.area(r["segmentation"])),
        }
        for i, r in enumerate(results, start=1)
    ]


def _evaluate(truth: COCO, annotations: list[dict[str, Any]], kind: Literal["bbox", "segm"]) -> COCOeval:
    found = _coco(truth.dataset["images"], truth.dataset["categories"], annotations)
    evaluation = COCOeval(truth, found, kind)
    with redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _numbers(evaluation: COCOeval) -> dict[str, float]:
    return {name: _nan_if_none(float(x)) for name, x in zip(NUMBERS, evaluation.stats, strict=True)}


def _per_category(evaluation: COCOeval, truth: COCO) -> dict[str, float]:
    """AP by name from `precision`, shape (IoU thresholds, recalls, categories, areas, detection limits)."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return {
        truth.cats[category]["name"]: _nan_if_none(float(precision[:, :, k].mean()))
        for k, category in enumerate(evaluation.params.catIds)
    }


def _nan_if_none(value: float) -> float:
    """pycocotools says -1 where there is no ground truth."""
    return math.nan if value < 0 else value


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
