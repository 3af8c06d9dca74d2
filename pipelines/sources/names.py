"""File names: which are images, which may be read, and the id of an image that has only a name."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from pipelines.records import Images
from pipelines.storage import Store, check_name

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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
    root, path = os.path.realpath(images.path), os.path.realpath(images.path / name)
    return os.path.commonpath([root, path]) != root


def image_ids(names: Sequence[str]) -> list[int]:
    """An id for each of some differing names, which depends on nothing but the name.

    It is the number that the file is called by (as COCO's files are); for others, and where several files have
    the same number, 62 bits of the name's SHA-256. Raises ValueError where two of these are the same.
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


def names_sha256(names: Iterable[str]) -> str:
    """Digest of a list of names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def _number(name: str) -> int | None:
    stem = PurePosixPath(name).stem
    return int(stem) if stem.isascii() and stem.isdigit() and len(stem) <= 18 else None


def _hashed(name: str) -> int:
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return HASHED | int.from_bytes(digest[:8], "big") >> 2


def printable(name: str) -> str:
    """The name as text that can be stored, whatever bytes it is on disk."""
    return name.encode(errors="backslashreplace").decode()


def shown_uri(images: Images, name: str) -> str:
    """URI of a file for a reject: of any name, also one that is never read."""
    return printable(f"{images.uri}/{name}" if isinstance(images, Store) else name)
