"""What the model of a training was measured with, as the run's folder tells it.

Not what MLflow has: its newest val/... are an earlier step's where the evaluation of the last one has failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.checkpoint import EVALUATION_FILE
from jobs.evaluations import FILE as EVALUATIONS_FILE
from jobs.tracking import MEASURES
from pipelines.storage import open_store

PerCategory = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a model."""

    step: int
    """Of the run"""
    metrics: dict[str, float]
    """val/... as they are logged; only those that there was something to measure on"""
    per_category: PerCategory
    """By a category's name: mask_AP, keypoint_AP, box_AP, as far as they were measured"""
    data_digest: str
    """Of the manifest of the validation shards"""
    data: str | None = None
    """URI of these shards"""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def of_last_step(model_uri: str, *, data_digest: str, data: str | None) -> Evaluated:
    """Of the model that a run has ended with, in `<run>/model`; what it was measured on is the run's.

    Raises ValueError, that says what to do, where the last step was not evaluated.
    """
    run_uri = model_uri.rstrip("/").rpartition("/")[0]
    by_step = _read(run_uri, EVALUATIONS_FILE)
    if not by_step:
        raise ValueError(f"{run_uri} has no evaluation")
    step = max(map(int, by_step))
    content = by_step[str(step)]
    if "failure" in content:
        raise ValueError(
            f"step {step}, its last one, could not be evaluated ({content['failure']}): take its best checkpoint, "
            "--best, or resume the training, which tries again"
        )
    return _checked(
        Evaluated(step, _numbers(content["metrics"]), content["per_category"], data_digest, data), f"step {step}"
    )


def of_checkpoint(uri: str) -> Evaluated:
    """Of a checkpoint. Raises ValueError where it has no evaluation."""
    content = _read(uri, EVALUATION_FILE)
    if "metrics" not in content:
        raise ValueError(f"{uri} has no evaluation ({content.get('failure', f'no {EVALUATION_FILE}')})")
    found = Evaluated(
        content["step"], _numbers(content["metrics"]), _per_category(content), content["data_digest"], content["data"]
    )
    return _checked(found, uri)


def _read(folder: str, name: str) -> dict[str, Any]:
    store = open_store(folder)
    return json.loads(store.read_bytes(name)) if store.exists(name) else {}


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _per_category(content: Mapping[str, Any]) -> PerCategory:
    """From the groups of `Metrics.to_dict`."""
    kinds = {"mask_AP": "mask", "keypoint_AP": "keypoints", "box_AP": "box"}
    groups = {measure: content.get(f"{kind}_per_category") or {} for measure, kind in kinds.items()}
    names = dict.fromkeys(name for numbers in groups.values() for name in numbers)
    return {name: {m: numbers[name] for m, numbers in groups.items() if name in numbers} for name in names}


def _checked(found: Evaluated, what: str) -> Evaluated:
    if not set(MEASURES) & found.metrics.keys():
        raise ValueError(f"{what} was evaluated, but on data with nothing to find: evaluate on images with objects")
    if not found.data_digest:
        raise ValueError(f"it is not known what {what} was evaluated on: train again, with this version")
    return found
