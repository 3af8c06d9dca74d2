"""The evaluations of a run: `evaluations.json` in its folder, so that a later worker, too, knows the best so far."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mrcnn.evaluation import Metrics
from pipelines.storage import open_store

FILE = "evaluations.json"


class Evaluations:
    """What was measured at which step."""

    def __init__(self, run_uri: str) -> None:
        self._store = open_store(run_uri)
        self._by_step: dict[int, dict[str, Any]] = {}
        if self._store.exists(FILE):
            self._by_step = {int(step): found for step, found in json.loads(self._store.read_bytes(FILE)).items()}

    def add(self, step: int, found: Metrics) -> None:
        """Add one. What was measured at this step or later is forgotten: a run that went on from an earlier checkpoint
        measures it again."""
        earlier = {old: entry for old, entry in self._by_step.items() if old < step}
        metrics = {name: _none_if_nan(value) for name, value in ap_metrics(found).items()}
        entry = {"metrics": metrics, "per_category": _per_category(found)}
        self._by_step = {**earlier, step: entry}
        self._store.write_bytes(FILE, json.dumps(self._by_step, indent=1).encode())

    def best(self) -> dict[str, float]:
        """The largest value so far of each of `ap_metrics`, as best/... in the place of val/...; none that is nan."""
        best: dict[str, float] = {}
        for entry in self._by_step.values():
            for name, value in entry["metrics"].items():
                key = name.replace("val/", "best/")
                if value is not None:
                    best[key] = max(value, best.get(key, value))
        return best

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
        name: {kind: _none_if_nan(numbers[name]) for kind, numbers in kinds.items() if name in numbers}
        for name in names
    }


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
