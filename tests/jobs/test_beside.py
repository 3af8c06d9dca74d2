"""Evaluation beside training, on real processes: one training worker, and one Ray task on the other CPU."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import psutil
import pytest
from models import SMALL

from jobs import tracking
from jobs.beside import evaluates_beside, evaluating_beside
from jobs.checkpoint import Checkpoints
from jobs.config import OptimizerConfig, TrainConfig, TrainJob
from jobs.evaluations import Evaluations
from jobs.orders import StopRequest
from jobs.registry import resolve_model
from jobs.schedule import phases_of_run
from jobs.summary import TrainSummary
from jobs.tracking import RunHandle
from jobs.train import train
from jobs.worker import WorkerSettings
from pipelines.storage import Store, open_store

pytestmark = [pytest.mark.drill, pytest.mark.usefixtures("mlflow_store")]

CONFIG = TrainConfig(
    model=replace(SMALL, num_classes=4, backbone=replace(SMALL.backbone, norm="bn")),
    optimizer=OptimizerConfig(base_lr=0.08, warmup_steps=4, decay_at=(1.0,)),
    steps=32,
    global_batch=4,
    log_every=1,
    evaluate_every=16,
    checkpoint_every=10,
    keep_checkpoints=1,
    pictures=1,
)
LAST = 32
EVALUATED = [16, LAST]


@pytest.fixture(scope="module")
def job(toy_shards: str, s3: str) -> TrainJob:
    return TrainJob(data=toy_shards, val_data=toy_shards, storage=f"{s3}/beside", run="beside")


@pytest.fixture(scope="module")
def summary(job: TrainJob) -> TrainSummary:
    return train(job, CONFIG)


@pytest.fixture
def settings(summary: TrainSummary, job: TrainJob) -> WorkerSettings:
    """Of the run that is trained."""
    handle = RunHandle(summary.run_id, tracking.tracking_uri())
    (phase,) = phases_of_run(CONFIG, f"{job.storage}/{job.run}")
    request = StopRequest(summary.run_id)
    return WorkerSettings(CONFIG, job.data, job.val_data, handle, None, phase, request, evaluate_beside=True)


@pytest.fixture
def evaluation(settings: WorkerSettings) -> Iterator[bytes]:
    """What was found of the last checkpoint, which is due again; at the end it is there again."""
    store = checkpoint(settings)
    before = store.read_bytes("evaluation.json")
    settings.validation.checkpoints.forget_evaluation(LAST)
    yield before
    store.write_bytes("evaluation.json", before)


def checkpoint(settings: WorkerSettings, step: int = LAST) -> Store:
    return open_store(settings.validation.checkpoints.uri(step))


def evaluate(settings: WorkerSettings) -> None:
    """As a driver whose training has nothing left to train."""
    with evaluating_beside(settings, workers=1, use_gpu=False):
        pass


def test_the_numbers_are_where_those_of_an_evaluation_within_are(summary: TrainSummary) -> None:
    store = tracking.client()
    run = tracking.find_run("beside")
    for key in ("val/mask_AP", "best/mask_AP", "val/box_AP50"):
        assert [each.step for each in store.get_metric_history(run.info.run_id, key)] == EVALUATED
    assert summary.outcome.metrics["val/mask_AP50"] > 0, "train longer: zeros are equal to zeros"
    assert summary.outcome.metrics["val/mask_AP"] == run.data.metrics["val/mask_AP"]
    table = json.loads(tracking.read_artifact(f"runs:/{run.info.run_id}/per_category_AP.json"))
    assert sorted({row[0] for row in table["data"]}) == EVALUATED
    pictures = [each.path for each in store.list_artifacts(run.info.run_id, "images") if each.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == EVALUATED


def test_training_does_not_wait(summary: TrainSummary) -> None:
    """It goes on between the checkpoint and what is found of it."""
    store = tracking.client()
    losses = {each.step: each.timestamp for each in store.get_metric_history(summary.run_id, "train/loss")}
    (found, *_) = store.get_metric_history(summary.run_id, "val/mask_AP")
    assert found.step == 16
    assert found.timestamp > losses[18]


def test_the_last_and_the_best_stay(summary: TrainSummary, settings: WorkerSettings) -> None:
    checkpoints, evaluations = settings.validation.checkpoints, Evaluations(settings.phase.run_uri)
    values = {step: evaluations.metrics(step)["val/mask_AP"] for step in EVALUATED}
    best = max(values, key=values.__getitem__)
    assert checkpoints.steps() == sorted({best, LAST})
    assert summary.best is not None
    assert (summary.best.step, summary.best.value) == (best, values[best])
    run = tracking.find_run("beside")
    assert run.data.tags[tracking.BEST_TAG] == summary.best_uri == checkpoints.uri(best)
    assert resolve_model(checkpoints.uri(best)).files.keys() == {"model.safetensors", "config.json"}
    assert resolve_model(summary.model_uri).sha256 == resolve_model(checkpoints.uri(LAST)).sha256
    earlier = replace(summary, best=replace(summary.best, step=16, value=0.5), best_uri="s3://b/step-16")
    assert "\nbest        s3://b/step-16 (mask_AP 0.500 at step 16)\n" in str(earlier)


def test_an_evaluation_within_finds_the_same_bits(
    evaluation: bytes, settings: WorkerSettings, job: TrainJob, summary: TrainSummary
) -> None:
    """It is one that was killed: the checkpoint was saved, and the last one."""
    again = train(replace(job, resume=True, evaluate_beside="no"), CONFIG)
    assert checkpoint(settings).read_bytes("evaluation.json") == evaluation
    assert again.outcome.metrics == summary.outcome.metrics


def test_one_that_is_killed_is_repeated(
    evaluation: bytes, settings: WorkerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    with killed_once("ray::evaluate_checkpoint") as killed:
        evaluate(settings)
    assert len(killed) == 1
    assert checkpoint(settings).read_bytes("evaluation.json") == evaluation
    out = capsys.readouterr().out
    assert f"warning: evaluating step {LAST} failed, try 1 of 3: The worker died unexpectedly" in out
    assert f"step {LAST}: val/mask_AP " in out


def test_one_that_fails_is_told_and_tried_again_on_resuming(
    evaluation: bytes, settings: WorkerSettings, summary: TrainSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    store, validation = checkpoint(settings), settings.validation
    weights = store.read_bytes("model.safetensors")
    store.write_bytes("model.safetensors", weights[:-1] + b"!")
    evaluate(settings)
    assert f"warning: evaluating step {LAST} failed, try 3 of 3: s3://" in capsys.readouterr().out
    assert validation.checkpoints.due() == []
    reason = Evaluations(settings.phase.run_uri).failures()[LAST]
    assert "model.safetensors is not what was written" in reason
    assert f"step {LAST}: {reason}" == tracking.find_run("beside").data.tags[tracking.UNEVALUATED_TAG]
    assert f"\nwarning: step {LAST} is not evaluated: s3://" in str(replace(summary, unevaluated={LAST: reason}))

    store.write_bytes("model.safetensors", weights)
    validation.retry_failures()
    assert validation.checkpoints.due() == [LAST]
    evaluate(settings)
    assert store.read_bytes("evaluation.json") == evaluation
    assert tracking.find_run("beside").data.tags[tracking.UNEVALUATED_TAG] == "none"


def test_a_training_that_fails_waits_for_no_evaluation(evaluation: bytes, settings: WorkerSettings) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="spoilt"):
        fail_during_an_evaluation(settings)
    assert settings.validation.checkpoints.due() == [LAST]
    assert not {thread.name for thread in threading.enumerate()} - before


def test_a_full_cluster_evaluates_within(job: TrainJob, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluates_beside(job, use_gpu=False)
    assert not evaluates_beside(replace(job, evaluate_beside="no"), use_gpu=False)
    assert "evaluating within" not in capsys.readouterr().out  # lines of workers may come late
    assert not evaluates_beside(replace(job, workers="2"), use_gpu=False)
    line = "evaluating within training: the cluster has no more CPUs than training may take (2)\n"
    assert line in capsys.readouterr().out
    assert not evaluates_beside(replace(job, workers="1:2"), use_gpu=False)


def test_a_phase_without_a_whole_detector_is_not_evaluated(settings: WorkerSettings) -> None:
    first, *_ = phases_of_run(replace(CONFIG, rpn="separate"), settings.phase.run_uri)
    with evaluating_beside(replace(settings, phase=first), workers=1, use_gpu=False):
        assert not any("evaluating beside" in thread.name for thread in threading.enumerate())
    assert Checkpoints(first.uri).steps() == []


def fail_during_an_evaluation(settings: WorkerSettings) -> None:
    """The evaluation is held back until it has been told to end: else it may be done before that."""
    with ExitStack() as stack, evaluating_beside(settings, workers=1, use_gpu=False):
        process = wait_for_process("ray::evaluate_checkpoint")
        process.suspend()
        timer = threading.Timer(5.0, process.resume)
        timer.start()
        stack.callback(timer.join)
        raise RuntimeError("spoilt")


def wait_for_process(title: str) -> psutil.Process:
    """A process of this test's Ray that does what its title says."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    return process
        time.sleep(0.02)
    raise AssertionError(f"no process {title}")


@contextmanager
def killed_once(title: str) -> Iterator[list[int]]:
    """Kill -9 a process as soon as it is there. Lists who was killed."""
    killed: list[int] = []

    def watch() -> None:
        process = wait_for_process(title)
        process.kill()
        killed.append(process.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        thread.join()
