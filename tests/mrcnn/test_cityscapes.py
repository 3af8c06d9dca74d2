"""Cityscapes' numbers come out as cityscapesScripts gives them, and hand-made cases as arithmetic gives them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from mrcnn.cityscapes import CLASSES, CityscapesMetrics, InstancePrediction, evaluate_cityscapes

EXPECTED = Path(__file__).with_name("cityscapes_expected.json")
"""Of `scenes(seed)`, computed with evalInstanceLevelSemanticLabeling of cityscapesScripts 2.3.0."""
Scene = tuple[np.ndarray, list[InstancePrediction]]
SIZE = (96, 160)


def scenes(seed: int, images: int = 6) -> list[Scene]:
    """Random rectangles of all kinds of regions, and predictions that are good, shifted, doubled, mislabelled or made
    up, with scores that often tie."""
    rng = np.random.RandomState(seed)  # whose numbers never change
    return [scene(rng) for _ in range(images)]


def scene(rng: np.random.RandomState) -> Scene:
    ids = rng.choice([7, 8, 11, 23], (4, 4)).repeat(SIZE[0] // 4, 0).repeat(SIZE[1] // 4, 1).astype(np.int32)
    labels = rng.choice([24, 26, 26, 31, 33], 12)  # no rider, truck, bus or motorcycle
    for number, label in enumerate(labels):
        kind = rng.rand()
        value = label if kind < 0.2 else 29000 + number if kind < 0.25 else label * 1000 + number
        ids[region(rng)] = 4 if kind > 0.9 else value
    predictions = [prediction(rng, ids == value, value) for value in np.unique(ids) for _ in range(rng.randint(0, 3))]
    return ids, [each for each in predictions if rng.rand() < 0.95]


def region(rng: np.random.RandomState) -> tuple[slice, slice]:
    height, width = rng.randint(4, 40, 2)
    y, x = rng.randint(0, SIZE[0] - height), rng.randint(0, SIZE[1] - width)
    return np.s_[y : y + height, x : x + width]


def prediction(rng: np.random.RandomState, mask: np.ndarray, value: int) -> InstancePrediction:
    label = value // 1000 if value >= 1000 else value
    if label not in CLASSES or rng.rand() < 0.1:
        label = int(rng.choice([24, 26, 27, 31, 33, 29]))
    shifted = np.roll(mask, rng.randint(-4, 5, 2), (0, 1))
    shifted[region(rng)] = rng.rand() < 0.2
    return InstancePrediction(int(label), round(float(rng.rand()), 1), shifted)


def plain(metrics: CityscapesMetrics) -> dict[str, float | None]:
    numbers = {"ap": metrics.ap, "ap50": metrics.ap50}
    numbers |= {f"ap {name}": value for name, value in metrics.ap_per_class.items()}
    numbers |= {f"ap50 {name}": value for name, value in metrics.ap50_per_class.items()}
    return {key: None if math.isnan(value) else value for key, value in numbers.items()}


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_those_of_cityscapesscripts(seed: int) -> None:
    expected = json.loads(EXPECTED.read_text())[str(seed)]
    found = plain(evaluate_cityscapes(scenes(seed)))
    assert {key for key, value in found.items() if value is None} == {k for k, v in expected.items() if v is None}
    for key, value in expected.items():
        assert value is None or found[key] == pytest.approx(value, abs=1e-12), key


def box(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def street(*objects: tuple[int, np.ndarray]) -> np.ndarray:
    """Road, with ids in the places of masks."""
    ids = np.full(SIZE, 7, np.int32)
    for value, mask in objects:
        ids[mask] = value
    return ids


CAR = box(10, 10, 20, 20)


def car_ap(*images: Scene) -> tuple[float, float]:
    metrics = evaluate_cityscapes(iter(images))
    assert metrics.images == len(images)
    return metrics.ap_per_class["car"], metrics.ap50_per_class["car"]


def test_perfect_is_one_and_other_classes_are_left_out() -> None:
    metrics = evaluate_cityscapes([(street((26000, CAR)), [InstancePrediction(26, 0.9, CAR)])])
    assert metrics.ap == metrics.ap50 == metrics.ap_per_class["car"] == pytest.approx(1.0)
    assert [name for name, ap in metrics.ap_per_class.items() if not math.isnan(ap)] == ["car"]
    assert math.isnan(evaluate_cityscapes([(street(), [InstancePrediction(26, 0.9, CAR)])]).ap)
    assert math.isnan(evaluate_cityscapes([]).ap)


def test_run_lengths_are_as_good_as_bitmaps() -> None:
    rle = mask_utils.encode(np.asfortranarray(CAR, np.uint8))
    assert car_ap((street((26000, CAR)), [InstancePrediction(26, 0.9, rle)])) == pytest.approx((1.0, 1.0))


def test_nothing_found_is_zero() -> None:
    assert car_ap((street((26000, CAR)), [])) == (0.0, 0.0)
    assert car_ap((street((26000, CAR)), [InstancePrediction(26, 0.9, box(0, 0, 0, 0))])) == (0.0, 0.0)


def test_overlap_has_to_be_more_than_its_threshold() -> None:
    """Of 20 columns 16 are 0.8: passes 0.50 .. 0.75, six of ten."""
    ap, ap50 = car_ap((street((26000, CAR)), [InstancePrediction(26, 0.9, box(10, 10, 16, 20))]))
    assert (ap, ap50) == pytest.approx((0.6, 1.0))
    half = car_ap((street((26000, CAR)), [InstancePrediction(26, 0.9, box(10, 10, 10, 20))]))
    assert half == (0.0, 0.0)


def test_the_better_of_two_on_one_object_is_right() -> None:
    """Points (recall, precision): (1, 1/2), (1, 1), (0, 1); each step is half of what its neighbours are apart."""
    shifted = box(11, 10, 20, 20)
    worse_first = [InstancePrediction(26, 0.3, CAR), InstancePrediction(26, 0.8, shifted)]
    _, ap50 = car_ap((street((26000, CAR)), worse_first))
    assert ap50 == pytest.approx(0.5 * 0 + 1 * 0.5 + 1 * 0.5)
    false_alarm_first = [InstancePrediction(26, 0.3, CAR), InstancePrediction(26, 0.8, box(100, 50, 20, 20))]
    _, ap50 = car_ap((street((26000, CAR)), false_alarm_first))
    assert ap50 == pytest.approx(0.5 * 0.5 + 0 * 0.5 + 1 * 0)


@pytest.mark.parametrize(
    ("value", "where"),
    [(26, box(60, 10, 30, 30)), (4, box(60, 10, 30, 30)), (26001, box(60, 10, 9, 11))],
    ids=["group", "void", "small"],
)
def test_predictions_on_what_is_ignored_do_not_count(value: int, where: np.ndarray) -> None:
    ids = street((26000, CAR), (value, where))
    good = InstancePrediction(26, 0.5, CAR)
    assert car_ap((ids, [good, InstancePrediction(26, 0.9, where)])) == pytest.approx((1.0, 1.0))
    assert car_ap((ids, [good, InstancePrediction(26, 0.9, box(60, 60, 30, 30))]))[1] < 0.5


def test_caravans_are_no_cars() -> None:
    ids = street((26000, CAR), (29000, box(60, 10, 30, 30)))
    predictions = [InstancePrediction(26, 0.5, CAR), InstancePrediction(29, 0.9, box(60, 10, 30, 30))]
    assert car_ap((ids, predictions)) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (InstancePrediction(3, 0.5, CAR), "label 3, but must have one of"),
        (InstancePrediction(26, math.nan, CAR), "score nan"),
        (InstancePrediction(26, 0.5, CAR[:50]), r"a mask is \(50, 160\), but its image \(96, 160\)"),
    ],
)
def test_nonsense_is_refused(wrong: InstancePrediction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_cityscapes([(street(), [wrong])])


@pytest.mark.parametrize("wrong", [street().astype(float), street((26000 * 1000, CAR)), street()[0], street()[:0]])
def test_what_are_no_ids_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be .* of ids from -1 to 33999"):
        evaluate_cityscapes([(wrong, [])])
