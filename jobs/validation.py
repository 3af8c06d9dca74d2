"""The evaluation of a checkpoint, within training or beside it: the same numbers, and the same places where they go.

checkpoints/step-.../evaluation.json   all that was found of this checkpoint; written last, and whatever is killed
                                       before has the evaluation repeated
checkpoints/best.json                  which one is the best
evaluations.json                       of all steps: what is logged, best/... and the table by category
MLflow                                 val/..., best/..., per_category_AP.json, pictures
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.checkpoint import Checkpoints
from jobs.evaluations import Evaluations, ap_metrics, none_if_nan
from jobs.schedule import PhaseOfRun
from jobs.tracking import BEST_TAG, UNEVALUATED_TAG
from jobs.tracking_log import RunLogger
from mrcnn.evaluation import Metrics
from mrcnn.model import MaskRCNN
from mrcnn.visualize import draw_detections
from pipelines.dataset import ShardDataset
from pipelines.patience import patiently


@dataclass(frozen=True)
class Validation:
    """What the checkpoints of a phase are evaluated on, and how much of it is drawn."""

    phase: PhaseOfRun
    val_data: str
    """URI of shards"""
    pictures: int

    @property
    def checkpoints(self) -> Checkpoints:
        """Those of the phase; their steps are the phase's, not the run's."""
        return Checkpoints(self.phase.uri)

    def record(self, step: int, found: Metrics, model: MaskRCNN, logger: RunLogger) -> dict[str, float]:
        """Keep and log what was found of the checkpoint of a step, and what its model sees. Returns what is logged of
        it; all of it outlives the process from then on."""
        dataset, step_of_run = ShardDataset(self.val_data), self.phase.first_step + step
        metrics, evaluations = ap_metrics(found), Evaluations(self.phase.run_uri)
        had_failures = bool(evaluations.failures())
        evaluations.add(step_of_run, found, newest=self._newest)
        logger.metrics({**metrics, **evaluations.best()}, step_of_run)
        logger.table(evaluations.table(), "per_category_AP.json")
        self._name_best(evaluations, logger)
        if had_failures:
            logger.tags({UNEVALUATED_TAG: _failures(evaluations)})
        for i in range(min(self.pictures, len(dataset))):
            row = dataset.read(i)
            (seen,) = model.predict([row.image])
            logger.image(draw_detections(row.image, seen, dataset.categories), f"val/image_{i}", step_of_run)
        patiently(logger.keep)
        content = {
            "step": step_of_run,
            "metrics": {name: none_if_nan(value) for name, value in metrics.items()},
            **found.to_dict(),
            "data": dataset.uri,
            "data_digest": dataset.manifest.digest,
        }
        self.checkpoints.write_evaluation(step, content)
        return metrics

    def record_failure(self, step: int, reason: str, logger: RunLogger) -> None:
        """Say that the checkpoint of a step could not be evaluated, so that nobody waits for it."""
        step_of_run, evaluations = self.phase.first_step + step, Evaluations(self.phase.run_uri)
        evaluations.add_failure(step_of_run, reason, newest=self._newest)
        logger.tags({UNEVALUATED_TAG: _failures(evaluations)})
        patiently(logger.keep)
        content: dict[str, Any] = {"step": step_of_run, "failure": reason}
        self.checkpoints.write_evaluation(step, content)

    def retry_failures(self) -> None:
        """Evaluations that have failed are due again, where their checkpoints are still there."""
        for step_of_run in Evaluations(self.phase.run_uri).failures():
            self.checkpoints.forget_evaluation(step_of_run - self.phase.first_step)

    @property
    def _newest(self) -> int:
        return self.phase.first_step + max(patiently(self.checkpoints.steps), default=0)

    def _name_best(self, evaluations: Evaluations, logger: RunLogger) -> None:
        found = evaluations.best_step()
        if found is None:
            return
        step_of_run, measure, value = found
        step = step_of_run - self.phase.first_step
        self.checkpoints.name_best(step, step_of_run=step_of_run, measure=measure, value=value)
        logger.tags({BEST_TAG: self.checkpoints.uri(step)})


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """One line that tells what was found."""
    return f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _failures(evaluations: Evaluations) -> str:
    return "; ".join(f"step {step}: {reason}" for step, reason in evaluations.failures().items()) or "none"
