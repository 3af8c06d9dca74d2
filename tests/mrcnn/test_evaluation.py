"""pycocotools' numbers come out as pycocotools gives them, and hand-made cases as arithmetic gives them."""

from __future__ import annotations

import copy
import io
import json
import math
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn.evaluation import (
    KEYPOINT_NUMBERS,
    NUMBERS,
    coco_evaluations,
    coco_results,
    evaluate_coco,
)
from mrcnn.skeleton import COCO_SIGMAS, oks_sigmas
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


def read(name: str) -> Any:
    """A file of the oracle, or a skip."""
    if not (ORACLE / f"{name}.json").exists():
        pytest.skip(f"no reference numbers in {ORACLE}: set MRCNN_ORACLE to their folder")
    return json.loads((ORACLE / f"{name}.json").read_text())


KINDS = {
    "bbox": ("box", "instances", "mask"),
    "segm_area_from_mask": ("mask", "instances", "mask"),
    "segm_area_from_bbox": ("mask", "instances", "box"),
    "keypoints": ("keypoints", "keypoints", "mask"),
}


@pytest.mark.parametrize("key", KINDS)
def test_numbers_categories_and_curves_are_pycocotools(key: str) -> None:
    kind, results, mask_area = KINDS[key]
    truth_name = {"instances": "coco_instances", "keypoints": "coco_person_keypoints"}[results]
    expected = read("coco_eval_expected")[key]
    arguments = (read(f"{truth_name}_val2017_tiny"), read(f"coco_results_{results}"))
    metrics = evaluate_coco(*arguments, mask_area=mask_area)  # type: ignore[arg-type]
    assert list(getattr(metrics, kind).values()) == pytest.approx(expected["stats"], abs=1e-12)
    assert metrics.images == 50
    names = {str(c["id"]): c["name"] for c in arguments[0]["categories"]}
    by_name = {names[i]: ap for i, ap in expected.get("ap_per_category", {"1": expected["stats"][0]}).items()}
    found = {n: -1.0 if math.isnan(ap) else ap for n, ap in getattr(metrics, f"{kind}_per_category").items()}
    assert found == pytest.approx(by_name, abs=1e-12)
    curves = coco_evaluations(*arguments, {kind}, mask_area=mask_area)[kind].eval  # type: ignore[arg-type, index]
    with np.load(ORACLE / "coco_eval_arrays.npz") as arrays:
        for name in ("precision", "recall", "scores"):  # stored in single precision
            np.testing.assert_allclose(curves[name], arrays[f"{key}/{name}"], rtol=0, atol=1e-7)


def test_masks_are_small_or_large_by_their_own_area() -> None:
    truth, results = read("coco_instances_val2017_tiny"), read("coco_results_instances")
    by_mask, by_box = (evaluate_coco(truth, results, {"mask"}, mask_area=area).mask for area in ("mask", "box"))
    assert by_mask["AP"] == pytest.approx(by_box["AP"])
    assert by_mask["APl"] != pytest.approx(by_box["APl"], abs=1e-3)


@pytest.mark.coco100
@pytest.mark.parametrize("file", ["instances_train2017", "person_keypoints_train2017", "instances_val2017"])
def test_real_annotations_give_pycocotools_own_numbers(coco100: Path, file: str) -> None:
    """Results made of the annotations themselves, moved about, with made up scores."""
    gt = json.loads((coco100 / f"annotations/{file}.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in gt["images"]}
    rng = np.random.RandomState(0)
    results = [moved(a, sizes[a["image_id"]], rng) for a in gt["annotations"] if not a["iscrowd"]]
    metrics = evaluate_coco(gt, results)
    kinds = {"box": "bbox", "mask": "segmentation"} | ({"keypoints": "keypoints"} if "person" in file else {})
    for kind, key in kinds.items():
        expected = pycocotools_numbers(gt, results, key)
        assert list(getattr(metrics, kind).values()) == pytest.approx(expected, abs=1e-6, nan_ok=True)
        assert 0.1 < getattr(metrics, kind)["AP"] < 0.9


def moved(a: dict[str, Any], size: tuple[int, int], rng: np.random.RandomState) -> dict[str, Any]:
    x, y, w, h = a["bbox"]
    dx, dy = (rng.normal(0, 0.08, 2) * [w, h]).tolist()
    mask = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(a["segmentation"], *size)))
    shifted = np.roll(mask, (round(dy), round(dx)), (0, 1))
    found = {key: a[key] for key in ("image_id", "category_id")} | {"score": round(float(rng.rand()), 2)}
    found |= {"bbox": [x + dx, y + dy, w, h], "segmentation": mask_utils.encode(np.asfortranarray(shifted))}
    if "keypoints" in a:
        points = np.array(a["keypoints"], float).reshape(-1, 3)
        points[:, :2] += rng.normal(0, 0.02, (len(points), 2)) * [w, h]
        found["keypoints"] = points.ravel().tolist()
    return found


def pycocotools_numbers(gt: dict[str, Any], results: list[dict[str, Any]], kind: str) -> list[float]:
    keep = ("image_id", "category_id", "score", kind)
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(gt)
        coco.createIndex()
        evaluation = COCOeval(
            coco, coco.loadRes([{k: r[k] for k in keep} for r in results]), kind.replace("segmentation", "segm")
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value < 0 else float(value) for value in evaluation.stats]


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
    assert metrics.keypoints == {}
    nothing = evaluate_coco(truth(), [result(0, 3, (10, 10, 16, 20), 0.9)])
    assert all(math.isnan(x) for x in [*nothing.box.values(), *nothing.mask.values()])


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    gt = pointed_truth(annotation(0, 3, (10, 10, 40, 40), keypoints=[10, 10, 2, 49, 10, 1, 30, 49, 2]))
    evaluate_coco(gt, [result(0, 3, (10, 10, 20, 20), 0.9)], {"box", "mask", "keypoints"})
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


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
    empty = Detections(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), (9, 9), torch.zeros(0, 28, 28))
    assert coco_results(1, empty, CATEGORIES) == []


CATS_WITH_POINTS = (
    Category(3, "cat", ("left_ear", "right_ear", "tail")),
    Category(7, "dog", ("nose",)),
    Category(8, "yak"),
)


def pointed_truth(*annotations: dict[str, Any]) -> dict[str, Any]:
    categories = [{"id": c.id, "name": c.name, "keypoints": list(c.keypoints)} for c in CATS_WITH_POINTS]
    return {**truth(*annotations), "categories": categories}


def test_boxes_alone_are_measured_alone() -> None:
    boxes = [{k: v for k, v in result(0, 3, (10, 10, 20, 20), 0.9).items() if k != "segmentation"}]
    gt = truth(annotation(0, 3, (10, 10, 20, 20)))
    metrics = evaluate_coco(gt, boxes)
    assert metrics.box["AP"] == pytest.approx(1.0)
    assert metrics.mask == metrics.mask_per_category == metrics.keypoints == {}
    assert evaluate_coco(gt, [], {"box"}).mask == {}
    assert [line.split()[0] for line in metrics.table().splitlines()] == ["AP", "box"]
    assert json.loads(json.dumps(metrics.to_dict()))["mask"] == {}


def test_keypoints_of_categories_with_different_numbers_of_them() -> None:
    cat = annotation(0, 3, (10, 10, 40, 40), keypoints=[10, 10, 2, 49, 10, 1, 30, 49, 2])
    dog = annotation(1, 7, (60, 20, 50, 50), keypoints=[70, 30, 2])
    unmarked = annotation(1, 3, (10, 10, 40, 40))
    found = [
        {**result(0, 3, (10, 10, 40, 40), 0.9), "keypoints": [10, 10, 0.3, 49, 10, 0.2, 30, 49, 0.9]},
        {**result(1, 7, (60, 20, 50, 50), 0.8), "keypoints": [70, 30, 0.9]},
        {**result(1, 3, (10, 10, 40, 40), 0.95), "keypoints": [11, 11, 0.3, 48, 11, 0.2, 30, 48, 0.9]},
        result(0, 8, (10, 10, 40, 40), 0.9),
    ]
    metrics = evaluate_coco(pointed_truth(cat, dog, unmarked), found)
    assert list(metrics.keypoints) == list(KEYPOINT_NUMBERS)
    assert metrics.keypoints["AP"] == pytest.approx(1.0)
    assert metrics.keypoints_per_category == pytest.approx({"cat": 1.0, "dog": 1.0})
    assert "keypoints" in metrics.table()


def test_similarity_is_that_of_the_stated_tolerance() -> None:
    """One point, off by d: OKS = exp(-d^2 / (8 sigma^2 area)); here 0.72: passes 0.50 .. 0.70, five of ten."""
    dog = annotation(0, 7, (10, 10, 40, 40), keypoints=[20, 20, 2])
    (sigma,) = oks_sigmas(1)
    assert sigma == pytest.approx(np.mean(COCO_SIGMAS))
    d = math.sqrt(-8 * sigma**2 * 1600 * math.log(0.72))
    gt = {**pointed_truth(dog), "categories": [{"id": 7, "name": "dog", "keypoints": ["nose"]}]}
    found = [{**result(0, 7, (10, 10, 40, 40), 0.9), "keypoints": [20 + d, 20, 0.9]}]
    assert evaluate_coco(gt, found).keypoints["AP"] == pytest.approx(0.5)


def test_other_numbers_of_keypoints_are_refused() -> None:
    gt = pointed_truth(annotation(0, 3, (10, 10, 40, 40)))
    wrong = {**result(0, 3, (10, 10, 40, 40), 0.9), "keypoints": [1.0, 2.0, 0.5]}
    with pytest.raises(ValueError, match=r"image 0 has 3 keypoint numbers, but category 3 has 9"):
        evaluate_coco(gt, [wrong])


def test_coco_results_have_what_the_model_finds() -> None:
    boxes, points = torch.tensor([[10.0, 20.0, 50.0, 80.0]] * 3), torch.arange(27.0).reshape(3, 3, 3)
    found = Detections(boxes, torch.tensor([1, 2, 3]), torch.tensor([0.9, 0.8, 0.7]), (100, 200), keypoints=points)
    entries = coco_results(9, found, CATS_WITH_POINTS)
    assert [entry.get("keypoints") for entry in entries] == [list(range(9)), [9, 10, 11], None]
    assert all("segmentation" not in entry for entry in entries)
    unnamed = coco_results(9, found, CATEGORIES)
    assert [len(entry["keypoints"]) for entry in unnamed] == [9, 9, 9]


def _one_result(**changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    mask = {"size": [10, 20], "counts": mask_utils.encode(np.ones((10, 20), np.uint8, order="F"))["counts"].decode()}
    truth = {
        "images": [{"id": 1, "height": 10, "width": 20}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 10], "area": 200, "iscrowd": 0, "segmentation": mask}
        ],
    }
    result = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 20, 10], "segmentation": mask, **changes}
    return truth, [{key: value for key, value in result.items() if value is not None}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"segmentation": {"size": [5, 20], "counts": "T3"}}, r"results\[0\] has a mask of size \[5, 20\].*\[10, 20\]"),
        ({"bbox": [0, 0, -1, 4]}, r"results\[0\] has the bbox \[0, 0, -1, 4\]"),
        ({"bbox": [0, float("nan"), 1, 4]}, r"results\[0\] has the bbox .*nan"),
        ({"bbox": None}, r"results\[0\] has the bbox \(\)"),
        ({"score": float("nan")}, r"results\[0\] has the score nan"),
        ({"score": None}, r"results\[0\] has the score None"),
    ],
)
def test_results_that_cannot_be_measured_are_refused(changes: dict[str, Any], words: str) -> None:
    truth, results = _one_result(**changes)
    with pytest.raises(ValueError, match=words):
        evaluate_coco(truth, results, {"box", "mask"})


def test_arguments_that_mean_nothing_are_refused() -> None:
    truth, results = _one_result()
    assert evaluate_coco(truth, results).mask["AP"] == 1
    with pytest.raises(ValueError, match="kinds has 'masks', but may have box, mask, keypoints"):
        evaluate_coco(truth, results, {"masks"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask_area has 'bbox', but may have mask, box"):
        evaluate_coco(truth, results, mask_area="bbox")  # type: ignore[arg-type]
    twice = {**truth, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}
    with pytest.raises(ValueError, match="two categories have the name 'a'"):
        evaluate_coco(twice, results)
