"""Images without annotations: a folder, with all below it, or a list of URIs."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from urllib.parse import unquote

from mrcnn.structures import Category
from pipelines.config import BuildConfig
from pipelines.records import ImageRecord, Images, Objects, Reject, SourceData, printable
from pipelines.sources.names import (
    OUTSIDE,
    SUFFIXES,
    image_ids,
    name_fault,
    names_sha256,
    plain_name,
    shown_uri,
    text_fault,
    unfollowed_folders,
)
from pipelines.storage import Store, open_store, read_uri, split_uri
from pipelines.storage_errors import plain_errors, without_secrets

LISTED_TWICE = "listed twice"
LOCAL = "file:"
SLASHES = re.compile("//+")
THIS_MACHINE = re.compile(r"file:(?://(?:localhost)?(?=/))?(/(?!/).*)")


@dataclass(frozen=True)
class ListedImages:
    """Images of a list: their names are full URIs, each of them read through the store of its own folder."""

    uri: str
    """Of the list"""

    @property
    def is_local(self) -> bool:
        """Its files may be anywhere."""
        return False

    def uri_of(self, name: str) -> str:
        """The name itself, as it may be shown."""
        return without_secrets(name)

    def read_bytes(self, name: str, at_most: int | None = None) -> bytes:
        """A whole file."""
        return read_uri(name, at_most)


def read_image_files(config: BuildConfig) -> SourceData:
    """Records of all images below `config.images`, or of all lines of the .txt file that it is.

    In a list, a path that is not absolute is relative to the list's folder, and empty lines do not count; a line that
    comes twice, or cannot be a file, is a reject. The files of a list are taken as unchanging. Raises FileNotFoundError
    where there are no images.
    """
    if is_list(config.images):
        return _read_list(config.images)
    images = open_store(config.images).check_folder()
    listed = dict(sorted(images.versions(follow_links=config.follow_links)))
    versions = {name: version for name, version in listed.items() if name.lower().endswith(SUFFIXES)}
    if not versions:
        raise FileNotFoundError(f"{images.uri} holds no images ({', '.join(SUFFIXES)}): give the folder that does")
    rejects = unfollowed_folders(images, follow_links=config.follow_links)
    source = named_images(images, list(versions), versions=versions, rejects=rejects)
    return replace(source, passed_over=tuple(name for name in listed if name not in versions))


def is_list(uri: str) -> bool:
    """Whether images are said to be those of a list: a file, where it is a local one, for a folder may be called so."""
    if not uri.endswith(".txt"):
        return False
    store = open_store(uri)
    return not (store.is_local and store.path.is_dir())


def named_images(
    images: Images,
    names: Sequence[str],
    *,
    categories: tuple[Category, ...] = (),
    annotation_files: Callable[[str], tuple[str, ...]] | None = None,
    rejects: Sequence[Reject] = (),
    versions: Mapping[str, str] = MappingProxyType({}),
) -> SourceData:
    """Records of differing names, with ids by `image_ids` and the files that `annotation_files` names for each, and the
    `versions` of all these files (`Store.versions`) where they are known. A name that cannot be used is a reject,
    besides those that are given. Annotations are counted by the tasks, if any."""
    records: list[ImageRecord] = []
    unusable = list(rejects)
    for id_, name in zip(image_ids(names), names, strict=True):
        fault = name_fault(name) if isinstance(images, Store) else text_fault(name)
        if fault is None:
            files = annotation_files(name) if annotation_files else ()
            version = ", ".join(versions.get(each, "") for each in (name, *files)) if versions else ""
            records.append(ImageRecord(id_, name, annotation_files=files, version=version))
        else:
            unusable.append(Reject(shown_uri(images, name), id_, "source", fault))
    return SourceData(
        images_at=images,
        categories=categories,
        records=records,
        rejects=unusable,
        images=len(names) + len(rejects),
        sha256=names_sha256([*(each.name for each in categories), *names]),
        annotations=None if annotation_files else 0,
    )


def no_objects(record: ImageRecord, files: Sequence[bytes], categories: Sequence[Category]) -> Objects:
    """Nothing is annotated here."""
    del record, files, categories
    return Objects()


def _read_list(uri: str) -> SourceData:
    names: dict[str, None] = {}  # in order
    rejects: list[Reject] = []
    for full, fault in listed_files(uri):
        if full in names:
            fault = LISTED_TWICE
        if fault is None:
            names[full] = None
        else:
            rejects.append(Reject(printable(full), None, "source", fault))
    store, name = split_uri(uri)
    return named_images(ListedImages(f"{store.uri}/{name}"), list(names), rejects=rejects)


def listed_files(uri: str) -> Iterator[tuple[str, str | None]]:
    """The files of a list by their full URIs (those on disk by their paths), line by line, each with the reason why it
    cannot be read, if so.

    Raises FileNotFoundError where there are none, ValueError for a file that is no text.
    """
    store, name = split_uri(uri)
    at, is_empty = 0, True
    with store.local_copy(name) as path, plain_errors(f"{store.uri}/{name}"), path.open("rb") as lines:
        for data in lines:
            line = _text(data if at else data.removeprefix(codecs.BOM_UTF8), uri, at)
            at += len(data)
            if line.strip():
                is_empty = False
                line = plain_name(_path_of(line) if line.startswith(LOCAL) else line)
                full = line if "://" in line or line.startswith("/") else f"{store.uri}/{line}"
                if full.startswith("/"):
                    full = SLASHES.sub("/", full)  # on a disk, not in a bucket, the same file
                yield full, _line_fault(line, full)
    if is_empty:
        raise FileNotFoundError(f"{uri} lists no images: write one URI a line")


def _path_of(uri: str) -> str:
    """Of a file:// URI, as RFC 8089 has them, and as others write them without escapes: then there is a file of the
    name as it stands. A URI of another machine stays what it is."""
    found = THIS_MACHINE.fullmatch(uri)
    if found is None or "%" not in found[1] or os.path.lexists(found[1]):
        return found[1] if found else uri
    return unquote(found[1], errors="surrogateescape")


def _text(line: bytes, uri: str, at: int) -> str:
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        at += error.start
        raise ValueError(f"{uri} is not UTF-8 (at byte {at}): give a text file of URIs, one a line") from None


def _line_fault(line: str, full: str) -> str | None:
    if line.startswith(LOCAL):
        return "not a URI that can be read: it names another machine, or no whole path: write file:///path"
    if line is not full and not line.startswith("/") and "://" not in line:
        return name_fault(line)
    folder, _, name = full.rpartition("/")
    if folder.endswith(":/"):
        return "not a URI that can be read: it names no file in a bucket"
    return name_fault(name) or _folder_fault(folder)


@lru_cache(maxsize=1024)
def _folder_fault(folder: str) -> str | None:
    try:
        open_store(folder or "/")
    except ValueError as error:
        return f"not a URI that can be read: {error}"
    return OUTSIDE if "\0" in folder else None
