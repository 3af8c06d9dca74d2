"""What a training makes of workers, nodes and drivers that are killed, and of a storage that is away or full.

On real processes: a head without CPUs and nodes with one each. However a training is disturbed, its weights have the
same bits in the end, and each epoch has had each image once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from cli_process import Commands, Done, Running, commands
from faulty_proxy import Fault, faulty_proxy
from made_shards import instance, make_shards, row
from mlflow.entities import Run
from models import SMALL
from ray_nodes import Nodes, ray_nodes
from safetensors.numpy import load
from seen_images import Seen, Taken, environment

from jobs import tracking
from jobs.config import OptimizerConfig, TrainConfig
from pipelines.storage import open_store

pytestmark = pytest.mark.drill

IMAGES = 16
AWAY_SECONDS = 10.0
SOON = 120.0  # seconds, on a machine that is busy with other tests
CONFIG = TrainConfig(
    model=SMALL,
    optimizer=OptimizerConfig(base_lr=0.02, warmup_steps=4),
    steps=8,
    global_batch=4,
    log_every=2,
    evaluate_every=100,
    checkpoint_every=2,
    keep_checkpoints=2,
    pictures=0,
)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@dataclass
class Cluster:
    """Nodes, and a client that trains on them."""

    nodes: Nodes
    mrcnn: Commands
    seen: Seen
    folder: Path

    def begin(self, run: str, *words: str, data: str = "data", storage: str | None = None, **variables: str) -> Running:
        paths = ("--data", str(self.folder / data), "--val-data", str(self.folder / "val"))
        paths += ("--storage", storage or str(self.folder / "runs"))
        config = ("--config", str(self.folder / "config.json"))
        return self.mrcnn.start("train", *config, *paths, "--run", run, "--workers", "2", *words, **variables)

    def until(self, running: Running, run: str, step: int) -> list[Taken]:
        """Both workers, once they are about to take a step."""
        return self.seen.wait_for(
            run, lambda taken: taken.step == step, count=2, still=lambda: running.process.is_alive()
        )

    def kill_node(self, address: str) -> None:
        """The raylet and all that it has started, at once."""
        process = self.nodes.processes[int(address.rpartition(".")[2]) - 1]
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            each.kill()

    def went_on_after(self, run: str, killed_at: float) -> float:
        """Seconds from a kill to the first step of those who went on."""
        return min(each.at for each in self.seen.taken(run) if each.began > killed_at) - killed_at


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("faults")
    seen = Seen(folder / "seen")
    seen.folder.mkdir()
    rows = [
        row(i, (96, 128), [instance((5 + 20 * n, 5, 35 + 20 * n, 45 + 3 * i)) for n in range(1 + i % 3)])
        for i in range(IMAGES)
    ]
    make_shards(folder / "data", rows)
    make_shards(folder / "val", rows[:2])
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    secrets = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with ray_nodes([{}, {}, {}], environment(seen.folder) | secrets) as nodes, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store["MLFLOW_TRACKING_URI"])
        client = {
            "PATH": nodes.environment["PATH"], "HOME": nodes.environment["HOME"], "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": f"127.0.0.1:{nodes.port}", **nodes.client_environment, **store, **secrets,
        }  # fmt: skip
        (folder / "client").mkdir()
        with commands(folder / "client", client) as mrcnn:
            yield Cluster(nodes, mrcnn, seen, folder)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, bytes]:
    """The weights of a training that nothing happens to."""
    done = cluster.begin("undisturbed").wait()
    assert done.code == 0, done
    check_images(cluster, "undisturbed")
    return weights(f"{cluster.folder}/runs/undisturbed")


def weights(run: str) -> dict[str, bytes]:
    content = open_store(f"{run}/model").read_bytes("model.safetensors")
    return {name: value.tobytes() for name, value in load(content).items()}


def check_images(cluster: Cluster, run: str, steps: int = CONFIG.steps) -> None:
    images = cluster.seen.images(run)
    assert len(images) == steps * CONFIG.global_batch
    epochs = [sorted(images[start : start + IMAGES]) for start in range(0, len(images), IMAGES)]
    assert all(epoch == list(range(IMAGES)) for epoch in epochs), epochs


def check(cluster: Cluster, run: str, done: Done, undisturbed: dict[str, bytes], storage: str | None = None) -> Run:
    """As if nothing had happened; and there is one MLflow run of the name."""
    assert done.code == 0, done
    check_images(cluster, run)
    assert weights(f"{storage or cluster.folder / 'runs'}/{run}") == undisturbed
    found = tracking.find_run(run)  # there is one only
    assert found.info.status == "FINISHED"
    return found


@contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """A file system of its own; only root may make one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no byte for others."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    assert shutil.disk_usage(folder).free == 0
    return ballast


def test_more_workers_than_the_cluster_ever_has(cluster: Cluster) -> None:
    until = time.monotonic() + 60
    while not cluster.nodes.is_known_as_fixed():
        assert time.monotonic() < until
        time.sleep(0.2)
    done = cluster.begin("many", "--workers", "9", "--global-batch", "16").wait()
    assert (done.code, "workers is 9, but the Ray cluster has 3 CPUs: ask for at most 3" in done.err) == (2, True), done


def test_a_killed_worker(cluster: Cluster, undisturbed: dict[str, bytes]) -> None:
    hold = cluster.seen.hold("worker", 4)
    running = cluster.begin("worker")
    workers = cluster.until(running, "worker", 4)
    killed_at = time.time()
    kill(workers[1].pid)
    hold.unlink()
    done = running.wait()
    print(f"went on {cluster.went_on_after('worker', killed_at):.1f} s after a worker was killed")
    run = check(cluster, "worker", done, undisturbed)
    assert "at step 2 with 2 workers" in done.out
    assert cluster.went_on_after("worker", killed_at) < SOON
    steps = [each.step for each in tracking.client().get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(set(steps)) == [2, 4, 6, 8]


def test_a_killed_driver(cluster: Cluster, undisturbed: dict[str, bytes]) -> None:
    hold = cluster.seen.hold("driver", 6)
    running = cluster.begin("driver")
    cluster.until(running, "driver", 6)
    running.process.kill()
    killed_at = time.time()
    assert tracking.find_run("driver").info.status == "RUNNING"
    resumed = cluster.begin("driver", "--resume")  # at once, while the old workers may still be there
    hold.unlink()
    done = resumed.wait()
    print(f"went on {cluster.went_on_after('driver', killed_at):.1f} s after the driver was killed")
    assert "at step 4 with 2 workers" in done.out
    check(cluster, "driver", done, undisturbed)


def test_a_store_that_is_away_while_a_checkpoint_is_written(
    cluster: Cluster, undisturbed: dict[str, bytes], s3: str
) -> None:
    """For ten seconds all requests are answered with 503, beginning with one that writes a file of a checkpoint."""
    away: list[float] = []

    def decide(method: str, path: str, count: int) -> Fault | None:
        if method == "PUT" and "/store/checkpoints/step-00000004/" in path and not away:
            away.append(time.monotonic())
        return "503" if away and time.monotonic() - away[0] < AWAY_SECONDS else None

    storage = f"{s3}/faults"
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], decide) as proxy:
        done = cluster.begin("store", storage=storage, AWS_ENDPOINT_URL=proxy.url).wait()
        assert proxy.made["503"] > 1
    assert "going on from" not in done.out  # nobody had to begin again
    check(cluster, "store", done, undisturbed, storage)


def test_a_disk_that_is_full(cluster: Cluster, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=400) as disk:
        hold = cluster.seen.hold("disk", 4)
        running = cluster.begin("disk", storage=str(disk))
        cluster.until(running, "disk", 4)
        ballast = fill(disk)
        hold.unlink()
        done = running.wait()
        assert done.code == 2, done
        advice = r"No space left on device\): make room, .* checkpoint in .* is of step 2: go on with --resume"
        assert re.search(advice, done.err), done
        assert tracking.find_run("disk").info.status == "FAILED"
        assert [path.name for path in (disk / "disk" / "checkpoints").iterdir()] == ["step-00000002"]
        assert not list(disk.rglob("*.part"))
        assert cluster.seen.attempts("disk") == 1

        ballast.unlink()
        done = cluster.begin("disk", "--resume", storage=str(disk)).wait()
        check(cluster, "disk", done, undisturbed, str(disk))


def test_a_shard_that_is_torn_ends_a_training_at_once(cluster: Cluster) -> None:
    shutil.copytree(cluster.folder / "data", cluster.folder / "torn")
    shard = sorted((cluster.folder / "torn").glob("*.arrow"))[-1]
    os.truncate(shard, shard.stat().st_size // 2)
    done = cluster.begin("torn", data="torn").wait()
    assert (done.code, shard.name in done.err) == (2, True), done
    assert cluster.seen.attempts("torn") == 1
    assert tracking.find_run("torn").info.status == "FAILED"


def test_memory_that_is_short_is_told_at_once(cluster: Cluster) -> None:
    """Mask heads of this width need more bytes than there are: no second try."""
    done = cluster.begin("large", "--workers", "1", "--model.mask.pool", "40000", "--model.mask.norm", "none").wait()
    assert (done.code, cluster.seen.attempts("large")) == (1, 1), done
    assert re.search(r"memory is too short for the batch of step 1: images .* pixels", done.err), done
    assert tracking.find_run("large").info.status == "FAILED"


def test_a_killed_node(cluster: Cluster, undisturbed: dict[str, bytes]) -> None:
    """There is a third one."""
    hold = cluster.seen.hold("node", 4)
    running = cluster.begin("node")
    workers = cluster.until(running, "node", 4)
    killed_at = time.time()
    cluster.kill_node(workers[0].node)
    hold.unlink()
    done = running.wait()
    print(f"went on {cluster.went_on_after('node', killed_at):.1f} s after a node was killed")
    check(cluster, "node", done, undisturbed)
    assert cluster.went_on_after("node", killed_at) < SOON


def test_a_training_goes_on_with_the_nodes_that_are_left_and_grows_again(cluster: Cluster) -> None:
    """On the two nodes that the test before has left."""

    def began_with(workers: int, after: float) -> float:
        found = cluster.seen.wait_for(
            "elastic",
            lambda taken: taken.workers == workers and taken.began > after,
            count=workers,
            still=running.process.is_alive,
        )
        return found[-1].at - after

    holds = [cluster.seen.hold("elastic", step) for step in (4, 7)]
    running = cluster.begin("elastic", "--workers", "1:4", "--resize-every", "5")
    two = cluster.until(running, "elastic", 4)
    killed_at = time.time()
    cluster.kill_node(two[0].node)
    holds[0].unlink()
    print(f"one worker {began_with(1, killed_at):.1f} s after the node of the other was killed")
    cluster.seen.wait_for("elastic", lambda taken: taken.step == 7, count=1, still=running.process.is_alive)
    joined_at = time.time()
    cluster.nodes.join({})
    print(f"two workers {began_with(2, joined_at):.1f} s after a node was started")
    holds[1].unlink()
    done = running.wait()
    assert done.code == 0, done
    assert "at step 2 with 1 worker\n" in done.out
    assert "at step 6 with 2 workers\n" in done.out
    check_images(cluster, "elastic")
    run = tracking.find_run("elastic")
    assert run.info.status == "FINISHED"
    history = {each.step: each.value for each in tracking.client().get_metric_history(run.info.run_id, "perf/workers")}
    assert history == {2: 2, 4: 1, 6: 1, 8: 2}
