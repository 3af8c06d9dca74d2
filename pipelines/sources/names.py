"""File names: which are images, which may be read, and the id of an image that has only a name."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, islice
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pipelines.records import ImageRecord, Images, Reject, printable
from pipelines.storage import Store, check_name
from pipelines.storage_errors import without_secrets

# What is called otherwise is no image to any source, neither a row nor a reject: a bare folder's files are told of.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".tga", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
OUTSIDE = "file name leads out of the image folder"
LINK_OUTSIDE = "a symbolic link leads out of the image folder"
HASHED = 1 << 62  # set in hashed ids, and larger than any number of 18 digits


def name_fault(name: str) -> str | None:
    """Why a file of this name below a folder is not read: a name that leads out of it, or is no text."""
    try:
        check_name(name)
    except ValueError:
        return OUTSIDE
    return text_fault(name)


def plain_name(name: str) -> str:
    """A name or URI without parts that are a dot, which disks pass over and object stores do not know."""
    return "/".join(part for part in name.split("/") if part != ".")


def text_fault(name: str) -> str | None:
    """Why a name cannot be stored: bytes on disk, or escapes in JSON, that are not Unicode."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "file name is not Unicode"
    return None


def links_outside(images: Images, name: str) -> bool:
    """Whether the name of a local file leads out of its folder by symbolic links, which the name does not show.

    Who can write to the folder (an archive that was unpacked there) could otherwise have any file of this machine read.
    """
    if not isinstance(images, Store) or not images.is_local:
        return False
    parts = name.split("/")
    below = islice(accumulate(parts, os.path.join, initial=images.uri), 1, None)  # as they are opened
    if ".." not in parts and not any(map(_may_be_link, below)):  # as nearly always, and soon found out
        return False
    root, path = os.path.realpath(images.path), os.path.realpath(images.path / name)
    return os.path.commonpath([root, path]) != root


def _may_be_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return True


def unfollowed_folders(images: Store, *, follow_links: bool) -> list[Reject]:
    """A reject for each link to a folder elsewhere, unless these are followed: what is in it is not looked at."""
    links = () if follow_links else images.linked_folders()
    return [Reject(shown_uri(images, name), None, "source", LINK_OUTSIDE) for name in links]


def image_ids(names: Sequence[str]) -> list[int]:
    """An id for each of some differing names, in any order.

    It is the number that the file is called by (as COCO's files are), so long as no other file is called by the same;
    if not, 62 bits of the name's SHA-256. Raises ValueError where two of these are the same.
    """
    numbers = [_number(name) for name in names]
    times = Counter(numbers)
    ids = [
        _hashed(name) if number is None or times[number] > 1 else number
        for name, number in zip(names, numbers, strict=True)
    ]
    if len(set(ids)) < len(ids):
        seen: dict[int, str] = {}
        for id_, name in zip(ids, names, strict=True):
            if seen.setdefault(id_, name) != name:
                raise ValueError(f"{seen[id_]} and {name} get the same image id, {id_}: rename one of them")
    return ids


class ImageIds:
    """`image_ids` for names that are too many to be held: first `add` each, then ask for each.

    A name takes 16 bytes of memory, and some 60 while all are sorted for the first answer. The same name may be added
    twice; then it `repeats`, as does, once in 10^5 lists of ten million, another name.
    """

    def __init__(self) -> None:
        self._hashes, self._numbers = array("q"), array("q")

    def add(self, name: str) -> None:
        """Count a name. All are counted before the first is asked for."""
        number = _number(name)
        self._hashes.append(_hashed(name))
        self._numbers.append(-1 if number is None else number)

    def id_of(self, name: str) -> int:
        """The id of a name that was added."""
        number = _number(name)
        return _hashed(name) if number is None or _is_in(number, self._shared_numbers) else number

    def repeats(self, name: str) -> bool:
        """Whether the name, or another with the same hash, was added more than once."""
        return _is_in(_hashed(name), self._shared_hashes)

    @cached_property
    def _shared_hashes(self) -> NDArray[np.int64]:
        return _doubles(np.asarray(self._hashes))

    @cached_property
    def _shared_numbers(self) -> NDArray[np.int64]:
        """Numbers of more than one name, -1 for none among them perhaps."""
        _, first = np.unique(np.asarray(self._hashes), return_index=True)
        return _doubles(np.asarray(self._numbers)[first])


def _doubles(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those that come more than once, sorted."""
    ordered = np.sort(values)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _is_in(value: int, ordered: NDArray[np.int64]) -> bool:
    place = int(np.searchsorted(ordered, value))
    return place < len(ordered) and int(ordered[place]) == value


def names_sha256(names: Iterable[str]) -> str:
    """Digest of a list of names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(printable(name).encode() + b"\n")
    return digest.hexdigest()


def versions_sha256(records: Iterable[ImageRecord]) -> str:
    """Digest of the records' versions; empty where they have none."""
    versions = [record.version for record in records]
    return names_sha256(versions) if any(versions) else ""


def _number(name: str) -> int | None:
    stem = PurePosixPath(name).stem
    return int(stem) if stem.isascii() and stem.isdigit() and len(stem) <= 18 else None


def _hashed(name: str) -> int:
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return HASHED | int.from_bytes(digest[:8], "big") >> 2


def shown_uri(images: Images, name: str) -> str:
    """URI of a file for a reject: of any name, also one that is never read."""
    return printable(f"{images.uri}/{name}" if isinstance(images, Store) else without_secrets(name))
