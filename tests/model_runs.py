"""Runs in MLflow as a training leaves them, with a model and its evaluation, but without the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import tracking
from jobs.checkpoint import Checkpoints
from jobs.evaluations import Evaluations, ap_metrics
from jobs.tracking_log import RunLogger
from mrcnn.evaluation import KEYPOINT_NUMBERS, NUMBERS, Metrics

STEP = 4  # the last one


@dataclass(frozen=True)
class FakeTraining:
    """Makes runs of one model."""

    model: Path
    """Its folder"""
    root: Path
    """For the folders of the runs; on the model's file system"""

    def run(
        self,
        name: str,
        *,
        mask: float | None = None,
        box: float | None = None,
        keypoints: float | None = None,
        digest: str = "d1",
        tags: dict[str, str] | None = None,
    ) -> str:
        """A finished run, evaluated at its last step if there is a number. Returns its id."""
        folder = self.root / name
        self.link_model(folder / "model")
        found = metrics_of(mask=mask, box=box, keypoints=keypoints)
        logged: dict[str, float] = {}
        if found is not None:
            Evaluations(str(folder)).add(STEP, found, newest=STEP)
            logged = ap_metrics(found)
        handle = tracking.create_run(
            experiment="shapes",
            name=name,
            params={"steps": STEP, "val_data": "s3://bucket/val"},
            tags={
                tracking.MODEL_URI_TAG: str(folder / "model"),
                tracking.VAL_DIGEST_TAG: digest,
                "mrcnn.torch": "2",
                **(tags or {}),
            },
        )
        finish_run(handle, folder, logged)
        return handle.run_id

    def best(self, name: str, *, mask: float, digest: str, step: int = 2) -> Path:
        """Give a run a best checkpoint of an earlier step. Returns its folder."""
        found, checkpoints = metrics_of(mask=mask), Checkpoints(str(self.root / name))
        assert found is not None
        folder = Path(checkpoints.uri(step))
        self.link_model(folder)
        content: dict[str, Any] = {"step": step, "metrics": ap_metrics(found), **found.to_dict()}
        checkpoints.write_evaluation(step, content | {"data": "s3://bucket/val", "data_digest": digest})
        run_id = tracking.find_run(name).info.run_id
        tracking.client().set_tag(run_id, tracking.BEST_TAG, str(folder))
        return folder

    def link_model(self, folder: Path) -> None:
        """The model's files in another folder, without another 45 MB."""
        folder.mkdir(parents=True)
        for file in self.model.iterdir():
            (folder / file.name).hardlink_to(file)


def metrics_of(
    *, mask: float | None = None, box: float | None = None, keypoints: float | None = None
) -> Metrics | None:
    """Every number of a kind is the same; boxes are 0.1 better than masks where nothing else is said."""
    if mask is None and box is None and keypoints is None:
        return None
    box = (mask or keypoints or 0.0) + 0.1 if box is None else box
    return Metrics(
        box=dict.fromkeys(NUMBERS, box),
        mask={} if mask is None else dict.fromkeys(NUMBERS, mask),
        box_per_category={"1": box, "2": box},
        mask_per_category={} if mask is None else {"1": mask - 0.05, "2": mask + 0.05},
        images=4,
        keypoints={} if keypoints is None else dict.fromkeys(KEYPOINT_NUMBERS, keypoints),
        keypoints_per_category={} if keypoints is None else {"1": keypoints},
    )


def finish_run(handle: tracking.RunHandle, folder: Path, metrics: dict[str, float]) -> None:
    logger = RunLogger(handle, str(folder))
    logger.metrics({"train/loss": 1.0, **metrics}, step=STEP)
    logger.finish()
    logger.close()
    assert logger.unsent() is None
