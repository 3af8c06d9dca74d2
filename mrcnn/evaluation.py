"""COCO average precision of boxes, masks and keypoints: pycocotools' numbers, without its printing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval import COCOeval_faster as COCOeval  # pycocotools' numbers and interface, in C++
from pycocotools import mask as mask_utils

from mrcnn.skeleton import oks_sigmas, own_keypoints
from mrcnn.structures import Category, Detections

Kind = Literal["box", "mask", "keypoints"]
"""What is measured: each is a group of numbers in `Metrics`."""

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""pycocotools' twelve, in its order: average precision over IoU 0.50:0.95, at 0.50 and 0.75, of small, medium
and large ones; average recall with 1, 10 and 100 detections an image, and of small, medium and large ones."""
KEYPOINT_NUMBERS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
"""pycocotools' ten for keypoints, of the 20 best detections of an image, with OKS in the place of IoU."""


@dataclass(frozen=True)
class Metrics:
    """What pycocotools says of a set of detections.

    Every number is in 0..1, or nan where there is no ground truth to measure it on (pycocotools' -1).
    """

    box: dict[str, float]
    """The twelve `NUMBERS` of the boxes."""
    mask: dict[str, float]
    """The twelve `NUMBERS` of the masks, small to large by the area of the mask; empty without masks."""
    box_per_category: dict[str, float]
    """AP of the boxes by category name."""
    mask_per_category: dict[str, float]
    """AP of the masks by category name."""
    images: int
    """Images of the ground truth, with or without objects in them."""
    keypoints: dict[str, float] = field(default_factory=dict)
    """The ten `KEYPOINT_NUMBERS`; empty without keypoints."""
    keypoints_per_category: dict[str, float] = field(default_factory=dict)
    """AP of the keypoints by name of the categories that have some."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: as the fields are, with None in the place of nan."""
        groups = [f"{kind}{of}" for of in ("", "_per_category") for kind in ("box", "mask", "keypoints")]
        plain = {name: {key: _none_if_nan(x) for key, x in getattr(self, name).items()} for name in groups}
        return {**plain, "images": self.images}

    def table(self) -> str:
        """Rows of numbers in percent under their names, `-` where there is no ground truth."""
        groups = [(NUMBERS, {"box": self.box, "mask": self.mask}), (KEYPOINT_NUMBERS, {"keypoints": self.keypoints})]
        rows: list[list[str]] = []
        for names, kinds in groups:
            measured = {kind: numbers for kind, numbers in kinds.items() if numbers}
            if measured:
                rows.append(["", *names])
                rows += [[kind, *(_percent(numbers[n]) for n in names)] for kind, numbers in measured.items()]
        first = 1 + max(len(row[0]) for row in rows)
        return "\n".join(f"{row[0]:<{first}}" + "".join(f"{cell:>7}" for cell in row[1:]) for row in rows)


def coco_results(image_id: int, detections: Detections, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """The detections of one image as entries of a COCO results file.

    Each is `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`, and, where the detections have them,
    `"segmentation": {"size", "counts"}`, with `counts` as text so that the list can go into JSON, and
    `"keypoints": [x, y, score, ...]`; all in pixels of `detections.image_size`.
    `categories[label - 1]` gives the category id.
    """
    boxes = detections.boxes.cpu().double().numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    rles = [None] * len(detections) if detections.mask_probs is None else detections.rles
    points = own_keypoints(detections, categories)
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    return [
        {
            "image_id": image_id,
            "category_id": categories[label - 1].id,
            "bbox": box,
            "score": score,
            **({} if rle is None else {"segmentation": _rle_as_text(rle)}),
            **({} if own is None else {"keypoints": own}),
        }
        for box, label, score, rle, own in zip(boxes.tolist(), labels, scores, rles, points, strict=True)
    ]


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kinds: Collection[Kind] | None = None,
    *,
    mask_area: Literal["mask", "box"] = "mask",
) -> Metrics:
    """pycocotools' judgement of results, as `coco_results` makes them, against a COCO annotation dict.

    Neither argument is changed. `kinds` says what the model finds, by default what at least one result has. No results
    at all are a valid, bad answer: zeros, for all kinds. Keypoints are left out where the ground truth has none.

    A mask is small, medium or large by its own area, as in detectron2, or by its box (`mask_area`), as pycocotools has
    it for results with boxes. An object without a mask has an empty one, which no detection can match. Keypoints are
    compared with COCO's tolerances where there are 17, and else by the rule of `oks_sigmas`.

    Raises ValueError for a result whose image or category the ground truth does not have, or that has another number
    of keypoints than the ground truth.
    """
    found = coco_evaluations(ground_truth, results, kinds, mask_area=mask_area)
    numbers = {kind: _numbers(evaluation) for kind, evaluation in found.items()}
    per_category = {kind: _per_category(evaluation) for kind, evaluation in found.items()}
    return Metrics(
        box=numbers.get("box", {}),
        mask=numbers.get("mask", {}),
        box_per_category=per_category.get("box", {}),
        mask_per_category=per_category.get("mask", {}),
        images=len(ground_truth["images"]),
        keypoints=numbers.get("keypoints", {}),
        keypoints_per_category=per_category.get("keypoints", {}),
    )


def coco_evaluations(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kinds: Collection[Kind] | None = None,
    *,
    mask_area: Literal["mask", "box"] = "mask",
) -> dict[Kind, COCOeval]:
    """What `evaluate_coco` takes its numbers from: pycocotools' evaluations, with precision and recall as arrays."""
    _check_known(ground_truth, results)
    kinds = _kinds(results) if kinds is None else kinds
    _check_arguments(kinds, mask_area)
    _check_results(ground_truth, results, kinds, mask_area)
    truth = _truth(ground_truth)
    found: dict[Kind, COCOeval] = {}
    if "box" in kinds:
        found["box"] = _evaluate(truth, _box_annotations(results), "bbox")
    if "mask" in kinds:
        found["mask"] = _evaluate(truth, _mask_annotations(results, mask_area), "segm")
    if "keypoints" in kinds and (counts := _keypoint_counts(ground_truth)):
        found["keypoints"] = _evaluate_keypoints(truth, results, counts)
    return found


def _kinds(results: Sequence[Mapping[str, Any]]) -> set[Kind]:
    keys: dict[Kind, str] = {"box": "bbox", "mask": "segmentation", "keypoints": "keypoints"}
    return {kind for kind, key in keys.items() if not results or any(key in result for result in results)}


def _check_known(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in ground_truth[table]}
        unknown = {result[key] for result in results} - known
        if unknown:
            raise ValueError(
                f"results have {key} {min(unknown)}, which is not among the {len(known)} {table} "
                "of the ground truth: evaluate against the annotations of the same images"
            )


def _check_arguments(kinds: Collection[Kind], mask_area: str) -> None:
    for name, values, known in (("kinds", set(kinds), get_args(Kind)), ("mask_area", {mask_area}, ("mask", "box"))):
        if unknown := values - set(known):
            raise ValueError(f"{name} has {min(unknown)!r}, but may have {', '.join(known)}: take of these")


def _check_results(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kinds: Collection[Kind], mask_area: str
) -> None:
    """What pycocotools would answer with zeros or with a KeyError."""
    names = [category["name"] for category in ground_truth["categories"]]
    if len(set(names)) < len(names):
        raise ValueError(f"two categories have the name {max(names, key=names.count)!r}: give each a name of its own")
    sizes = {image["id"]: [image["height"], image["width"]] for image in ground_truth["images"]}
    needs_box = "box" in kinds or ("mask" in kinds and mask_area == "box")
    for i, result in enumerate(results):
        box = result.get("bbox", ())
        if not math.isfinite(result.get("score", math.nan)):
            raise ValueError(f"results[{i}] has the score {result.get('score')}: give a number")
        if needs_box and not (len(box) == 4 and all(map(math.isfinite, box)) and min(box[2:]) >= 0):
            raise ValueError(f"results[{i}] has the bbox {box}: give x, y, width, height of at least 0")
        size = result["segmentation"]["size"] if "mask" in kinds and "segmentation" in result else None
        if size is not None and list(size) != sizes[result["image_id"]]:
            raise ValueError(
                f"results[{i}] has a mask of size {list(size)}, but image {result['image_id']} is "
                f"{sizes[result['image_id']]}: give masks of the whole source image"
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
    coco.createIndex()
    return coco


def _common(i: int, result: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("image_id", "category_id", "score")
    return {"id": i, "iscrowd": 0, **{key: result[key] for key in keys}}


def _box_annotations(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**_common(i, r), "bbox": r["bbox"], "area": r["bbox"][2] * r["bbox"][3]}
        for i, r in enumerate(results, start=1)
        if "bbox" in r
    ]


def _mask_annotations(results: Sequence[Mapping[str, Any]], mask_area: Literal["mask", "box"]) -> list[dict[str, Any]]:
    # One mask at a time: pycocotools' area of a list fails from 256 masks on.
    def area(result: Mapping[str, Any]) -> float:
        by_box = mask_area == "box"
        return result["bbox"][2] * result["bbox"][3] if by_box else float(mask_utils.area(result["segmentation"]))

    return [
        {**_common(i, r), "segmentation": r["segmentation"], "area": area(r)}
        for i, r in enumerate(results, start=1)
        if "segmentation" in r
    ]


def _keypoint_counts(ground_truth: Mapping[str, Any]) -> dict[int, int]:
    """Number of keypoints by category id, of the categories that have any."""
    counts = {a["category_id"]: len(a["keypoints"]) // 3 for a in ground_truth["annotations"] if a.get("keypoints")}
    named = {c["id"]: len(c["keypoints"]) for c in ground_truth["categories"] if c.get("keypoints")}
    return {**counts, **named}


def _evaluate_keypoints(truth: COCO, results: Sequence[Mapping[str, Any]], counts: Mapping[int, int]) -> COCOeval:
    """With as many keypoints as the category with most of them has; what another does not have is not annotated."""
    most = max(counts.values())
    annotations = [{**a, **_annotated_keypoints(a, counts, most)} for a in truth.dataset["annotations"]]
    annotated = _coco(truth.dataset["images"], truth.dataset["categories"], annotations)
    found = [_keypoint_annotation(i, r, counts, most) for i, r in enumerate(results, start=1) if r.get("keypoints")]
    evaluation = _quiet(annotated, _coco(truth.dataset["images"], truth.dataset["categories"], found), "keypoints")
    evaluation.params.catIds = sorted(counts)
    evaluation.params.kpt_oks_sigmas = oks_sigmas(most)
    return _run(evaluation)


def _annotated_keypoints(annotation: Mapping[str, Any], counts: Mapping[int, int], most: int) -> dict[str, Any]:
    points = annotation.get("keypoints") or [0] * 3 * counts.get(annotation["category_id"], 0)
    _check_count(annotation, points, counts)
    points = [*points, *[0] * (3 * most - len(points))]
    return {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}


def _keypoint_annotation(i: int, result: Mapping[str, Any], counts: Mapping[int, int], most: int) -> dict[str, Any]:
    """The area is that of the keypoints' extent, as in pycocotools."""
    points = result["keypoints"]
    _check_count(result, points, counts)
    x, y = points[0::3], points[1::3]
    area = (max(x) - min(x)) * (max(y) - min(y))
    return {**_common(i, result), "keypoints": [*points, *[0] * (3 * most - len(points))], "area": area}


def _check_count(entry: Mapping[str, Any], points: Sequence[float], counts: Mapping[int, int]) -> None:
    expected = 3 * counts.get(entry["category_id"], 0)
    if len(points) != expected:
        raise ValueError(
            f"an object of image {entry['image_id']} has {len(points)} keypoint numbers, but category "
            f"{entry['category_id']} has {expected} (x, y, visibility or score for each): use the model's own data set"
        )


def _evaluate(truth: COCO, annotations: list[dict[str, Any]], kind: Literal["bbox", "segm"]) -> COCOeval:
    found = _coco(truth.dataset["images"], truth.dataset["categories"], annotations)
    return _run(_quiet(truth, found, kind))


def _quiet(truth: COCO, found: COCO, kind: Literal["bbox", "segm", "keypoints"]) -> COCOeval:
    return COCOeval(truth, found, kind, print_function=lambda *_: None)  # it would log its tables


def _run(evaluation: COCOeval) -> COCOeval:
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _numbers(evaluation: COCOeval) -> dict[str, float]:
    names = KEYPOINT_NUMBERS if evaluation.params.iouType == "keypoints" else NUMBERS
    return {name: _nan_if_none(float(x)) for name, x in zip(names, evaluation.stats, strict=True)}


def _per_category(evaluation: COCOeval) -> dict[str, float]:
    """AP by name from `precision`, shape (IoU thresholds, recalls, categories, areas, detection limits)."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return {
        evaluation.cocoGt.cats[category]["name"]: _nan_if_none(float(precision[:, :, k].mean()))
        for k, category in enumerate(evaluation.params.catIds)
    }


def _nan_if_none(value: float) -> float:
    """pycocotools says -1 where there is no ground truth."""
    return math.nan if value < 0 else value


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rle_as_text(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(x) for x in rle["size"]], "counts": text}
