"""Trainings that are told to end, and one whose node is taken away: they save first, and the weights show no trace."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_process import Commands, Running, commands
from models import SMALL
from ray_nodes import Nodes, ray_nodes
from safetensors.numpy import load_file
from seen_images import SAVE_SECONDS, Seen, environment

from jobs import tracking
from jobs.checkpoint import Checkpoints
from jobs.config import OptimizerConfig, TrainConfig, TrainJob
from jobs.stopping import Signals, Stopped
from jobs.train import train

pytestmark = pytest.mark.usefixtures("mlflow_store")

STEPS = 24  # workers look for orders after step 1, 2, 4, 8 at the latest

CONFIG = TrainConfig(
    model=SMALL,
    optimizer=OptimizerConfig(base_lr=0.02, warmup_steps=4),
    steps=STEPS,
    global_batch=2,
    log_every=2,
    evaluate_every=1000,
    checkpoint_every=1000,
    keep_checkpoints=9,
    pictures=0,
)


@pytest.fixture(scope="module")
def job(toy_shards: str, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    storage = str(tmp_path_factory.mktemp("runs"))
    return TrainJob(data=toy_shards, val_data=toy_shards, storage=storage, run="undisturbed", workers="2")


@pytest.fixture(scope="module")
def undisturbed(job: TrainJob, mlflow_store: None) -> dict[str, bytes]:
    """Weights at the end of a run that nobody disturbs."""
    train(job, CONFIG)
    return weights(job, "undisturbed")


@pytest.fixture
def seen(tmp_path: Path) -> Seen:
    (tmp_path / "seen").mkdir()
    return Seen(tmp_path / "seen")


@pytest.fixture
def mrcnn(tmp_path: Path, seen: Seen) -> Iterator[Commands]:
    with commands(tmp_path, {**os.environ, **environment(seen.folder), "PYTHONUNBUFFERED": "1"}) as mrcnn:
        yield mrcnn


def weights(job: TrainJob, run: str) -> dict[str, bytes]:
    file = Path(job.storage, run, "model/model.safetensors")
    return {name: value.tobytes() for name, value in load_file(file).items()}


def start(mrcnn: Commands, job: TrainJob, run: str, *more: str, **environment: str) -> Running:
    return mrcnn.start(
        "train", "--config", f"{job.storage}/undisturbed/run.json", "--data", job.data, "--val-data", job.val_data,
        "--storage", job.storage, "--run", run, "--workers", "2", *more, **environment,
    )  # fmt: skip


def wait_for(running: Running, condition: Callable[[], object], seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert running.process.exitcode is None, (running.out, running.err)
        assert time.monotonic() < until, (running.out, running.err)
        time.sleep(0.05)


def step_of(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])


@pytest.mark.drill
def test_told_to_end_it_saves_and_goes_on(
    mrcnn: Commands, seen: Seen, job: TrainJob, undisturbed: dict[str, bytes]
) -> None:
    """First one worker of two gets SIGTERM, then the driver."""
    before_5, before_11 = (seen.hold("told", step) for step in (5, 11))
    running = start(mrcnn, job, "told", "--cpus", "2", **{SAVE_SECONDS: "4"})  # the other rank is done long before
    workers = seen.wait_for("told", lambda taken: taken.step == 5, count=2, still=running.process.is_alive)
    os.kill(workers[1].pid, signal.SIGTERM)
    before_5.unlink()
    seen.wait_for("told", lambda taken: taken.step == 11, count=2, still=running.process.is_alive)
    restarted = step_of(r"checkpoints at step (\d+)", running.out + running.err)
    os.kill(running.process.pid or 0, signal.SIGTERM)
    wait_for(running, lambda: "SIGTERM: saving a checkpoint" in running.out)
    time.sleep(0.5)  # the driver's word to them takes a moment
    before_11.unlink()
    done = running.wait(60)
    assert done.code == 143, done
    stopped = step_of(r"mrcnn: stopped by SIGTERM; the newest checkpoint .* is of step (\d+): .* --resume", done.err)
    assert 5 <= restarted < 11 <= stopped < STEPS
    assert Checkpoints(f"{job.storage}/told").steps() == [restarted, stopped]
    assert tracking.find_run("told").info.status == "KILLED"

    done = start(mrcnn, job, "told", "--cpus", "2", "--resume").wait()
    assert done.code == 0, done
    assert f"checkpoints at step {stopped}" in done.out
    assert weights(job, "told") == undisturbed
    run = tracking.find_run("told")
    assert run.info.status == "FINISHED"
    steps = [each.step for each in tracking.client().get_metric_history(run.info.run_id, "train/loss")]
    logged = set(range(2, STEPS + 1, 2))
    assert logged <= set(steps) <= logged | {restarted, stopped}


@pytest.fixture
def nodes(seen: Seen) -> Iterator[Nodes]:
    with ray_nodes([{}, {}, {}], environment(seen.folder)) as nodes:
        yield nodes


@pytest.mark.drill
def test_a_node_that_will_be_taken_away(
    nodes: Nodes, mrcnn: Commands, seen: Seen, job: TrainJob, undisturbed: dict[str, bytes]
) -> None:
    """Its workers take a step now and then, so that they are at work when they are told, and at the end of its time."""
    holds = [seen.hold("moved", step) for step in range(5, STEPS + 1)]
    address = {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}", **nodes.client_environment}
    running = start(mrcnn, job, "moved", **address)
    seen.wait_for("moved", lambda taken: taken.step == 5, count=2, still=running.process.is_alive)
    actors = training_actors(nodes)
    node = list(actors.values())[-1]
    drain(nodes, node, seconds=12)
    checkpoints = Checkpoints(f"{job.storage}/moved")
    told = time.monotonic()
    while not checkpoints.steps():
        assert time.monotonic() - told < 12
        time.sleep(0.4)
        holds.pop(0).unlink()
    wait_for(running, lambda: "going on from" in running.out)
    for hold in holds:
        hold.unlink()
    done = running.wait()
    assert done.code == 0, done
    restarted = step_of(r"checkpoints at step (\d+)", running.out)
    assert restarted in checkpoints.steps()
    assert 5 <= restarted < STEPS
    assert weights(job, "moved") == undisturbed
    assert node not in [on for actor, on in training_actors(nodes).items() if actor not in actors]


def training_actors(nodes: Nodes) -> dict[str, str]:
    """Node by actor, of living and dead ones."""
    answer = nodes.ask("/api/v0/actors?limit=100&detail=1")
    actors = answer["data"]["result"]["result"]
    return {actor["actor_id"]: actor["node_id"] for actor in actors if actor["class_name"] == "RayTrainWorker"}


def drain(nodes: Nodes, node: str, *, seconds: int) -> None:
    program = str(Path(sys.executable).with_name("ray"))
    subprocess.run(
        [program, "drain-node", f"--address=127.0.0.1:{nodes.port}", f"--node-id={node}",
         "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={seconds}"],
        env=nodes.environment, check=True, capture_output=True,
    )  # fmt: skip


def test_a_second_signal_ends_at_once() -> None:
    asked: list[str] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not asked:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped, Signals() as signals:
        signals.wait_for(work, lambda: asked.append("to stop"))
    assert asked == ["to stop"]
    assert stopped.value.exit_code == 143
    assert time.monotonic() - started < 10


def test_signals_outside_of_the_work_end_it_and_are_as_before_after_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGINT"), Signals():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_that_do_not_end_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.stopping.DRIVER_SECONDS", 0.1)

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(Stopped, match="the workers have not ended in"), Signals() as signals:
        signals.wait_for(work, lambda: None)
