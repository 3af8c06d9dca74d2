"""No credential is in anything that a training leaves: a real one on a real cluster, submitted, with its storage on S3
and MLflow behind a password; then all of it is searched."""

from __future__ import annotations

import base64
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_process import commands
from mlflow_server import local_mlflow
from models import SMALL
from ray_nodes import ray_nodes

from jobs.config import OptimizerConfig, TrainConfig
from pipelines.storage import open_store

pytestmark = pytest.mark.drill

PASSWORD = secrets.token_hex(16)
CONFIG = TrainConfig(
    model=SMALL,
    optimizer=OptimizerConfig(base_lr=0.02, warmup_steps=4),
    steps=4,
    global_batch=2,
    log_every=2,
    checkpoint_every=2,
    pictures=1,
)


@dataclass(frozen=True)
class Left:
    """What a training left, by place: names and contents."""

    places: dict[str, dict[str, bytes]]
    secret_key: str

    def holding(self, text: str) -> list[str]:
        """Where a text is."""
        return [
            f"{place}: {name}"
            for place, contents in self.places.items()
            for name, content in contents.items()
            if text.encode() in name.encode() + content
        ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def left(toy_shards: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder, storage = tmp_path_factory.mktemp("mlflow-with-password"), f"{s3}/secrets"
    config = tmp_path_factory.mktemp("config") / "config.json"
    config.write_text(json.dumps(CONFIG.to_dict()))
    words = (
        "train", "--config", str(config), "--data", toy_shards, "--val-data", toy_shards, "--storage", storage,
        "--run", "searched",
    )  # fmt: skip
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with local_mlflow(folder) as port:
        address = f"http://ada:{PASSWORD}@127.0.0.1:{port}"
        known = {**aws, "MLFLOW_TRACKING_URI": address, "MLFLOW_S3_ENDPOINT_URL": address}
        with ray_nodes([{}], {**known, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}) as nodes:
            client = {"PATH": nodes.environment["PATH"], "HOME": str(nodes.folder), **nodes.client_environment, **known}
            with commands(tmp_path_factory.mktemp("client"), client) as mrcnn:
                done = mrcnn.start("submit", "--address", nodes.url, "--name", "secret-job", "--", *words).wait(600)
            assert done.code == 0, done.out + done.err
            api = ["/api/jobs/", *(f"/api/v0/{kind}?detail=1&limit=1000" for kind in ("jobs", "actors", "workers"))]
            told = {path: json.dumps(nodes.ask(path)).encode() for path in [*api, "/api/v0/runtime_envs"]}
            session = files(nodes.folder)
        tracked = files(folder)
    store = open_store(storage)
    run = {name: store.read_bytes(name) for name in store.list()}
    printed = {"stdout": done.out.encode(), "stderr": done.err.encode()}
    return Left({"Ray's API": told, "Ray's files": session, "MLflow": tracked, "S3": run, "printed": printed},
                aws["AWS_SECRET_ACCESS_KEY"])  # fmt: skip


def test_everything_was_searched(left: Left) -> None:
    """The name of the run, of what holds it, is in every place."""
    assert {where.split(":")[0] for where in left.holding("searched")} == set(left.places)
    names = [name for contents in left.places.values() for name in contents]
    wanted = (
        "run.json",
        "checkpoint.json",
        "optimizer.safetensors",
        "config.json",
        "mlflow.db",
        "per_category_AP.json",
    )
    for name in (*wanted, "job-driver-secret-job.log"):
        assert any(each.endswith(name) for each in names), name
    assert any("/worker-" in name and name.endswith(".out") for name in names)
    assert any("images/val~image_0" in name for name in names)


def test_no_credential_is_in_it(left: Left) -> None:
    as_header = base64.b64encode(f"ada:{PASSWORD}".encode()).decode()
    for secret in (left.secret_key, PASSWORD, as_header):
        assert left.holding(secret) == []
