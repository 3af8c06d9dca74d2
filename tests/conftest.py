"""Fixtures that more than one room uses: one Ray, one S3 server and one small data set for a session."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Gate, gate_before, local_mlflow

from jobs.cluster import ray_session
from jobs.local_s3 import local_s3, make_bucket
from pipelines.build import BuildConfig, build
from pipelines.toy import ToySummary, make_toy_data

# cuBLAS is deterministic only with this, and PyTorch reads it once, at the first product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

EXIT_STATUS = pytest.StashKey[int]()
REPOSITORY = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Whenever it makes a DataContext, Ray 2.60 sets defaults that it has deprecated itself.
    config.addinivalue_line("filterwarnings", r"ignore:`\w+` is deprecated:DeprecationWarning:ray\.data\.context")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all files that may start a Ray, of which there is one at a time; others run the rest beside it,
    with other servers of their own."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "cluster" if starts_ray(file) else file if has_servers(file) else nodeid

    return Scheduling(config, log)


@cache
def starts_ray(file: str) -> bool:
    """Whether a test file speaks of what may start a Ray: a fixture, or a command in a process of its own."""
    return _speaks_of(file, r'\b(ray_cluster|ray_session|ray_nodes|toy_shards|cli_process)\b|"jobs\.cli"')


@cache
def has_servers(file: str) -> bool:
    """Whether a test file uses a server that is started once in each process."""
    return _speaks_of(file, r"\b(s3|mlflow_server|gate)\b")


def _speaks_of(file: str, words: str) -> bool:
    return bool(re.search(words, (REPOSITORY / file).read_text()))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End without the interpreter's teardown.

    By now all fixtures are torn down and the result is printed. The native threads that Ray, gRPC and Arrow leave in a
    process that has used them all can still crash while the interpreter takes itself apart (seen once, after
    664 passed tests), which would turn a passed run into a failed one.
    """
    if EXIT_STATUS in config.stash and not hasattr(config, "workerinput"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty MLflow for the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a real MLflow server of this session."""
    with local_mlflow(tmp_path_factory.mktemp("mlflow-server")) as port:
        yield port


@pytest.fixture
def gate(mlflow_server: int) -> Iterator[Gate]:
    """The way to the MLflow server."""
    with gate_before(mlflow_server) as gate:
        yield gate


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on a real S3 server of this session; its AWS_* variables are set."""
    with local_s3(tmp_path_factory.mktemp("s3")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield make_bucket(environment, "test")


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[None]:
    """A local Ray with 2 CPUs. After `s3`, because Ray's processes inherit the variables of their start."""
    with ray_session(cpus=2, dashboard=True):
        yield


@pytest.fixture(scope="session")
def coco100() -> Path:
    """The 100 real COCO images, or a skip."""
    folder = Path(os.environ.get("MRCNN_COCO100", REPOSITORY.parent / "shared/data/coco100"))
    if not (folder / "annotations/instances_val2017.json").exists():
        pytest.skip(f"no COCO images at {folder}: set MRCNN_COCO100")
    return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> ToySummary:
    """Sixteen toy images of 96 pixels and more, with their annotations."""
    return make_toy_data(str(tmp_path_factory.mktemp("toy")), images=16, seed=5, size=96)


@pytest.fixture(scope="session")
def toy_config(toy_data: ToySummary) -> BuildConfig:
    """Build of `toy_data` that loses nothing: raw pixels, no scaling, four shards. Replace `out`."""
    return BuildConfig(
        images=toy_data.images_uri, annotations=toy_data.annotations_uri, out="/replace/this",
        shorter_side=96, longer_side=160, encoding="raw", rows_per_shard=5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def toy_shards(toy_config: BuildConfig, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of `toy_data` as shards."""
    out = str(tmp_path_factory.mktemp("shards"))
    build(replace(toy_config, out=out))
    return out
