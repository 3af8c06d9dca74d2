"""Versions of models in MLflow's registry: register, promote, roll back, list, and fetch.

A version holds model.safetensors, config.json, what `version_files` makes (label map, preprocessing, evaluation), and a
pyfunc made from code with signature and example; its tags hold the metrics and the digest of the data that they were
measured on, its description the same for people. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from jobs import tracking
from jobs.evaluated import Evaluated, of_checkpoint, of_last_step
from jobs.model_list import Version
from jobs.promotion import Candidate, Move, Objection, objection
from jobs.registry_log import ARTIFACT, log_model
from jobs.registry_store import aliases_of, ensure_model, find_version, is_registered, pages, versions_of, what_there_is
from jobs.version_files import describe, version_files
from mrcnn.weights import CONFIG_FILE, WEIGHTS_FILE, model_from_files
from pipelines.storage import open_store

CHAMPION = "champion"
PREVIOUS = "previous"
FORCED_TAG = "mrcnn.promoted_by_force"
ROLLED_BACK_TAG = "mrcnn.rolled_back"
WEIGHTS_TAG, STEP_TAG = "mrcnn.weights_sha256", "mrcnn.step"
FILES = (WEIGHTS_FILE, CONFIG_FILE)

_NAME = re.compile(r"\w(?:[\w .-]*[\w.-])?")  # of a new model; MLflow itself takes what no URI or search could hold


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    is_new: bool

    @property
    def uri(self) -> str:
        """models:/NAME/VERSION"""
        return f"models:/{self.name}/{self.version}"


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
    found = find_version(uri)
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


def register(run: str, name: str, *, best: bool = False) -> Registered:
    """Make the model of a run (its name or id), or the `best` of its checkpoints, the next version of `name`. Where it
    is a version already, with the same numbers, no other one is made.

    Raises ValueError for an unknown run, one without a model or an evaluation, or a name that no URI could hold.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name is {name!r}, but may have letters, digits, spaces, '.', '_' and '-' only, a letter or digit first"
        )
    found = tracking.find_run(run)
    model_uri, evaluated = _model_of_run(found, best=best)
    resolved = resolve_model(model_uri)
    model = model_from_files(resolved.files, model_uri)  # a version that cannot be loaded must not come to be
    run_name = found.info.run_name or found.info.run_id
    tags = _version_tags(found, resolved, evaluated) | {tracking.RUN_NAME_TAG: run_name}
    files = resolved.files | version_files(model, evaluated)
    with tracking.readable_errors():
        store = tracking.client()
        if known := _same_version(store, name, tags, found.info.run_id):
            return Registered(name, int(known.version), is_new=False)
        model_id = log_model(files, run=found, step=evaluated.step, tags=tags)
        ensure_model(store, name)
        made = store.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=found.info.run_id,
            tags=tags,
            description=describe(model, evaluated, run=run_name),
            model_id=model_id,
        )
    return Registered(name, int(made.version), is_new=True)


def _model_of_run(run: Run, *, best: bool) -> tuple[str, Evaluated]:
    """Where a run's model is, and what it was measured with."""
    said = f"run {run.info.run_name!r} ({run.info.status}) has no evaluated model"
    model_uri = run.data.tags.get(tracking.BEST_TAG if best else tracking.MODEL_URI_TAG)
    if model_uri is None or run.info.status != "FINISHED":
        raise ValueError(f"{said}: let its training finish first")
    digest, data = run.data.tags.get(tracking.VAL_DIGEST_TAG, ""), run.data.params.get("val_data")
    try:
        return model_uri, of_checkpoint(model_uri) if best else of_last_step(model_uri, data_digest=digest, data=data)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error


def _version_tags(run: Run, model: ResolvedModel, evaluated: Evaluated) -> dict[str, str]:
    of_training = (tracking.BEST_TAG, tracking.UNEVALUATED_TAG)
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("mrcnn.") and key not in of_training}
    tags |= {key: str(value) for key, value in evaluated.metrics.items()}
    tags |= {
        tracking.MODEL_URI_TAG: model.uri,
        tracking.VAL_DIGEST_TAG: evaluated.data_digest,
        WEIGHTS_TAG: model.sha256[WEIGHTS_FILE],
        STEP_TAG: str(evaluated.step),
    }
    return tracking.clean_tags(tags)


def _same_version(store: mlflow.MlflowClient, name: str, tags: Mapping[str, str], run_id: str) -> ModelVersion | None:
    """The version, if there is one, with all these tags; others may have been added to it. Only the folder may be
    another: the last step can be the best one, too."""
    wanted = {key: value for key, value in tags.items() if key != tracking.MODEL_URI_TAG}.items()
    versions = versions_of(store, name) if is_registered(store, name) else []
    return next((v for v in versions if v.run_id == run_id and wanted <= v.tags.items()), None)


def promote(name: str, version: int, alias: str = CHAMPION, *, force: bool = False) -> Move:
    """Let `alias` point to a version; the version that had it gets the alias previous (or previous-ALIAS).

    Raises ValueError for an unknown version, and, unless `force`d (a tag will tell), for one that was not evaluated, or
    on other data than the alias' present version, or is worse: `jobs.promotion.objection`.
    """
    if alias.startswith(PREVIOUS):
        raise ValueError(f"alias is {alias!r}, but what begins with {PREVIOUS!r} is kept by promote: name another one")
    found = find_version(f"models:/{name}/{version}")
    candidate = Candidate(name, str(version), found.tags)
    with tracking.readable_errors():
        store = tracking.client()
        present, against = _judge(store, candidate, alias)
        if present == candidate.version:
            return Move(name, alias, candidate.version, before=present)
        if against and not force:
            raise ValueError(str(against))
        if present:  # first: what happens to us between the two, no alias is lost
            store.set_registered_model_alias(name, _previous(alias), present)
        if force:
            reason = against.reason if against else "nothing stood against it"
            store.set_model_version_tag(name, candidate.version, FORCED_TAG, f"{alias}: {reason}")
        store.set_registered_model_alias(name, alias, candidate.version)
    return Move(name, alias, candidate.version, before=present, overruled=against.reason if against else None)


def _judge(store: mlflow.MlflowClient, candidate: Candidate, alias: str) -> tuple[str | None, Objection | None]:
    """The alias' present version, and what stands against the candidate's taking its place.

    MLflow moves an alias without asking where it was. So it is looked at once more right before: of two people who
    promote, the later one is measured with the earlier one's version, but for some milliseconds.
    """
    present = aliases_of(store, candidate.name).get(alias)
    while True:
        before = store.get_model_version(candidate.name, present) if present else None
        champion = Candidate(candidate.name, str(before.version), before.tags) if before else None
        against = objection(candidate, champion, alias)
        again = aliases_of(store, candidate.name).get(alias)
        if again == present:
            return present, against
        present = again


def rollback(name: str, alias: str = CHAMPION) -> Move:
    """Let `alias` point to the version again that the last promotion took it from. That goes back one promotion: the
    alias previous is then gone, until the next one.

    Raises ValueError where there is no such version, or it was deleted.
    """
    with tracking.readable_errors():
        store = tracking.client()
        if not is_registered(store, name):
            raise ValueError(f"there is no model {name}: {what_there_is(store, name)}")
        aliases = aliases_of(store, name)
        present, back = aliases.get(alias), aliases.get(_previous(alias))
        if back is None or back == present:
            raise ValueError(
                f"{name} has no {_previous(alias)} version to go back to: nothing was promoted over another one since "
                f"the last rollback, or that one was deleted; {what_there_is(store, name)}"
            )
        find_version(f"models:/{name}/{back}")
        store.set_registered_model_alias(name, alias, back)
        store.delete_registered_model_alias(name, _previous(alias))
        if present:
            store.set_model_version_tag(name, present, ROLLED_BACK_TAG, alias)
    return Move(name, alias, back, before=present)


def list_versions(name: str | None = None) -> list[Version]:
    """All versions of a registered model, or of all. Raises ValueError for an unknown one."""
    with tracking.readable_errors():
        store = tracking.client()
        if name is not None and not is_registered(store, name):
            raise ValueError(f"there is no model {name}: {what_there_is(store, name)}")
        names = [name] if name else [model.name for model in pages(store.search_registered_models)]
        return [version for each in names for version in _listed(store, each)]


def _listed(store: mlflow.MlflowClient, name: str) -> Iterator[Version]:
    by_version: dict[str, list[str]] = {}
    for alias, version in sorted(aliases_of(store, name).items()):
        by_version.setdefault(version, []).append(alias)
    for found in versions_of(store, name):
        number = str(found.version)
        aliases = tuple(by_version.get(number, ()))
        yield Version(name, int(number), aliases, found.creation_timestamp, found.run_id or "", found.tags)


def _previous(alias: str) -> str:
    return PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"
