"""Versions of models in MLflow's registry: register, promote, and fetch.

A version holds model.safetensors and config.json (settings, preprocessing, label map) and a pyfunc made from
code; its tags hold the metrics and the digest of the data that they were measured on. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as installed_version
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Object, Property
from PIL import Image

from jobs import tracking
from jobs.checkpoint import EVALUATION_FILE
from mrcnn.weights import CONFIG_FILE, WEIGHTS_FILE, load_model
from pipelines.storage import open_store

CHAMPION = "champion"
PREVIOUS = "previous"
FORCED_TAG = "mrcnn.promoted_by_force"

PYFUNC = Path(__file__).with_name("pyfunc_model.py")
ARTIFACT = "model"  # as in pyfunc_model.py
FILES = (WEIGHTS_FILE, CONFIG_FILE)
REQUIREMENTS = (
    "mrcnn-on-ray",
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "pillow",
    "pycocotools",
    "safetensors",
)

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of type hints of its own
    import mlflow.pyfunc


@dataclass(frozen=True)
class ResolvedModel:
    """A model by its URI, read into memory."""

    uri: str
    """As it was asked for"""
    version: str | None
    """models:/NAME/VERSION of what an alias pointed to; None for a folder"""
    files: dict[str, bytes]
    """model.safetensors and config.json"""

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Of each file: the model's identity, wherever it lies."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.files.items())}


def resolve_model(uri: str) -> ResolvedModel:
    """The model at models:/NAME@ALIAS, models:/NAME/VERSION, or in a folder (local or s3://).

    Raises FileNotFoundError for a folder without a model, ValueError for a name, version or alias that MLflow
    does not have.
    """
    if not uri.startswith("models:"):
        store = open_store(uri).check_folder()
        return ResolvedModel(uri, None, {name: store.read_bytes(name) for name in FILES})
    found = _find_version(uri)
    with tempfile.TemporaryDirectory(prefix="mrcnn-") as folder, tracking.readable_errors():
        path = Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"models:/{found.name}/{found.version}/artifacts/{ARTIFACT}",
                dst_path=folder,
                tracking_uri=tracking.tracking_uri(),
            )
        )
        files = {name: (path / name).read_bytes() for name in FILES}
    return ResolvedModel(uri, f"models:/{found.name}/{found.version}", files)


def register(run: str, name: str, *, best: bool = False) -> int:
    """Make the model of a run (its name or id), or the `best` of its checkpoints, the next version of `name`. Returns
    the version's number.

    Raises ValueError for an unknown run, or one without a model or an evaluation.
    """
    found = tracking.find_run(run)
    model_uri = found.data.tags.get(tracking.BEST_TAG if best else tracking.MODEL_URI_TAG)
    metrics = _metrics_of_checkpoint(model_uri) if best and model_uri else found.data.metrics
    measured = [key for key in tracking.MEASURES if metrics.get(key) is not None]
    if model_uri is None or not measured or found.info.status != "FINISHED":
        raise ValueError(f"run {run!r} ({found.info.status}) has no evaluated model: let its training finish first")
    model = resolve_model(model_uri)
    tags = {key: value for key, value in found.data.tags.items() if key.startswith("mrcnn.")}
    tags |= {tracking.MODEL_URI_TAG: model_uri, **{key: str(metrics[key]) for key in measured}}
    tags["mrcnn.weights_sha256"] = model.sha256[WEIGHTS_FILE]
    with tracking.readable_errors():
        store = tracking.client()
        if not _is_registered(store, name):  # first, because MLflow checks the name here
            store.create_registered_model(name)
        model_id = _log_model(model, run_id=found.info.run_id, experiment_id=found.info.experiment_id)
        made = store.create_model_version(
            name, source=f"models:/{model_id}", run_id=found.info.run_id, tags=tags, model_id=model_id
        )
    return int(made.version)


def _metrics_of_checkpoint(uri: str) -> dict[str, float | None]:
    metrics: dict[str, float | None] = json.loads(open_store(uri).read_bytes(EVALUATION_FILE))["metrics"]
    return metrics


def promote(name: str, version: int, alias: str = CHAMPION, *, force: bool = False) -> None:
    """Let `alias` point to a version; the version that had it gets the alias previous (or previous-ALIAS).

    Raises ValueError for an unknown version, and, unless `force`d (a tag will tell), for one whose mask AP (keypoint
    AP, box AP where neither model has masks, keypoints) is below that of the alias' present version on the same
    validation data.
    """
    candidate = _find_version(f"models:/{name}/{version}")
    with tracking.readable_errors():
        store = tracking.client()
        present = str(store.get_registered_model(name).aliases.get(alias, ""))
        if present == str(version):
            return
        if present:
            if not force:
                _check_not_worse(candidate, store.get_model_version(name, present), alias)
            previous = PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"
            store.set_registered_model_alias(name, previous, present)
        if force:
            store.set_model_version_tag(name, str(version), FORCED_TAG, alias)
        store.set_registered_model_alias(name, alias, str(version))


def _check_not_worse(candidate: ModelVersion, present: ModelVersion, alias: str) -> None:
    digest = tracking.VAL_DIGEST_TAG
    if candidate.tags.get(digest) != present.tags.get(digest):
        return  # measured on other data: the numbers say nothing about each other
    measure = next((key for key in tracking.MEASURES if key in candidate.tags or key in present.tags), "val/box_AP")
    ours, theirs = (float(version.tags.get(measure, "nan")) for version in (candidate, present))
    if ours < theirs or (math.isnan(ours) and not math.isnan(theirs)):
        raise ValueError(
            f"version {candidate.version} of {candidate.name} has {_in_words(measure)} {ours:.4f}, the {alias}, "
            f"version {present.version}, has {theirs:.4f} on the same validation data: {alias} stays where it is"
        )


def _in_words(measure: str) -> str:
    return measure.removeprefix("val/").replace("_", " ")


def _find_version(uri: str) -> ModelVersion:
    match = _MODEL_URI.fullmatch(uri)
    if match is None:
        raise ValueError(f"{uri!r} is no model: write models:/NAME@ALIAS, models:/NAME/VERSION or a folder")
    name, alias, version = match["name"], match["alias"], match["version"]
    with tracking.readable_errors():
        store = tracking.client()
        try:
            if alias:
                return store.get_model_version_by_alias(name, alias)
            return store.get_model_version(name, version)
        except MlflowException as error:
            if error.error_code not in _UNKNOWN:
                raise
        raise ValueError(f"{uri} does not exist: {_what_there_is(store, name)}")


def _what_there_is(store: mlflow.MlflowClient, name: str) -> str:
    if not _is_registered(store, name):
        known = sorted(model.name for model in store.search_registered_models())
        return f"MLflow at {tracking.redact(tracking.tracking_uri())} has the models {known}"
    versions = sorted(int(v.version) for v in store.search_model_versions(f"name = '{name}'"))
    return f"{name} has the versions {versions} and the aliases {store.get_registered_model(name).aliases}"


def _is_registered(store: mlflow.MlflowClient, name: str) -> bool:
    try:
        store.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _log_model(model: ResolvedModel, *, run_id: str, experiment_id: str) -> str:
    """Put the files and the pyfunc into MLflow as a model of the run. Returns MLflow's id of it."""
    mlflow.set_tracking_uri(tracking.tracking_uri())
    mlflow.set_experiment(experiment_id=experiment_id)
    with tempfile.TemporaryDirectory(prefix="mrcnn-") as temporary:
        folder = Path(temporary, ARTIFACT)
        folder.mkdir()
        for name, data in model.files.items():
            (folder / name).write_bytes(data)
        load_model(folder)  # a version that cannot be loaded must not come to be
        logged = Model.log(
            artifact_path=None,
            name=ARTIFACT,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(PYFUNC),
            artifacts={ARTIFACT: str(folder)},
            signature=_signature(),
            input_example=[_example_image()],
            # given, because MLflow would otherwise run the model to find out
            pip_requirements=[f"{package}=={installed_version(package)}" for package in REQUIREMENTS],
        )
    return logged.model_id


def _example_image() -> bytes:
    """A gray PNG; MLflow tries the model on it."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(file, "png")
    return file.getvalue()


def _signature() -> ModelSignature:
    """Of jobs/pyfunc_model.py: image files in; size and detections out."""
    rle = Object([Property("size", Array(DataType.long)), Property("counts", DataType.string)])
    detection = Object(
        [
            Property("label", DataType.long),
            Property("category_id", DataType.long),
            Property("category", DataType.string),
            Property("score", DataType.double),
            Property("box", Array(DataType.double)),
            Property("rle", rle, required=False),
            Property("keypoints", Array(DataType.double), required=False),
        ]
    )
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary)]),
        outputs=Schema(
            [
                ColSpec(DataType.long, "height"),
                ColSpec(DataType.long, "width"),
                ColSpec(Array(detection), "detections"),
            ]
        ),
    )
