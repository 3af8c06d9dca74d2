"""What MLflow's registry has: versions by their URIs, aliases, and searches to their ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList

from jobs import tracking

NAMED = 20  # of the models or versions that an error tells
PAGE = 1000  # that MLflow gives at a time; its bound for models

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias
_T = TypeVar("_T")


def find_version(uri: str) -> ModelVersion:
    """The version at models:/NAME@ALIAS or models:/NAME/VERSION. Raises ValueError that says what there is instead."""
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
        raise ValueError(f"{uri} does not exist: {what_there_is(store, name)}")


def what_there_is(store: mlflow.MlflowClient, name: str) -> str:
    """For the error about a model, version or alias that there is not."""
    if not is_registered(store, name):
        known = sorted(model.name for model in pages(store.search_registered_models))
        return f"MLflow at {tracking.redact(tracking.tracking_uri())} has the models {_some(known)}"
    versions = sorted((int(version.version) for version in versions_of(store, name)), reverse=True)
    return f"{name} has the versions {_some(versions)} and the aliases {aliases_of(store, name)}"


def _some(names: Sequence[object]) -> str:
    """The first of them, where all would be no line to read."""
    rest = len(names) - NAMED
    return f"{list(names[:NAMED])}{f' and {rest} more' if rest > 0 else ''}"


def is_registered(store: mlflow.MlflowClient, name: str) -> bool:
    """Whether there is a model of this name."""
    try:
        store.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def ensure_model(store: mlflow.MlflowClient, name: str) -> None:
    """Make a model that versions can be added to, where there is none; somebody else may do so at the same time."""
    try:
        store.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def aliases_of(store: mlflow.MlflowClient, name: str) -> dict[str, str]:
    """The version that each alias of a model points to."""
    return {alias: str(version) for alias, version in store.get_registered_model(name).aliases.items()}


def versions_of(store: mlflow.MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a model."""
    quote = '"' if "'" in name else "'"  # MLflow has no way to write a quote within quotes
    return pages(partial(store.search_model_versions, f"name = {quote}{name}{quote}"))


def pages(search: Callable[..., PagedList[_T]]) -> list[_T]:
    """All that a search of MLflow finds: it gives a page at a time."""
    found: list[_T] = []
    token = None
    while True:
        page = search(max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
