"""What a training makes of processes that die, memory that is short, and losses that are not finite."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from models import SMALL
from ray.util.state import list_actors
from safetensors.numpy import load_file

from jobs import tracking
from jobs.checkpoint import Checkpoints
from jobs.config import OptimizerConfig, TrainConfig, TrainJob
from jobs.train import train

pytestmark = pytest.mark.usefixtures("mlflow_store")

CONFIG = TrainConfig(
    model=SMALL,
    optimizer=OptimizerConfig(base_lr=0.02, warmup_steps=4),
    steps=16,
    global_batch=4,
    log_every=4,
    evaluate_every=100,
    checkpoint_every=4,
    keep_checkpoints=9,
    pictures=0,
)


@pytest.fixture
def job(toy_shards: str, tmp_path: Path) -> TrainJob:
    return TrainJob(data=toy_shards, val_data=toy_shards, storage=str(tmp_path), run="disturbed", workers="2")


def weights(run: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(run / "model" / "model.safetensors").items()}


@contextmanager
def killed_once(run: Path, *, after_step: int) -> Iterator[list[int]]:
    """Kill -9 one of the training's workers as soon as there is a checkpoint of that step. Lists who was killed."""
    killed: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02) and not killed:
            if after_step in Checkpoints(str(run)).steps():
                workers = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
                os.kill(workers[-1].pid, signal.SIGKILL)
                killed.append(workers[-1].pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def test_a_killed_worker_leaves_no_trace_in_the_weights(job: TrainJob, tmp_path: Path) -> None:
    with killed_once(tmp_path / "disturbed", after_step=4) as killed:
        summary = train(job, CONFIG)
    assert len(killed) == 1
    assert summary.outcome.step == 16
    undisturbed = replace(job, run="undisturbed")
    train(undisturbed, CONFIG)
    assert weights(tmp_path / "disturbed") == weights(tmp_path / "undisturbed")
    run = tracking.find_run("disturbed")  # there is one only
    assert run.info.status == "FINISHED"
    steps = [each.step for each in tracking.client().get_metric_history(run.info.run_id, "train/loss")]
    assert set(steps) == {4, 8, 12, 16}


def test_memory_that_is_short_is_told_at_once(job: TrainJob, tmp_path: Path) -> None:
    """Mask heads of this width need more bytes than there are: no second try."""
    config = replace(CONFIG, model=replace(SMALL, mask=replace(SMALL.mask, pool=4000, norm="none")))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"memory is too short for the batch of step 1: images .* pixels"):
        train(replace(job, run="large", workers="1"), config)
    assert tracking.find_run("large").info.status == "FAILED"
    assert Checkpoints(str(tmp_path / "large")).steps() == []
    assert time.monotonic() - started < 120
