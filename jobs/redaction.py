"""Texts without credentials: for logs, for MLflow, and for files that many can read."""

from __future__ import annotations

import os

from pipelines.storage_errors import USERINFO

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def redact(text: str) -> str:
    """The text without the user and password of URIs and without the values of the usual secret variables."""
    text = USERINFO.sub("://", text)
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "***")
    return text


def in_one_line(error: BaseException) -> str:
    """What an exception says, in a line of at most 300 characters, without credentials."""
    text = redact(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
