"""Files by URI: a local path or s3://bucket/prefix (or another scheme that fsspec knows), and errors in plain
words.

Endpoint and credentials come from the usual AWS_* variables (or AWS's own files), never from a URI.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

# They tell at INFO where they found which credentials.
for _name in ("botocore", "aiobotocore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

CONNECT_SECONDS = 3
READ_SECONDS = 60
ATTEMPTS = 4  # of a request, with exponential backoff: 500, 503, timeouts, dropped connections


@dataclass(frozen=True)
class Store:
    """A root folder. File names are relative to it, with forward slashes, and never lead out of it.

    Cheap to make and to pickle. All methods raise FileNotFoundError, PermissionError (credentials) or
    ValueError (unreachable endpoint, name that leads out of the root), each in one line that names the URI
    and the remedy.
    """

    uri: str
    """Without a trailing slash; an absolute path where it is local."""

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def path(self) -> Path:
        """The local folder."""
        assert self.is_local, f"{self.uri} is not local"
        return Path(self.uri)

    @property
    def _root(self) -> str:
        return self.uri if self.is_local else self.uri.split("://", 1)[1]

    @property
    def _fs(self) -> Any:
        return _filesystem("file" if self.is_local else self.uri.split("://", 1)[0])

    def uri_of(self, name: str) -> str:
        """Full URI of a file."""
        return f"{self.uri}/{check_name(name)}"

    def join(self, name: str) -> Store:
        """The store of a folder below."""
        return Store(self.uri_of(name))

    def read_bytes(self, name: str) -> bytes:
        """A whole file."""
        return self._call("cat_file", name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from byte `start` on: one ranged request. Threads may call it at once."""
        return self._call("cat_file", name, start=start, end=start + length)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self._call("size", name))

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return bool(self._call("exists", name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file, so that a reader sees all of it or none: rename on disk, a single PUT on S3."""
        if self.is_local:
            with self._replacing(name) as part:
                part.write_bytes(data)
        else:
            self._call("pipe_file", name, data)

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A local path to write a large file to; it gets its name here when the block ends without error."""
        if self.is_local:
            with self._replacing(name) as part:
                yield part
            return
        with tempfile.TemporaryDirectory(prefix="mrcnn-") as folder:
            part = Path(folder, "part")
            yield part
            with _plain_errors(self.uri_of(name)):
                self._fs.put_file(str(part), f"{self._root}/{name}")

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        target = Path(self.uri_of(name))
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        with _plain_errors(self.uri_of(name)):
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with _plain_errors(self.uri_of(name)):
                os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._call("rm_file", name)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all below it, if it is there."""
        if self.exists(name):
            self._call("rm", name, recursive=True)

    def list(self, suffixes: tuple[str, ...] = ()) -> Iterator[str]:
        """Names of all files below, folder by folder and sorted, hidden ones left out; empty if there is no
        folder.

        `suffixes` such as (".jpg", ".png") are compared without case. Streams: S3 pages of 1000, one local
        folder.
        """
        walk = self._list_s3() if self.uri.startswith("s3://") else self._list_folder("")
        for name in walk:
            hidden = any(part.startswith(".") for part in name.split("/"))
            if not hidden and (not suffixes or name.lower().endswith(suffixes)):
                yield name

    def _list_folder(self, folder: str) -> Iterator[str]:
        path = f"{self._root}/{folder}".rstrip("/")
        with _plain_errors(self.uri):
            if not self._fs.isdir(path):
                return
            entries = self._fs.ls(path, detail=True)
        names = [each["name"].rstrip("/").rsplit("/", 1)[-1] for each in entries]
        folders = {name for name, each in zip(names, entries, strict=True) if each["type"] == "directory"}
        for name in sorted(names):
            if name in folders:
                yield from self._list_folder(f"{folder}{name}/")
            else:
                yield f"{folder}{name}"

    def _list_s3(self) -> Iterator[str]:
        bucket, _, prefix = self._root.partition("/")
        prefix = f"{prefix}/" if prefix else ""
        more: dict[str, str] = {}
        while True:
            with _plain_errors(self.uri):
                page = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            yield from (
                each["Key"][len(prefix) :] for each in page.get("Contents", ()) if not each["Key"].endswith("/")
            )
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def check_folder(self) -> Store:
        """This store, if its folder (prefix) holds something; FileNotFoundError otherwise."""
        with _plain_errors(self.uri):
            found = self._fs.isdir(self._root)
        if not found:
            raise FileNotFoundError(f"there is no folder {self.uri}{_endpoint_hint(self.uri)}")
        return self

    def _call(self, method: str, name: str, *args: Any, **kwargs: Any) -> Any:
        path = f"{self._root}/{check_name(name)}"
        with _plain_errors(f"{self.uri}/{name}"):
            return getattr(self._fs, method)(path, *args, **kwargs)


def open_store(uri: str) -> Store:
    """The store of a folder. Raises ValueError for a scheme that is unknown or lacks its fsspec plug-in."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return Store(str(Path(rest if separator else uri).expanduser().absolute()))
    if "@" in rest.split("/")[0]:
        raise ValueError("a URI must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if not rest.strip("/"):
        raise ValueError(f"{uri!r} names no bucket: write {scheme}://bucket/prefix")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ValueError(f"{uri!r} needs a plug-in that is not installed: {error}") from None
    except ValueError:
        raise ValueError(f"{uri!r}: unknown scheme {scheme!r}: use a local path or s3://bucket/prefix") from None
    return Store(uri.rstrip("/"))


def split_uri(uri: str) -> tuple[Store, str]:
    """The folder of a file, and the file's name in it."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    if folder.endswith(":/"):
        raise ValueError(f"{uri!r} is a bucket, not a file")
    return open_store(folder or ("/" if uri.startswith("/") else ".")), name


def read_uri(uri: str) -> bytes:
    """A whole file by its URI."""
    store, name = split_uri(uri)
    return store.read_bytes(name)


def check_name(name: str) -> str:
    """A relative file name that stays below its root, or ValueError."""
    parts = name.split("/")
    if not name or name.startswith("/") or "://" in name or "\0" in name or ".." in parts:
        raise ValueError(f"file name {name!r} leads out of its folder: use a path relative to it, without '..'")
    return name


def _filesystem(scheme: str) -> Any:
    settings = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    return _filesystem_for(scheme, settings, os.getpid())


@functools.lru_cache(maxsize=8)
def _filesystem_for(scheme: str, settings: tuple[tuple[str, str], ...], process: int) -> Any:
    """One connection pool for each process and state of the environment, which fsspec's own cache ignores."""
    del process
    if scheme != "s3":
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    names = {name for name, _ in settings}
    custom = not names.isdisjoint({"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"})
    config: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        "max_pool_connections": 32,
    }
    if custom:  # bucket.127.0.0.1 is no host
        config["s3"] = {"addressing_style": "path"}
    return fsspec.filesystem("s3", config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)


@contextmanager
def _plain_errors(uri: str) -> Iterator[None]:
    """Turn what fsspec, botocore and the kernel raise into the three errors that `Store` promises."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FileNotFoundError(f"there is no file {uri}{_endpoint_hint(uri)}") from None
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound):
        raise PermissionError(f"no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except PermissionError as error:
        raise PermissionError(_refusal(uri, error)) from None
    except (BotoCoreError, ClientError, OSError, TimeoutError) as error:
        raise _other_error(uri, error) from None


def _refusal(uri: str, error: PermissionError) -> str:
    if not uri.startswith("s3://"):
        return f"no permission for {uri}: check its owner and mode"
    return f"{uri} was refused ({error}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"


def _other_error(uri: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return FileNotFoundError(f"there is no file {uri}: the name is too long")
    if isinstance(error, ParamValidationError):
        return ValueError(f"{uri} is not a valid URI: write s3://bucket/prefix")
    if not uri.startswith("s3://"):
        return ValueError(f"{uri} cannot be used: {error}")
    return ValueError(f"{uri} cannot be reached{_endpoint_hint(uri)}: {type(error).__name__}: {error}")


def _endpoint_hint(uri: str) -> str:
    if not uri.startswith("s3://"):
        return ""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return (
        f" at AWS_ENDPOINT_URL={endpoint.rpartition('@')[2]}" if endpoint else " on AWS (AWS_ENDPOINT_URL is not set)"
    )
