"""The evaluations of a run: the best so far, whoever measured it, and the table by category."""

import json
import math
from dataclasses import replace
from pathlib import Path

from jobs.evaluations import Evaluations, ap_metrics
from mrcnn.evaluation import Metrics


def found(mask_ap: float, *, dog: float = 0.5) -> Metrics:
    numbers = {"AP": mask_ap, "AP50": 0.5, "AP75": math.nan}
    return Metrics(
        box={**numbers, "AP": 0.3},
        mask=numbers,
        box_per_category={"cat": 0.3, "dog": 0.3},
        mask_per_category={"cat": mask_ap, "dog": dog},
        images=5,
    )


def test_the_metrics_are_of_what_was_measured() -> None:
    named = ap_metrics(found(0.2))
    assert list(named) == ["val/mask_AP", "val/mask_AP50", "val/mask_AP75", "val/box_AP", "val/box_AP50"]
    assert named["val/mask_AP"] == 0.2


def test_the_best_survives_the_worker(tmp_path: Path) -> None:
    Evaluations(str(tmp_path)).add(10, found(0.4), newest=10)
    later = Evaluations(str(tmp_path))
    later.add(20, found(0.2), newest=20)
    assert later.best() == {"best/mask_AP": 0.4, "best/mask_AP50": 0.5, "best/box_AP": 0.3, "best/box_AP50": 0.5}
    later.add(30, found(0.6), newest=30)
    assert Evaluations(str(tmp_path)).best()["best/mask_AP"] == 0.6


def test_what_is_measured_again_replaces_what_was_lost(tmp_path: Path) -> None:
    """A run that went on from step 10 has trained the next ones anew: their old evaluations are of nobody's weights."""
    evaluations = Evaluations(str(tmp_path))
    for step, value in ((10, 0.1), (20, 0.9), (30, 0.8)):
        evaluations.add(step, found(value), newest=step)
    again = Evaluations(str(tmp_path))
    again.add(20, found(0.3), newest=20)
    assert again.best()["best/mask_AP"] == 0.3
    assert again.table()["step"] == [10, 10, 20, 20]


def test_one_that_comes_late_leaves_the_later_ones(tmp_path: Path) -> None:
    """What has failed before is evaluated on resuming, when later checkpoints have been."""
    evaluations = Evaluations(str(tmp_path))
    evaluations.add_failure(10, "memory is short", newest=10)
    evaluations.add(20, found(0.2), newest=20)
    assert Evaluations(str(tmp_path)).failures() == {10: "memory is short"}
    assert evaluations.metrics(10) == {}
    evaluations.add(10, found(0.1), newest=20)
    again = Evaluations(str(tmp_path))
    assert again.failures() == {}
    assert again.table()["step"] == [10, 10, 20, 20]


def test_the_best_step_is_by_the_first_measure_that_there_is(tmp_path: Path) -> None:
    evaluations = Evaluations(str(tmp_path))
    assert evaluations.best_step() is None
    evaluations.add_failure(5, "memory is short", newest=5)
    assert evaluations.best_step() is None
    for step, value in ((10, 0.1), (20, 0.4), (30, 0.4), (40, math.nan)):
        evaluations.add(step, found(value), newest=step)
    assert evaluations.best_step() == (20, "val/mask_AP", 0.4)
    maskless = Evaluations(str(tmp_path / "maskless"))
    for step, value in ((10, 0.3), (20, 0.2)):
        maskless.add(step, replace(found(0.0), mask={}, box={**found(0.0).box, "AP": value}), newest=step)
    assert maskless.best_step() == (10, "val/box_AP", 0.3)


def test_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    Evaluations(str(tmp_path)).add(10, found(1 / 3), newest=10)
    metrics = Evaluations(str(tmp_path)).metrics(10)
    assert metrics["val/mask_AP"] == 1 / 3
    assert math.isnan(metrics["val/mask_AP75"])
    assert list(metrics) == list(ap_metrics(found(1 / 3)))


def test_the_table_has_a_row_for_each_step_and_category(tmp_path: Path) -> None:
    Evaluations(str(tmp_path)).add(10, found(0.4), newest=10)
    evaluations = Evaluations(str(tmp_path))
    evaluations.add(20, found(0.2, dog=math.nan), newest=20)
    assert evaluations.table() == {
        "step": [10, 10, 20, 20],
        "category": ["cat", "dog", "cat", "dog"],
        "mask_AP": [0.4, 0.5, 0.2, None],
        "box_AP": [0.3, 0.3, 0.3, 0.3],
    }
    text = (tmp_path / "evaluations.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["20"]["metrics"]["val/mask_AP75"] is None
