"""kill -9 of an actor, of a node and of the driver with all its processes: the same command finishes the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from killing import checksums, command_of, family, kill_all, send, stamps
from models import SMALL
from ray_nodes import ray_nodes

from jobs.predict import predict
from mrcnn import InputConfig, MaskRCNN, save_model
from pipelines.predict_folder import PARTS, PROGRESS, part_name, receipt_name
from pipelines.storage import open_store
from pipelines.toy import make_toy_data

pytestmark = pytest.mark.drill

IMAGES, CHUNKS = 82, 6
PATIENCE = 300.0


@dataclass(frozen=True)
class Job:
    """A prediction of some seconds."""

    model: str
    images: str
    expected: dict[str, str]
    """Checksums of what an undisturbed one leaves"""

    def start(self, out: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        words = ["predict", "--model", self.model, "--images", self.images, "--out", out, "--cpus", "2"]
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, **(environment or {})},
        )  # fmt: skip


@pytest.fixture(scope="module")
def job(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    made = make_toy_data(str(folder / "data"), images=IMAGES - 1, seed=6, size=96)
    (Path(made.images_uri) / "broken.jpg").write_bytes(b"no image")
    torch.manual_seed(0)
    save_model(MaskRCNN(replace(SMALL, input=InputConfig(shorter_side=320, longer_side=480))), folder / "model")
    predict(str(folder / "model"), made.images_uri, str(folder / "undisturbed"))
    return Job(str(folder / "model"), made.images_uri, checksums(str(folder / "undisturbed")))


def finished(out: str) -> list[int]:
    """Chunks that have a receipt."""
    names = set(open_store(out).list())
    return [number for number in range(CHUNKS) if receipt_name(number) in names]


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_visible_is_true(out: str, job: Job) -> None:
    """What has its name is complete, and no manifest says that all is."""
    visible = {name: sum_ for name, sum_ in checksums(out).items() if name.startswith(f"{PARTS}/part-")}
    assert visible.items() <= job.expected.items()
    assert "manifest.json" not in checksums(out)


def test_the_driver_and_then_an_actor_die(job: Job, s3: str) -> None:
    """On S3, where a part that is half there is the beginning of an upload; on disk a node dies, below."""
    out = f"{s3}/predicted"
    process = job.start(out)
    try:
        wait_until(lambda: len(finished(out)) >= 1, process)
        time.sleep(0.3)
    finally:
        kill_all(process.pid)
        process.communicate()
    assert_visible_is_true(out, job)
    before = finished(out)
    assert 0 < len(before) < CHUNKS, "too late: let the prediction take longer"
    done = stamps(out, map(part_name, before))
    process = job.start(out)
    try:
        wait_until(lambda: len(finished(out)) > len(before), process)
        actors = [pid for pid in family(process.pid) if "ChunkPredictor" in command_of(pid)]
        assert actors
        send(actors[:1], signal.SIGKILL)
        printed, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill_all(process.pid)
    assert process.returncode == 0, printed
    assert checksums(out) == job.expected, "nor is anything else left"
    assert f"chunks: {CHUNKS - len(before)} made now, {len(before)} were finished before" in printed
    assert stamps(out, done) == done, "finished parts were left alone"
    uploads = open_store(out)._fs.call_s3("list_multipart_uploads", Bucket=out.removeprefix("s3://").split("/")[0])
    assert not uploads.get("Uploads"), "no part of an upload stays"


def test_a_node_dies(job: Job, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with ray_nodes([{"a": 1}, {"b": 1}], {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}) as nodes:
        address = {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}", **nodes.client_environment}
        process = job.start(out, address)
        try:
            wait_until(lambda: len(finished(out)) >= 1, process)
            kill_all(nodes.processes[-1].pid)
            printed, _ = process.communicate(timeout=PATIENCE)
        finally:
            kill_all(process.pid)
    assert process.returncode == 0, printed
    assert checksums(out) == job.expected
    assert f"chunks: {CHUNKS} made now" in printed
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["totals"]["rows"] == IMAGES - 1
    assert not open_store(out).exists(PROGRESS)
