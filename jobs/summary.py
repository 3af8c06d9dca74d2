"""What `mrcnn train` prints at the end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jobs.checkpoint import Best, Checkpoints
from jobs.evaluations import Evaluations
from jobs.tracking_log import Unsent
from jobs.worker import Outcome, WorkerSettings
from pipelines.patience import patiently


@dataclass(frozen=True)
class TrainSummary:
    """What came of a training."""

    run_id: str
    model_uri: str
    outcome: Outcome
    seconds: float
    unsent: Unsent | None = None
    """What MLflow has not got"""
    best: Best | None = None
    best_uri: str | None = None
    """Folder of the best checkpoint, which is a model's, too"""
    unevaluated: dict[int, str] = field(default_factory=dict)
    """Why which steps could not be evaluated"""

    def __str__(self) -> str:
        ap = "  ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in self.outcome.metrics.items())
        lines = [
            f"trained to step {self.outcome.step} in {self.seconds:.0f} s, "
            f"{self.outcome.images_per_second:.1f} images/s",
            ap or "the last step could not be evaluated",
            f"model       {self.model_uri}",
        ]
        if self.best and self.best.step != self.outcome.step:
            measure = self.best.measure.removeprefix("val/")
            lines.append(f"best        {self.best_uri} ({measure} {self.best.value:.3f} at step {self.best.step})")
        lines.append(f"MLflow run  {self.run_id}")
        lines += [f"warning: step {step} is not evaluated: {reason}" for step, reason in self.unevaluated.items()]
        return "\n".join(lines + [str(self.unsent)] * (self.unsent is not None))


def summary_of(settings: WorkerSettings, outcome: Outcome, *, seconds: float, unsent: Unsent | None) -> TrainSummary:
    """Of a training whose last phase had these settings and this outcome."""
    phase, checkpoints = settings.phase, Checkpoints(settings.phase.uri)
    evaluations, best = Evaluations(phase.run_uri), patiently(checkpoints.best)
    return TrainSummary(
        settings.run.run_id,
        phase.model_uri,
        replace(outcome, metrics=evaluations.metrics(outcome.step)),
        seconds,
        unsent,
        best=best,
        best_uri=checkpoints.store.uri_of(best.checkpoint) if best else None,
        unevaluated=evaluations.failures(),
    )
