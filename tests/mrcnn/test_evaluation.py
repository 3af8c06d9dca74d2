"""pycocotools' numbers come out as pycocotools gives them, and hand-made cases as arithmetic gives them."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from mrcnn.evaluation import NUMBERS, Metrics, coco_results, evaluate_coco
from mrcnn.structures import Category, Detections

ORACLE = Path(os.environ.get("MRCNN_ORACLE", Path(__file__).parents[3] / "shared" / "oracle"))
Box = tuple[int, int, int, int]
CATEGORIES = (Category(3, "cat"), Category(7, "dog"), Category(8, "yak"))


def rectangle(x: int, y: int, w: int, h: int, *, size: tuple[int, int] = (100, 200)) -> dict[str, Any]:
    bitmap = np.zeros(size, np.uint8, order="F")
    bitmap[y : y + h, x : x + w] = 1
    rle = mask_utils.encode(bitmap)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def annotation(image_id: int, category_id: int, box: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    return {
        "id": 0,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": rectangle(*box),
        **more,
    }


def result(image_id: int, category_id: int, box: Box, score: float) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "segmentation": rectangle(*box),
        "score": score,
    }


def truth(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [{"id": i, "height": 100, "width": 200} for i in (0, 1)],
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
        "annotations": list(annotations),
    }


@pytest.fixture(scope="module")
def oracle() -> tuple[dict[str, Any], Metrics]:
    if not (ORACLE / "coco_eval_expected.json").exists():
        pytest.skip(f"no reference numbers in {ORACLE}: set MRCNN_ORACLE to their folder")
    read = {
        name: json.loads((ORACLE / f"{name}.json").read_text())
        for name in ("coco_instances_val2017_tiny", "coco_results_instances", "coco_eval_expected")
    }
    metrics = evaluate_coco(read["coco_instances_val2017_tiny"], read["coco_results_instances"])
    return {"truth": read["coco_instances_val2017_tiny"], **read["coco_eval_expected"]}, metrics


@pytest.mark.parametrize(("kind", "key"), [("box", "bbox"), ("mask", "segm_area_from_mask")])
def test_the_twelve_numbers_and_each_category_are_pycocotools(
    oracle: tuple[dict[str, Any], Metrics], kind: str, key: str
) -> None:
    expected, metrics = oracle
    assert list(getattr(metrics, kind).values()) == pytest.approx(expected[key]["stats"], abs=1e-12)
    names = {str(c["id"]): c["name"] for c in expected["truth"]["categories"]}
    by_name = {names[i]: ap for i, ap in expected[key]["ap_per_category"].items()}
    found = {n: -1.0 if math.isnan(ap) else ap for n, ap in getattr(metrics, f"{kind}_per_category").items()}
    assert found == pytest.approx(by_name, abs=1e-12)
    assert metrics.images == 50


def test_masks_are_small_or_large_by_their_own_area(oracle: tuple[dict[str, Any], Metrics]) -> None:
    expected, metrics = oracle
    by_box = dict(zip(NUMBERS, expected["segm_area_from_bbox"]["stats"], strict=True))
    assert metrics.mask["AP"] == pytest.approx(by_box["AP"])
    assert metrics.mask["APl"] != pytest.approx(by_box["APl"], abs=1e-3)


def test_perfect_results_give_one_and_leave_the_arguments_alone() -> None:
    boxes = [(0, 3, (10, 10, 20, 20)), (0, 7, (50, 10, 40, 40)), (1, 3, (0, 0, 100, 100))]
    gt = truth(*(annotation(i, c, b) for i, c, b in boxes))
    results = [result(i, c, b, 0.9) for i, c, b in boxes]
    before = copy.deepcopy((gt, results))
    metrics = evaluate_coco(gt, results)
    assert (gt, results) == before
    assert metrics.box["AP"] == metrics.mask["AP"] == pytest.approx(1.0)
    assert (metrics.mask["APs"], metrics.mask["APm"], metrics.mask["APl"]) == pytest.approx((1, 1, 1))


def test_one_of_two_found_behind_a_false_alarm() -> None:
    """Precision at recall up to 0.5 is 1/2: 51 of pycocotools' 101 recall points."""
    gt = truth(annotation(0, 3, (10, 10, 20, 20)), annotation(1, 3, (10, 10, 20, 20)))
    metrics = evaluate_coco(gt, [result(0, 3, (150, 50, 20, 20), 0.9), result(0, 3, (10, 10, 20, 20), 0.8)])
    assert metrics.mask["AP50"] == pytest.approx(0.5 * 51 / 101)
    assert metrics.mask["AR100"] == pytest.approx(0.5)


def test_iou_decides_which_thresholds_count() -> None:
    """IoU 0.8 (of 20 columns 16) passes 0.50, 0.55, ... 0.80: seven of ten."""
    gt = truth(annotation(0, 3, (10, 10, 20, 20)))
    metrics = evaluate_coco(gt, [result(0, 3, (10, 10, 16, 20), 0.9)])
    assert metrics.box["AP"] == pytest.approx(0.7)
    assert (metrics.box["AP50"], metrics.box["AP75"]) == pytest.approx((1.0, 1.0))


def test_crowds_neither_count_as_found_nor_as_false_alarms() -> None:
    gt = truth(annotation(0, 3, (10, 10, 20, 20)), annotation(0, 3, (100, 0, 80, 80), iscrowd=1))
    found = [result(0, 3, (110, 10, 20, 20), 0.95), result(0, 3, (10, 10, 20, 20), 0.9)]
    assert evaluate_coco(gt, found).mask["AP"] == pytest.approx(1.0)


def test_an_object_without_a_mask_counts_for_boxes_and_is_missed_by_masks() -> None:
    for nothing in (None, []):
        gt = truth(annotation(0, 3, (10, 10, 20, 20), segmentation=nothing))
        metrics = evaluate_coco(gt, [result(0, 3, (10, 10, 20, 20), 0.9)])
        assert (metrics.box["AP"], metrics.mask["AP"]) == pytest.approx((1.0, 0.0))


def test_no_results_are_zeros_and_no_ground_truth_is_nan() -> None:
    metrics = evaluate_coco(truth(annotation(0, 3, (10, 10, 20, 20))), [])
    assert metrics.mask["AP"] == metrics.box["AR100"] == 0.0
    assert metrics.mask_per_category["cat"] == 0.0
    assert math.isnan(metrics.mask_per_category["dog"])
    assert math.isnan(metrics.mask["APl"])
    nothing = evaluate_coco(truth(), [result(0, 3, (10, 10, 16, 20), 0.9)])
    assert all(math.isnan(x) for x in [*nothing.box.values(), *nothing.mask.values()])


def test_metrics_go_into_json_and_onto_the_screen() -> None:
    metrics = evaluate_coco(truth(annotation(0, 3, (10, 10, 20, 20))), [])
    plain = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert plain["mask"]["AP"] == 0.0
    assert plain["mask"]["APl"] is None
    lines = metrics.table().splitlines()
    assert lines[0].split() == list(NUMBERS)
    assert lines[1].split()[0] == "box"
    assert lines[2].split()[:2] == ["mask", "0.0"]
    assert len(lines[2].split()) == 13


@pytest.mark.parametrize(("image", "category", "named"), [(5, 3, "image_id 5"), (0, 4, "category_id 4")])
def test_results_of_other_images_or_categories_are_refused(image: int, category: int, named: str) -> None:
    gt = truth(annotation(0, 3, (10, 10, 20, 20)))
    with pytest.raises(ValueError, match=named):
        evaluate_coco(gt, [result(image, category, (10, 10, 16, 20), 0.9)])


def test_coco_results_of_detections() -> None:
    detections = Detections(
        boxes=torch.tensor([[10.0, 20.0, 50.0, 80.0]]),
        labels=torch.tensor([2]),
        scores=torch.tensor([0.75]),
        mask_probs=torch.ones(1, 28, 28),
        image_size=(100, 200),
    )
    (entry,) = json.loads(json.dumps(coco_results(9, detections, CATEGORIES)))
    assert (entry["image_id"], entry["category_id"], entry["score"]) == (9, 7, 0.75)
    assert entry["bbox"] == [10, 20, 40, 60]
    assert entry["segmentation"]["size"] == [100, 200]
    assert mask_utils.area(entry["segmentation"]) == pytest.approx(40 * 60, rel=0.05)


def test_no_detections_give_no_results() -> None:
    empty = Detections(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), torch.zeros(0, 28, 28), (9, 9))
    assert coco_results(1, empty, CATEGORIES) == []
