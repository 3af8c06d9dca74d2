"""Runs in MLflow: the driver makes one and ends it, rank 0 writes into it through its handle.

Where they go: `MLFLOW_TRACKING_URI`, or the SQLite file `mlflow.db` in the working directory. A SQLite store
has its artifacts in `MRCNN_ARTIFACT_ROOT` (a folder or s3://bucket/prefix), or in `mlruns` beside the
database; a tracking server decides for itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.telemetry import set_telemetry_client
from sqlalchemy.exc import SQLAlchemyError

from jobs.ship import git_commit

TRACKING_URI = "MLFLOW_TRACKING_URI"
ARTIFACT_ROOT = "MRCNN_ARTIFACT_ROOT"
MODEL_URI_TAG = "mrcnn.model_uri"
"""Folder of the model that a run has made: model.safetensors and config.json."""
VAL_DIGEST_TAG = "mrcnn.val_digest"
"""Digest of the validation shards that the run's val/ metrics were measured on."""

MEASURES = ("val/mask_AP", "val/keypoint_AP", "val/box_AP")
"""What tells which of two models is better: the first of these that was measured."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

_SQLITE = "sqlite:///"
_METRIC_ROOMS = ("train", "val", "perf", "best")
_PARAM_LENGTH = 6000  # MLflow's bounds: characters of a value, parameters of a batch
_PARAM_BATCH = 100
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_USERINFO = re.compile(r"""://(?:[^\s/@:"']+:[^\s@"']+|[^\s/@"']+)@""")

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 7 keep a user waiting for minutes on a wrong address
set_telemetry_client()  # again: importing MLflow has looked at the variable already

# The first use of a SQLite store tells of every migration of its tables.
for _name in ("alembic", "mlflow.store.db.utils"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True)
class RunHandle:
    """A run, for another process: all that a worker needs to write into it."""

    run_id: str
    tracking_uri: str = field(repr=False)  # may have a password in it


def tracking_uri() -> str:
    """Where MLflow is. A SQLite path is made absolute, because Ray's workers run in other directories."""
    uri = os.environ.get(TRACKING_URI) or _SQLITE + "mlflow.db"
    if not uri.startswith(_SQLITE):
        return uri
    database = Path(uri.removeprefix(_SQLITE)).resolve()
    if not database.parent.is_dir():
        raise ValueError(f"{TRACKING_URI} is {uri}, but there is no folder {database.parent}: make it first")
    return f"{_SQLITE}{database}"


def client() -> mlflow.MlflowClient:
    """MLflow's client for `tracking_uri()`, tracking and registry both."""
    uri = tracking_uri()
    with readable_errors():
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn MLflow's exceptions into a ValueError that says where MLflow was looked for."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError) as error:
        where = redact(os.environ.get(TRACKING_URI) or "mlflow.db in the working directory")
        reason = error.message if isinstance(error, MlflowException) else str(error).split("\n")[0]
        raise ValueError(f"MLflow ({TRACKING_URI}: {where}): {redact(reason)}") from error


def create_run(
    *, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None
) -> RunHandle:
    """Make a run in an experiment (made where there is none), with its parameters and tags.

    `params` may be nested; MLflow gets flat dotted names. No credential that sits in a URI or in the usual
    environment variables gets into either. Raises ValueError where MLflow refuses.
    """
    with readable_errors():
        store = client()
        run = store.create_run(_experiment_id(store, experiment), run_name=name, tags=_clean(tags or {}))
        entries = [Param(key, value) for key, value in flat_params(params).items()]
        for start in range(0, len(entries), _PARAM_BATCH):
            store.log_batch(run.info.run_id, params=entries[start : start + _PARAM_BATCH])
    return RunHandle(run.info.run_id, tracking_uri())


def reopen_run(run_id: str) -> RunHandle:
    """Go on with a run, so that a resumed training makes no second one. Raises ValueError if unknown."""
    with readable_errors():
        store = client()
        store.get_run(run_id)
        store.update_run(run_id, status="RUNNING")
    return RunHandle(run_id, tracking_uri())


def find_run(name_or_id: str) -> Run:
    """The run of an id, or of a name that only one run has. Raises ValueError with the candidates if not."""
    with readable_errors():
        store = client()
        if re.fullmatch(r"[0-9a-f]{32}", name_or_id):
            return store.get_run(name_or_id)
        experiments = [e.experiment_id for e in store.search_experiments()]
        quoted = name_or_id.replace("'", "''")
        runs = list(store.search_runs(experiments, f"attributes.run_name = '{quoted}'")) if experiments else []
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise ValueError(f"no run is named {name_or_id!r} in MLflow at {redact(tracking_uri())}")
    ids = ", ".join(f"{run.info.run_id} ({run.info.status})" for run in runs)
    raise ValueError(f"{len(runs)} runs are named {name_or_id!r}, give one's id: {ids}")


@contextmanager
def run_status(handle: RunHandle) -> Iterator[None]:
    """End a run with the status that fits how the block ends."""
    logger = RunLogger(handle)
    try:
        yield
    except BaseException as error:
        try:
            logger.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except MlflowException as second:  # what went wrong first matters more
            error.add_note(f"nor could the run's status be set: {redact(second.message)}")
        raise
    with readable_errors():
        logger.finish("FINISHED")


class RunLogger:
    """Writes into a run that exists; rank 0 alone has one."""

    def __init__(self, handle: RunHandle) -> None:
        self.run_id = handle.run_id
        self._client = mlflow.MlflowClient(handle.tracking_uri)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step, named train/..., val/..., perf/... or best/..."""
        assert all(key.split("/")[0] in _METRIC_ROOMS for key in values), sorted(values)
        now = time.time_ns() // 1_000_000
        entries = [Metric(key, float(value), now, step) for key, value in values.items()]
        self._client.log_batch(self.run_id, metrics=entries)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, without credentials."""
        self._client.log_batch(self.run_id, tags=[RunTag(*item) for item in _clean(values).items()])

    def image(self, image: np.ndarray, key: str, step: int) -> None:
        """An RGB uint8 picture (H, W, 3) for the image grid of the UI; use the same keys at every step."""
        self._client.log_image(self.run_id, image, key=key, step=step)

    def json(self, data: Mapping[str, Any], artifact_file: str) -> None:
        """A JSON artifact, e.g. the run's whole config as `config.json`, without credentials."""
        text = json.dumps(data, indent=2, sort_keys=True)
        self._client.log_text(self.run_id, redact(text), artifact_file)

    def table(self, columns: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
        """A table of equally long columns, e.g. AP by category; rows are added to a table that is there."""
        # dtype object: log_table looks for pictures in text columns, of which pandas 3 warns otherwise
        frame = pd.DataFrame({key: list(column) for key, column in columns.items()}, dtype=object)
        self._client.log_table(self.run_id, frame, artifact_file)

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run. The driver's business: a worker cannot know whether it is retried."""
        self._client.set_terminated(self.run_id, status)


def standard_tags() -> dict[str, str]:
    """What ran where: commit of the working tree, version of this package, torch, CUDA and GPU."""
    commit = git_commit()
    found = {
        "mlflow.source.git.commit": commit,  # the UI shows this one
        "mrcnn.git_commit": commit,
        "mrcnn.version": _own_version(),
        "mrcnn.torch": torch.__version__,
        "mrcnn.cuda": torch.version.cuda,
        "mrcnn.gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {key: value for key, value in found.items() if value}


def flat_params(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"model": {"num_classes": 3}}` to `{"model.num_classes": "3"}`, without credentials, cut to 6000."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat.update(flat_params(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _param(value)
    return flat


def redact(text: str) -> str:
    """The text without the user and password of URIs and without the values of the usual secret variables."""
    text = _USERINFO.sub("://", text)
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "***")
    return text


def _param(value: Any) -> str:
    text = redact(value if isinstance(value, str) else json.dumps(value, default=str))
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - 3] + "..."


def _clean(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: redact(str(value)) for key, value in tags.items()}


def _experiment_id(store: mlflow.MlflowClient, name: str) -> str:
    found = store.get_experiment_by_name(name)
    if found is None:
        return store.create_experiment(name, artifact_location=_artifact_location(name))
    if found.lifecycle_stage == "deleted":
        raise ValueError(f"the experiment {name!r} is deleted: restore it, or take another name")
    return found.experiment_id


def _artifact_location(experiment: str) -> str | None:
    """None leaves it to the tracking server."""
    uri = tracking_uri()
    root = os.environ.get(ARTIFACT_ROOT)
    if not root:
        if not uri.startswith(_SQLITE):
            return None
        root = str(Path(uri.removeprefix(_SQLITE)).parent / "mlruns")
    if "://" not in root:
        root = Path(root).resolve().as_uri()
    folder = re.sub(r"[^A-Za-z0-9_.-]+", "-", experiment)
    return f"{root.rstrip('/')}/{folder}"


def _own_version() -> str | None:
    try:
        return version("mrcnn-on-ray")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return None
