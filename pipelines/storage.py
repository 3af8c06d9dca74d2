"""Files by URI: a local path or s3://bucket/prefix (or another scheme that fsspec knows), and errors in plain
words.

Endpoint and credentials come from the usual AWS_* variables (or AWS's own files), never from a URI.
"""

from __future__ import annotations

import fcntl
import os
import re
import string
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import fsspec

from pipelines import s3_objects
from pipelines.filesystems import ATTEMPTS, WEB, filesystem, is_conflict
from pipelines.listing import Listed, Walk, fitting, linked_folders
from pipelines.local_files import PART, held_part, lock, nameless_file, read_whole, remove_empty, rename
from pipelines.storage_errors import (
    LOGIN,
    CredentialsError,
    FileRefusedError,
    OddAnswerError,
    UnfitFileError,
    UnreachableError,
    endpoint_hint,
    full_disk_told,
    make_folder,
    plain_errors,
    without_secrets,
)

DELETED_AT_ONCE = 1000  # S3's bound
REMOVALS = 5  # of a folder that are borne while one file is written there
S3_OF_OTHERS = ("s3a", "s3n")  # Hadoop's words for it, which fsspec knows, too: it would be used with other settings
NO_PLACES = ("blockcache", "cached", "data", "filecache", "simplecache")  # fsspec's caches of others; bytes in a URI
BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")  # as botocore has it
NEARLY = ("s3:", "file:")  # how mistyped URIs begin, which would be folders of such names here
BLOCK = 8 * 2**20  # bytes of a request for a part of a large file
CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".png": "image/png"}  # browsers show them, and save others


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
        """As fsspec names it: without its scheme, but a web address with it."""
        return self.uri if self._scheme in ("file", *WEB) else self.uri.split("://", 1)[1]

    @property
    def _scheme(self) -> str:
        return "file" if self.is_local else self.uri.split("://", 1)[0]

    @property
    def _fs(self) -> Any:
        return filesystem(self._scheme)

    def uri_of(self, name: str) -> str:
        """Full URI of a file."""
        return f"{self.uri.rstrip('/')}/{check_name(name)}"  # of a local root, too

    def join(self, name: str) -> Store:
        """The store of a folder below."""
        return Store(self.uri_of(name))

    def read_bytes(self, name: str, at_most: int | None = None) -> bytes:
        """A whole file. Raises FileRefusedError where it alone is refused, UnfitFileError where it is no file, or (on
        disk, S3 and web servers) one of more than `at_most` bytes."""
        try:
            if self.uri.startswith("s3://"):
                return s3_objects.get(f"{self._root}/{check_name(name)}", at_most)
            if not self.is_local:
                return self._call("cat_file", name, **({"at_most": at_most} if self._scheme in WEB else {}))
            with plain_errors(self.uri_of(name)):  # an image a millisecond: fsspec takes as long as the disk
                return read_whole(self.uri_of(name), at_most)
        except CredentialsError:
            raise
        except PermissionError as error:
            if self._scheme not in WEB:  # which has no folders
                self.check_folder()
            raise FileRefusedError(str(error)) from None

    def read_range(self, name: str, start: int, length: int, etag: str = "") -> bytes:
        """`length` bytes of a file from byte `start` on: one ranged request. Threads may call it at once. Raises
        ChangedFileError where a file on S3 is not that of this `etag` any more."""
        if self.uri.startswith("s3://"):
            return s3_objects.get_range(f"{self._root}/{check_name(name)}", start, length, etag)
        return self._call("cat_file", name, start=start, end=start + length)

    def read_blocks(self, name: str, length: int = BLOCK) -> Iterator[bytes]:
        """A whole file in ranges of `length` bytes, the last one shorter; from a web server, which may know no ranges,
        in one piece."""
        if self._scheme in WEB:
            yield self.read_bytes(name)
            return
        size = self.size(name)
        for start in range(0, size, length):
            yield self.read_range(name, start, min(length, size - start))

    def size(self, name: str) -> int:
        """Bytes of a file; 0 where a web server does not say."""
        return int(self._call("size", name) or 0)

    def size_and_etag(self, name: str) -> tuple[int, str]:
        """Bytes of a file, 0 where a web server does not say; and on S3 what changes as the file does."""
        found = self._call("info", name)
        return int(found["size"] or 0), str(found.get("ETag", ""))

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return bool(self._call("exists", name))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file, so that a reader sees all of it or none: rename on disk, a single PUT on S3."""
        if self.is_local:
            self._write_local(name, data, replace=True)
        else:
            content_type = CONTENT_TYPES.get(PurePosixPath(name).suffix) if self.uri.startswith("s3://") else None
            self._call("pipe_file", name, data, **({"ContentType": content_type} if content_type else {}))

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Write a whole small file unless there is one already; whether it was written. One of many writers wins."""
        if self.is_local:
            return self._write_local(name, data, replace=False)
        with plain_errors(self.uri_of(name)):
            try:
                self._fs.pipe_file(f"{self._root}/{check_name(name)}", data, mode="create")
            except OSError as error:
                if not is_conflict(error):
                    raise
                return False
        return True

    def _write_local(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Another process may remove the folder, with what is being written there, at any moment: then it is made
        again, a few times."""
        for _ in range(REMOVALS):
            with suppress(FileNotFoundError), self._part(name) as part:
                part.write_bytes(data)
                return rename(part, self.path / name, replace=replace)
        with self._part(name) as part:
            part.write_bytes(data)
            return rename(part, self.path / name, replace=replace)

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A local path to write a large file to; it gets its name here when the block ends without error.

        On S3 it is one PUT (up to 5 GB), sent from the disk: nothing is left there by a writer that dies.
        """
        if self.is_local:
            with self._part(name) as part:
                yield part
                rename(part, self.path / name)
            return
        with nameless_file() as part:
            yield part
            path = f"{self._root}/{check_name(name)}"
            if self.uri.startswith("s3://"):
                s3_objects.put(part, path)
                return
            with plain_errors(self.uri_of(name)):
                self._fs.put_file(str(part), path)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A file to read, by its local path: itself, or a copy that goes with the block."""
        if self.is_local:
            yield Path(self.uri_of(name))
            return
        with nameless_file() as copy:
            with copy.open("wb") as file:
                file.writelines(self.read_blocks(name))
            yield copy

    @contextmanager
    def _part(self, name: str) -> Iterator[Path]:
        """A hidden file beside the one that it is to become. Its lock, which ends with its writer, is how
        `remove_leftovers` knows that nobody writes it any more."""
        target = Path(self.uri_of(name))
        make_folder(target.parent)
        part, held = held_part(target)
        try:
            with held, full_disk_told(target):
                yield part
        finally:
            part.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what writers that were killed have left in this very folder, unseen. Living ones lose nothing."""
        for part in self.path.glob(PART) if self.is_local else ():
            with suppress(FileNotFoundError), part.open("rb") as held:
                if lock(held, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    part.unlink()

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._call("rm_file", name)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all below it, if it is there. Others may do so at the same time."""
        if not self.is_local:  # not fsspec's `rm`, which takes out[1] for a pattern that fits out1
            store = self.join(name)
            found = [file for file, _ in store.entries(hidden=True)]
            for start in range(0, len(found), DELETED_AT_ONCE):
                store._remove_files(found[start : start + DELETED_AT_ONCE])
            return
        with plain_errors(self.uri_of(name)):
            for folder, _, files in os.walk(self.uri_of(name), topdown=False):
                for file in files:
                    Path(folder, file).unlink(missing_ok=True)
                remove_empty(folder)

    def remove_empty_folders(self, name: str) -> None:
        """Remove a local folder with those below it, but none that a file is in. Elsewhere folders are but names."""
        with plain_errors(self.uri_of(name)):
            for folder, _, _ in os.walk(self.uri_of(name), topdown=False) if self.is_local else ():
                remove_empty(folder)

    def _remove_files(self, names: Sequence[str]) -> None:
        if not self.uri.startswith("s3://"):
            for name in names:
                with suppress(FileNotFoundError):
                    self.remove(name)
            return
        bucket, _, prefix = self._root.partition("/")
        keys = {"Objects": [{"Key": f"{prefix}/{name}"} for name in names], "Quiet": True}
        with plain_errors(self.uri):
            answer = self._fs.call_s3("delete_objects", Bucket=bucket, Delete=keys)
        for error in answer.get("Errors", ()):
            kind = PermissionError if error.get("Code") == "AccessDenied" else UnreachableError
            told = f"{error.get('Key')} cannot be removed from {self.uri}: {error.get('Message')}"
            raise kind(f"{told}: run the same command again, with credentials that may delete there")

    def list(self, suffixes: tuple[str, ...] = ()) -> Iterator[str]:
        """Names of all files below, folder by folder and sorted, hidden ones left out; empty if there is no
        folder.

        `suffixes` such as (".jpg", ".png") are compared without case. Links to folders are not followed. Streams: S3
        pages of 1000, one local folder.
        """
        return (name for name, _ in self.entries(suffixes))

    def linked_folders(self) -> Iterator[str]:
        """Names of the links to local folders elsewhere, sorted, hidden ones left out: what `list` does not follow."""
        return linked_folders(self.uri) if self.is_local else iter(())

    def entries(self, suffixes: tuple[str, ...] = (), *, hidden: bool = False) -> Iterator[tuple[str, int]]:
        """Names as in `list`, each with its bytes; with the hidden ones where they are wanted."""
        return (each[:2] for each in fitting(self._walk(hidden=hidden), suffixes, hidden=hidden))

    def files(self) -> Iterator[tuple[str, int]]:
        """Entries of this very folder: those below may be many, or others' that cannot be listed."""
        return (each[:2] for each in fitting(self._walk(below=False), (), hidden=False))

    def versions(self, suffixes: tuple[str, ...] = (), *, follow_links: bool = False) -> Iterator[tuple[str, str]]:
        """Names as in `list`, each with what changes as its file does, so far as the listing knows: its bytes, and on
        disk its time, on S3 its ETag. With `follow_links` local folders elsewhere that links lead to are listed, too,
        each once."""
        listed = fitting(self._walk(follow_links=follow_links and self.is_local), suffixes, hidden=False)
        return ((name, f"{size} {change}") for name, size, change in listed)

    def _walk(self, *, below: bool = True, follow_links: bool = False, hidden: bool = False) -> Iterator[Listed]:
        """All files, those in hidden folders of a disk if they are wanted; of this very folder alone where `below` is
        false."""
        if self.uri.startswith("s3://"):
            return s3_objects.listed(self._root, below=below)
        return iter(Walk(self._fs, self._root, self.uri, below=below, follow_links=follow_links, hidden=hidden))

    def check_answers(self) -> Store:
        """This store, if its endpoint answers and takes the credentials, whether or not the folder is there. An S3
        endpoint that is down or silent is told within seconds, before any work."""
        if self.uri.startswith("s3://"):
            bucket, _, prefix = f"{self._root}/".partition("/")  # as it is listed later: a policy may allow just that
            with plain_errors(self.uri):
                filesystem("s3", hurried=True).call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return self

    def check_folder(self) -> Store:
        """This store, if its folder (prefix) holds something; FileNotFoundError otherwise."""
        with plain_errors(self.uri):
            found = self._fs.isdir(self._root)
        if not found:
            raise FileNotFoundError(f"there is no folder {self.uri}{endpoint_hint(self.uri)}")
        return self

    def _call(self, method: str, name: str, *args: Any, **kwargs: Any) -> Any:
        path = f"{self._root}/{check_name(name)}"
        if self._scheme in WEB:  # what is escaped stays as it is: it may be signed
            path = quote(path, safe=string.punctuation)
        for attempt in range(1, ATTEMPTS if self._scheme in WEB else 1):  # of which fsspec asks once
            with suppress(UnreachableError), plain_errors(f"{self.uri}/{name}"):
                return getattr(self._fs, method)(path, *args, **kwargs)
            time.sleep(0.1 * 2**attempt)
        try:
            with plain_errors(f"{self.uri}/{name}"):
                return getattr(self._fs, method)(path, *args, **kwargs)
        except OddAnswerError as error:
            raise UnfitFileError(without_secrets(f"{self.uri}/{name}"), error.reason) from None


def open_store(uri: str) -> Store:
    """The store of a folder. Raises ValueError for a scheme that is unknown or lacks its fsspec plug-in."""
    scheme, separator, rest = uri.partition("://")
    if scheme in S3_OF_OTHERS:
        return open_store(f"s3{separator}{rest}")
    if not separator or scheme == "file":
        return _local_store(rest if separator else uri)
    shown = without_secrets(uri)
    if LOGIN.match(uri):
        raise ValueError("a URI must not hold credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    if not rest.strip("/"):
        raise ValueError(f"{shown!r} names no bucket: write {scheme}://bucket/prefix")
    if scheme in NO_PLACES:
        raise ValueError(f"{shown!r}: there are no files at {scheme}:// itself: use a local path or s3://bucket/prefix")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ValueError(f"{shown!r} needs a plug-in that is not installed: {error}") from None
    except ValueError:
        raise ValueError(f"{shown!r}: unknown scheme {scheme!r}: use a local path or s3://bucket/prefix") from None
    if not _has_host(scheme, rest):
        raise ValueError(f"{shown!r} names no {'host' if scheme in WEB else 'bucket'} that there can be: mend it")
    return Store(uri.rstrip("/"))


def _has_host(scheme: str, rest: str) -> bool:
    """Whether what stands first can be a bucket on S3, or a web server: what asks for it would raise whatever."""
    if scheme == "s3":
        bucket = rest.partition("/")[0]
        return bool(BUCKET.fullmatch(bucket)) or bucket.startswith("arn:")
    if scheme not in WEB:
        return True
    try:
        address = urlsplit(f"{scheme}://{rest}")
        host = address.hostname or ""
        return bool(host) and (":" in host or bool(host.encode("idna"))) and address.port != 0
    except ValueError:  # of the port, of brackets, of what is no name by IDNA
        return False


def _local_store(path: str) -> Store:
    if not path.strip() or path.startswith(NEARLY):
        raise ValueError(f"{path!r} is no folder: write a local path or s3://bucket/prefix")
    try:
        return Store(str(Path(path).expanduser().absolute()))
    except RuntimeError:
        raise ValueError(f"{path!r} is no folder: there is no such user's home") from None


def split_uri(uri: str) -> tuple[Store, str]:
    """The folder of a file, and the file's name in it."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    if folder.endswith(":/"):
        raise ValueError(f"{uri!r} is a bucket, not a file")
    return open_store(folder or ("/" if uri.startswith("/") else ".")), name


def read_uri(uri: str, at_most: int | None = None) -> bytes:
    """A whole file by its URI, as `Store.read_bytes`."""
    store, name = split_uri(uri)
    return store.read_bytes(name, at_most)


def check_name(name: str) -> str:
    """A relative file name that stays below its root, or ValueError."""
    parts = name.split("/")
    if not name or name.startswith("/") or "://" in name or "\0" in name or ".." in parts:
        raise ValueError(f"file name {name!r} leads out of its folder: use a path relative to it, without '..'")
    return name
