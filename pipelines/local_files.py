"""Local files that appear whole: until then they have another name, which nobody takes for a finished file."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipelines.storage_errors import UnfitFileError, full_disk_told, plain_errors

UNOPENED = (errno.ELOOP, errno.ENXIO, errno.ENODEV)  # what stands by the name: links to themselves, sockets, no device
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # exFAT, some mounted buckets


@contextmanager
def nameless_file() -> Iterator[Path]:
    """A way to a temporary file that no folder lists: it goes with its process, however that ends."""
    folder = tempfile.gettempdir()
    with full_disk_told(Path(folder)), tempfile.TemporaryFile(dir=folder) as file:
        yield Path(f"/proc/self/fd/{file.fileno()}")


def read_whole(path: str, at_most: int | None = None) -> bytes:
    """The bytes of a file. Raises UnfitFileError for more than `at_most`, and for what is no file of a known size: a
    pipe that nobody writes to would never end, a device never be done."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in UNOPENED:
            raise
        raise UnfitFileError(path, f"not a regular file: {error.strerror}") from None
    with os.fdopen(opened, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnfitFileError(path, "not a regular file")
        check_bytes(path, status.st_size, at_most)
        return file.readall()


def check_bytes(uri: str, size: int, at_most: int | None) -> None:
    """Raise UnfitFileError where a file has more bytes than may be read."""
    if at_most is not None and size > at_most:
        raise UnfitFileError(uri, f"file too large: {size} bytes, the bound is {at_most}")


def open_to_write(path: Path, flags: int = 0) -> int:
    """Descriptor of a new or empty file, which is not truncated: when a file that was is closed, ext4 (auto_da_alloc)
    at once writes what the cache has of it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)


PART = f".*.{'[0-9a-f]' * 32}.part"  # others' files may end alike: those of a download beside it


def held_part(target: Path) -> tuple[Path, BinaryIO]:
    """A new part of a file, open and locked."""
    while True:
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        with plain_errors(str(target)):
            held = part.open("xb")
        lock(held, fcntl.LOCK_SH)
        if part.exists():
            return part, held
        held.close()  # taken for a leftover, and removed, before it was locked


def rename(part: Path, target: Path, *, replace: bool = True) -> bool:
    """Give a finished file its name; False where there is one already that is not to be replaced."""
    with plain_errors(str(target)):
        if replace:
            _replace(part, target)
            return True
        try:
            os.link(part, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS or target.exists():
                raise
            os.replace(part, target)
        return True


def _replace(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
    except IsADirectoryError:
        raise ValueError(
            f"{target} cannot be written, a folder has its name: remove it, then run the same command again"
        ) from None


def lock(file: BinaryIO, kind: int) -> bool:
    """Whether the lock was got. Where a file system has no locks nobody gets any, and leftovers stay."""
    try:
        fcntl.flock(file, kind)
    except OSError:
        return False
    return True


def remove_empty(folder: str) -> None:
    """Remove a folder if nothing is in it."""
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # another has removed it, or writes to it again
            raise
