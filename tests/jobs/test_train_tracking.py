"""A training whose MLflow goes away for good, and whose worker is killed on the way: one run, and nothing is lost."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mlflow_server import Gate
from models import SMALL

from jobs import tracking
from jobs.checkpoint import Checkpoints
from jobs.cli import main
from jobs.config import OptimizerConfig, TrainConfig, TrainJob
from jobs.config_file import read_config
from jobs.train import train
from pipelines.dataset import ShardDataset

pytestmark = pytest.mark.drill

CONFIG = TrainConfig(
    model=SMALL,
    optimizer=OptimizerConfig(base_lr=0.02, warmup_steps=4, decay_at=(1.0,)),
    steps=20,
    global_batch=2,
    log_every=2,
    evaluate_every=8,
    checkpoint_every=4,
    pictures=1,
)


def kill_the_worker() -> None:
    """kill -9 the training worker of this test's Ray."""
    for process in psutil.Process().children(recursive=True):
        if "TrainWorker" in " ".join(process.cmdline()):
            process.kill()
            return
    raise AssertionError("no training worker is running")


class Saboteur(threading.Thread):
    """Shuts MLflow off after the first checkpoint, and kills the worker once it has evaluated and gone on."""

    def __init__(self, gate: Gate, run_uri: str) -> None:
        super().__init__(daemon=True)
        self.gate, self.run_uri = gate, run_uri
        self.killed_at = 0

    def run(self) -> None:
        self._wait_for(4)
        self.gate.drop()
        self._wait_for(12)
        self.killed_at = Checkpoints(self.run_uri).steps()[-1]
        kill_the_worker()

    def _wait_for(self, step: int) -> None:
        while max(Checkpoints(self.run_uri).steps(), default=0) < step:
            time.sleep(0.02)


def test_a_killed_worker_without_mlflow_loses_nothing(
    toy_shards: str, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("jobs.tracking_log.PATIENCE", 1.0)
    uri = str(tmp_path / "cut")
    saboteur = Saboteur(gate, uri)
    saboteur.start()
    job = TrainJob(data=toy_shards, val_data=toy_shards, storage=str(tmp_path), run="cut", experiment="cut off")
    summary = train(job, CONFIG)
    assert 12 <= saboteur.killed_at < 20, "it was too late: train longer"
    assert summary.outcome.step == 20
    assert summary.unsent is not None
    assert f"mrcnn replay-mlflow {uri}" in str(summary)

    gate.open()
    monkeypatch.setattr("jobs.tracking_log.PATIENCE", 60.0)
    capsys.readouterr()
    assert main(["replay-mlflow", uri]) == 0
    assert f"written to MLflow run {summary.run_id}: " in capsys.readouterr().out  # lines of workers may come late
    check_the_run(summary.run_id, saboteur.killed_at, ShardDataset(toy_shards).manifest.digest)
    assert read_config(f"runs:/{summary.run_id}/config.json") == replace(CONFIG, model=replace(SMALL, num_classes=4))


def check_the_run(run_id: str, killed_at: int, digest: str) -> None:
    store = tracking.client()
    run = tracking.find_run("cut")  # the only one of its name
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    losses = [metric.step for metric in store.get_metric_history(run_id, "train/loss")]
    assert sorted(set(losses)) == list(range(2, 21, 2))
    assert sorted(step for step in losses if step <= killed_at) == list(range(2, killed_at + 1, 2))
    for key in ("val/mask_AP", "best/mask_AP"):
        assert sorted({metric.step for metric in store.get_metric_history(run_id, key)}) == [8, 16, 20]
    best = run.data.metrics["best/box_AP"]
    assert best == max(metric.value for metric in store.get_metric_history(run_id, "val/box_AP"))
    for key in ("train/learning_rate", "perf/step_seconds", "perf/images_per_second", "perf/data_wait_share"):
        assert run.data.metrics[key] > 0
    pictures = [each.path for each in store.list_artifacts(run_id, "images") if each.path.endswith(".png")]
    assert sorted({int(path.split("+")[2]) for path in pictures}) == [8, 16, 20]
    assert all(path.startswith("images/val~image_0+step+") for path in pictures)
    table = json.loads(tracking.read_artifact(f"runs:/{run_id}/per_category_AP.json"))
    assert table["columns"] == ["step", "category", "mask_AP", "box_AP"]
    assert {row[0] for row in table["data"]} == {8, 16, 20}
    (data,) = run.inputs.dataset_inputs
    assert json.loads(data.dataset.profile)["manifest_digest"] == digest
