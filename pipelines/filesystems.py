"""Clients of file systems by scheme: how long they wait and how often they try."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from typing import Any

import aiohttp
import fsspec
from botocore.exceptions import ClientError

from pipelines.http_session import BoundedSession
from pipelines.storage_errors import UnfitFileError
from pipelines.web_files import WebFiles

# They tell at INFO where they found which credentials.
for _name in ("botocore", "aiobotocore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

WEB = ("http", "https")
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
CA_BUNDLE = "AWS_CA_BUNDLE"
IN_REQUESTS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION",
    "AWS_DEFAULT_REGION", CA_BUNDLE,
)  # fmt: skip
ENDPOINT = re.compile(r"https?://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?(/[^\s?#@]*)?")
CONNECT_SECONDS = 3
HURRIED_SECONDS = 4.0
READ_SECONDS = 20.0  # without a single byte; MRCNN_S3_READ_SECONDS sets another bound
ATTEMPTS = 4  # of a request, with exponential backoff: 500, 503, timeouts, dropped connections
BODY_ATTEMPTS = 5  # of reading what an answer holds, each with requests of its own


def filesystem(scheme: str, *, hurried: bool = False) -> Any:
    """fsspec's file system for a scheme, with the settings of the environment; `hurried` ones give up within seconds.

    Raises ValueError for a setting that is nonsense, UnfitFileError for a scheme that cannot be used by URIs alone.
    """
    settings = sorted((key, value) for key, value in os.environ.items() if key.startswith(("AWS_", "MRCNN_S3_")))
    return _filesystem_for(scheme, tuple(settings), os.getpid(), hurried)


@functools.lru_cache(maxsize=8)
def _filesystem_for(scheme: str, settings: tuple[tuple[str, str], ...], process: int, hurried: bool) -> Any:
    """One connection pool for each process and state of the environment, which fsspec's own cache ignores."""
    del process
    if scheme in WEB:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        client = {"timeout": timeout, "trust_env": True}  # proxies, as botocore takes them
        return WebFiles(client_kwargs=client, encoded=True, skip_instance_cache=True)
    if scheme != "s3":
        if _needs_more_than_uris(scheme):  # looked up, not tried: what fsspec has half made it tells of when it goes
            raise UnfitFileError(f"{scheme}://...", "such a file system needs more than a URI")
        try:
            return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
        except (TypeError, AttributeError):  # it lacks an argument after all
            raise UnfitFileError(f"{scheme}://...", "such a file system needs more than a URI") from None
    for name, value in settings:
        if name in IN_REQUESTS:
            _check_setting(name, value)
    endpoints = [(name, value) for name, value in settings if name in ENDPOINTS and value]
    for name, value in endpoints:
        _check_endpoint(name, value)
    config: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": _read_seconds(HURRIED_SECONDS if hurried else READ_SECONDS),
        "retries": {"mode": "standard", "total_max_attempts": 2 if hurried else ATTEMPTS},
        "max_pool_connections": 32,
        "http_session_cls": BoundedSession,
    }
    if endpoints:  # bucket.127.0.0.1 is no host
        config["s3"] = {"addressing_style": "path"}
    made = fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)
    made.retries = 1  # botocore has tried again what s3fs would
    return made


def _needs_more_than_uris(scheme: str) -> bool:
    """Whether its file system cannot be made without arguments, such as a host."""
    arguments = [*inspect.signature(fsspec.get_filesystem_class(scheme).__init__).parameters.values()][1:]
    return any(each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD for each in arguments)


def _check_setting(name: str, value: str) -> None:
    """Raise ValueError, without the value, which may be secret, for what no server would take."""
    if not value.isprintable():
        raise ValueError(f"{name} holds a line break, or other control characters: set it without them")
    if name == CA_BUNDLE and value and not os.path.exists(value):
        raise ValueError(f"{name} is {value!r}, where there is no file: name one of certificates, or unset it")


def _check_endpoint(name: str, value: str) -> None:
    """Raise ValueError, without what may be secret in it, for what is no endpoint."""
    if not ENDPOINT.fullmatch(value):
        shown = "" if "@" in value or "?" in value else f" {value!r}"
        raise ValueError(
            f"{name}{shown} is not the address of a server: write http://host:port or https://host, and credentials "
            "into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _read_seconds(default: float) -> float:
    value = os.environ.get("MRCNN_S3_READ_SECONDS", default)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"MRCNN_S3_READ_SECONDS is {value!r}, but must be seconds above 0: {READ_SECONDS:g} by default"
        )
    return seconds


def is_conflict(error: OSError) -> bool:
    """Whether this is what an exclusive write raises where there is such a file already."""
    if isinstance(error, FileExistsError):
        return True
    answer = error.__cause__  # s3fs has no word of its own for a server that answers 412
    return isinstance(answer, ClientError) and answer.response["ResponseMetadata"]["HTTPStatusCode"] == 412
