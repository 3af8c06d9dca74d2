"""The evaluations of a run: `evaluations.json` in its folder, so that a later worker, too, knows the best so far."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from jobs.tracking import MEASURES
from mrcnn.evaluation import Metrics
from pipelines.patience import patiently
from pipelines.storage import open_store

FILE = "evaluations.json"


class Evaluations:
    """What was measured at which step of the run."""

    def __init__(self, run_uri: str) -> None:
        self._store = open_store(run_uri)
        self._by_step: dict[int, dict[str, Any]] = {}
        if patiently(lambda: self._store.exists(FILE)):
            content = json.loads(patiently(lambda: self._store.read_bytes(FILE)))
            self._by_step = {int(step): found for step, found in content.items()}

    def add(self, step: int, found: Metrics, *, newest: int) -> None:
        """Add one. What was measured later than at `newest`, the step of the newest checkpoint, is forgotten: a run
        that went on from an earlier checkpoint measures it again."""
        metrics = {name: none_if_nan(value) for name, value in ap_metrics(found).items()}
        self._put(step, {"metrics": metrics, "per_category": _per_category(found)}, newest)

    def add_failure(self, step: int, reason: str, *, newest: int) -> None:
        """Say that an evaluation was tried often enough."""
        self._put(step, {"metrics": {}, "per_category": {}, "failure": reason}, newest)

    def _put(self, step: int, entry: dict[str, Any], newest: int) -> None:
        still = {old: other for old, other in self._by_step.items() if old <= newest}
        self._by_step = dict(sorted({**still, step: entry}.items()))
        data = json.dumps(self._by_step, indent=1).encode()
        patiently(lambda: self._store.write_bytes(FILE, data))

    def metrics(self, step: int) -> dict[str, float]:
        """Of `ap_metrics`, what was found at a step; nothing where it was not evaluated."""
        found = self._by_step.get(step, {"metrics": {}})["metrics"]
        return {name: math.nan if value is None else value for name, value in found.items()}

    def failures(self) -> dict[int, str]:
        """Why which steps could not be evaluated."""
        return {step: entry["failure"] for step, entry in self._by_step.items() if "failure" in entry}

    def best(self) -> dict[str, float]:
        """The largest value so far of each of `ap_metrics`, as best/... in the place of val/...; none that is nan."""
        best: dict[str, float] = {}
        for entry in self._by_step.values():
            for name, value in entry["metrics"].items():
                key = name.replace("val/", "best/")
                if value is not None:
                    best[key] = max(value, best.get(key, value))
        return best

    def best_step(self) -> tuple[int, str, float] | None:
        """Which step has the largest value (the first one that has it) of which measure: the first of
        `tracking.MEASURES` that was measured. None as long as nothing was."""
        for measure in MEASURES:
            values = {step: entry["metrics"].get(measure) for step, entry in self._by_step.items()}
            measured = {step: value for step, value in values.items() if value is not None}
            if measured:
                step = max(measured, key=measured.__getitem__)
                return step, measure, measured[step]
        return None

    def table(self) -> dict[str, list[Any]]:
        """AP by step and category, as columns; None where there is nothing to measure it on."""
        rows = [
            {"step": step, "category": category, **numbers}
            for step, entry in self._by_step.items()
            for category, numbers in entry["per_category"].items()
        ]
        columns = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in columns}


def ap_metrics(found: Metrics) -> dict[str, float]:
    """The metrics that are compared between runs, of what the model finds."""
    logged = {
        "mask": (found.mask, ("AP", "AP50", "AP75")),
        "keypoint": (found.keypoints, ("AP", "AP50")),
        "box": (found.box, ("AP", "AP50")),
    }
    return {f"val/{kind}_{name}": all_[name] for kind, (all_, names) in logged.items() if all_ for name in names}


def _per_category(found: Metrics) -> dict[str, dict[str, float | None]]:
    """The APs of each category by its name; keypoints only where it has some."""
    kinds: dict[str, Mapping[str, float]] = {
        "mask_AP": found.mask_per_category,
        "keypoint_AP": found.keypoints_per_category,
        "box_AP": found.box_per_category,
    }
    names = dict.fromkeys(name for numbers in kinds.values() for name in numbers)
    return {
        name: {kind: none_if_nan(numbers[name]) for kind, numbers in kinds.items() if name in numbers} for name in names
    }


def none_if_nan(value: float) -> float | None:
    """For JSON."""
    return None if math.isnan(value) else value
