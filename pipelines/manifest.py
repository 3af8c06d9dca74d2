"""manifest.json: what a folder of shards holds. Written last: a folder without one is not finished."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import xxhash

from mrcnn.structures import Category
from pipelines.schema import SCHEMA_VERSION
from pipelines.storage import Store

PROGRESS = "_progress"  # a folder beside it until all is done
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard file."""

    name: str
    rows: int
    bytes: int
    xxh128: str
    """Checksum of the file, as `xxhsum -H2` prints it: finds damage at a thirtieth of sha256's time, but not fraud."""
    portrait: str = ""
    """Of shards one bit a row, as hex digits: whether it is taller than wide. So training groups rows without reading
    them."""


@dataclass(frozen=True)
class RejectList:
    """One of the two lists of what was rejected."""

    name: str
    bytes: int
    xxh128: str
    """As of `ShardInfo`"""


def reject_list(name: str, data: bytes) -> RejectList:
    """What a manifest says of a list."""
    return RejectList(name, len(data), xxhash.xxh3_128(data).hexdigest())


class LostError(RuntimeError):
    """Something is neither a row nor a reject: a fault of this program, never of the data."""


def check_sum(what: str, inputs: int, used: int, rejected: int) -> None:
    """Raise LostError unless inputs = used + rejected."""
    if inputs != used + rejected:
        raise LostError(f"{inputs} {what} went in, {used} were used and {rejected} rejected: this is a bug, report it")


@dataclass(frozen=True)
class Totals:
    """images = rows + rejects, annotations = instances + rejected_annotations, where nothing is cut into tiles."""

    images: int
    rows: int
    rejects: int
    annotations: int
    instances: int
    rejected_annotations: int
    further_tiles: int = 0
    """Rows beyond the first of their image"""
    further_parts: int = 0
    """Instances beyond the first of their annotation: more tiles show it"""
    dropped_parts: int = 0
    """Of objects in tiles: left out, because a tile shows too little of them"""

    def __post_init__(self) -> None:
        check_sum("images", self.images, self.rows - self.further_tiles, self.rejects)
        check_sum("annotations", self.annotations, self.instances - self.further_parts, self.rejected_annotations)


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json."""

    categories: tuple[Category, ...]
    """Label l is `categories[l - 1]`."""
    build: dict[str, Any]
    """The settings that the shards depend on, and a checksum of the annotations."""
    shards: tuple[ShardInfo, ...]
    totals: Totals
    schema_version: int = SCHEMA_VERSION
    reject_lists: tuple[RejectList, ...] = ()
    """None in manifests from before they were stated"""

    @cached_property
    def digest(self) -> str:
        """sha256 of all but the lists of rejects: the identity of the data set. (Lists are Parquet, which names the
        version of its writer.)"""
        return _digest(self._content())

    def _content(self) -> dict[str, Any]:
        categories = [{"label": i, **_category(each)} for i, each in enumerate(self.categories, start=1)]
        return {
            "schema_version": self.schema_version,
            "categories": categories,
            "build": self.build,
            "totals": asdict(self.totals),
            "shards": [asdict(each) for each in self.shards],
        }

    def write(self, store: Store) -> None:
        """Write manifest.json, whole or not at all."""
        lists = [asdict(each) for each in self.reject_lists]
        content = {"digest": self.digest, **self._content(), "reject_lists": lists}
        store.write_bytes(FILE_NAME, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, store: Store) -> Manifest:
        """Read manifest.json. FileNotFoundError if there is none, ValueError if it is damaged or too new."""
        try:
            data = store.read_bytes(FILE_NAME)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{store.uri} holds no finished shards (no {FILE_NAME}): run `mrcnn build-data` first"
            ) from None
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _damaged(store, error) from error
        try:
            return cls._parse(content, store.uri)
        except (KeyError, TypeError, LostError) as error:
            raise _damaged(store, error) from error

    @classmethod
    def _parse(cls, content: dict[str, Any], uri: str) -> Manifest:
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"{uri} has schema version {content['schema_version']}, this program reads {SCHEMA_VERSION}: "
                "build the data again, or use the version that built it"
            )
        manifest = cls(
            categories=tuple(
                Category(id=each["id"], name=each["name"], keypoints=tuple(each.get("keypoints", ())))
                for each in content["categories"]
            ),
            build=content["build"],
            shards=tuple(ShardInfo(**each) for each in content["shards"]),
            totals=Totals(**content["totals"]),
            reject_lists=tuple(RejectList(**each) for each in content.get("reject_lists", ())),
        )
        written = {key: value for key, value in content.items() if key not in ("digest", "reject_lists")}
        if not manifest.digest == _digest(written) == content["digest"]:  # of what was not parsed, too
            raise ValueError(f"{uri}/{FILE_NAME} was changed after it was written: build the data again")
        return manifest


def _damaged(store: Store, error: Exception) -> ValueError:
    return ValueError(f"{store.uri}/{FILE_NAME} is damaged ({type(error).__name__}): build the data again")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _category(category: Category) -> dict[str, Any]:
    """Without keypoints where there are none, as in manifests from before there were any."""
    content = asdict(category)
    return content if category.keypoints else {key: content[key] for key in ("id", "name")}
