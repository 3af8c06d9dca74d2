"""Runs in MLflow: the driver makes and describes one; jobs/tracking_log.py writes into it and ends it.

Where they go: `MLFLOW_TRACKING_URI`, or the SQLite file `mlflow.db` in the working directory. A SQLite store
has its artifacts in `MRCNN_ARTIFACT_ROOT` (a folder or s3://bucket/prefix), or in `mlruns` beside the
database; a tracking server decides for itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlflow
import torch
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.telemetry import set_telemetry_client
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from jobs.redaction import redact
from jobs.ship import git_commit

TRACKING_URI = "MLFLOW_TRACKING_URI"
ARTIFACT_ROOT = "MRCNN_ARTIFACT_ROOT"
MODEL_URI_TAG = "mrcnn.model_uri"
"""Folder of the model that a run has made: model.safetensors and config.json."""
VAL_DIGEST_TAG = "mrcnn.val_digest"
"""Digest of the validation shards that the run's val/ metrics were measured on."""

DIGEST_TAGS = {"training": "mrcnn.data_digest", "validation": VAL_DIGEST_TAG}
"""By the context of a data set"""

BEST_TAG = "mrcnn.best_checkpoint"
"""Folder of a run's best checkpoint, which is a model's, too."""
UNEVALUATED_TAG = "mrcnn.failed_evaluations"
"""Steps of a run that could not be evaluated, and why."""
RUN_NAME_TAG = "mrcnn.run_name"
"""Name of the run that a registered version comes from."""

MEASURES = ("val/mask_AP", "val/keypoint_AP", "val/box_AP")
"""What tells which of two models is better: the first of these that was measured."""

CONFIG_ARTIFACT = "config.json"

_SQLITE = "sqlite:///"
_PARAM_LENGTH = 6000  # MLflow's bounds: characters of a value, parameters of a batch
_PARAM_BATCH = 100
_RETRIES = re.compile(r"HTTPS?ConnectionPool\(.*?\): Max retries exceeded with url: \S+ ")  # before the cause
_ERRORS = (MlflowException, SQLAlchemyError, ImportError, RequestException, Boto3Error, BotoCoreError, ClientError)
_DATASET_NAME_LENGTH, _DIGEST_LENGTH = 500, 36  # MLflow's bounds

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for a file or two
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 7 keep a user waiting for minutes on a wrong address
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the summary names the run
set_telemetry_client()  # again: importing MLflow has looked at the variable already

# The first use of a SQLite store tells of every migration of its tables, and urllib3 of every retry.
for _name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class RunHandle:
    """A run, for another process: all that a worker needs to write into it."""

    run_id: str
    tracking_uri: str = field(repr=False)  # may have a password in it


@dataclass(frozen=True)
class DatasetOfRun:
    """Data that a run has used."""

    uri: str
    digest: str
    """Of the shards' manifest"""
    images: int
    context: str
    """training or validation"""


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
def readable_errors(uri: str | None = None) -> Iterator[None]:
    """Turn exceptions of MLflow, and of the place of its artifacts, into a ValueError that says where MLflow was looked
    for: at `uri`, by default what the variable says."""
    try:
        yield
    except _ERRORS as error:
        where = redact(uri or os.environ.get(TRACKING_URI) or "mlflow.db in the working directory")
        reason = error.message if isinstance(error, MlflowException) else str(error).split("\n")[0]
        raise ValueError(f"MLflow ({TRACKING_URI}: {where}): {redact(_RETRIES.sub('', reason))}") from error


def create_run(
    *, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None
) -> RunHandle:
    """Make a run in an experiment (made where there is none), with its parameters and tags.

    `params` may be nested; MLflow gets flat dotted names. No credential that sits in a URI or in the usual
    environment variables gets into either. Raises ValueError where MLflow refuses.
    """
    with readable_errors():
        store = client()
        run = store.create_run(_experiment_id(store, experiment), run_name=name, tags=clean_tags(tags or {}))
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


def describe_run(handle: RunHandle, config: Mapping[str, Any], datasets: Sequence[DatasetOfRun]) -> None:
    """Give a run its whole config as the artifact `config.json`, and its data sets as inputs, their digests as tags.

    Raises ValueError where MLflow or the place of its artifacts refuses: better now than after days of training.
    """
    with readable_errors(handle.tracking_uri):
        store = mlflow.MlflowClient(handle.tracking_uri)
        store.log_text(handle.run_id, redact(json.dumps(config, indent=2, sort_keys=True)), CONFIG_ARTIFACT)
        store.log_inputs(handle.run_id, _inputs(datasets))
        for each in datasets:
            store.set_tag(handle.run_id, DIGEST_TAGS[each.context], each.digest)


def read_artifact(uri: str) -> bytes:
    """An artifact of a run, by its URI runs:/ID/NAME. Raises ValueError where MLflow does not have it."""
    with readable_errors(), tempfile.TemporaryDirectory(prefix="mrcnn-") as folder:
        path = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=tracking_uri())
        return Path(path).read_bytes()


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


def _param(value: Any) -> str:
    text = redact(value if isinstance(value, str) else json.dumps(value, default=str))
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - 3] + "..."


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags without credentials."""
    return {key: redact(str(value)) for key, value in tags.items()}


def _inputs(datasets: Sequence[DatasetOfRun]) -> list[DatasetInput]:
    """One for each data set: MLflow has no two inputs of one name and digest, so its contexts are in one tag."""
    contexts: dict[tuple[str, str], list[str]] = {}
    for each in datasets:
        contexts.setdefault((each.uri, each.digest), []).append(each.context)
    return [_input(each, ", ".join(contexts[each.uri, each.digest])) for each in datasets]


def _input(dataset: DatasetOfRun, context: str) -> DatasetInput:
    uri = redact(dataset.uri)
    entity = Dataset(
        name=uri[-_DATASET_NAME_LENGTH:],
        digest=dataset.digest[:_DIGEST_LENGTH],
        source_type="s3" if uri.startswith("s3://") else "local",
        source=json.dumps({"uri": uri}),
        profile=json.dumps({"images": dataset.images, "manifest_digest": dataset.digest}),
    )
    return DatasetInput(entity, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


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
