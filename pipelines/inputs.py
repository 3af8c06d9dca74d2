"""What is predicted: the images of a folder, the files of a list, or the rows of shards; listed, never held.

Names go from the storage into a temporary file of the driver, and from there in chunks to the output's storage. What
the driver has in memory is one page of the listing (on disk one folder), one chunk, and 16 bytes for each name
(`ImageIds`). Of shards it has their manifest alone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import ShardDataset
from pipelines.manifest import FILE_NAME
from pipelines.pixels import DecodeError
from pipelines.records import Images, Reject, printable
from pipelines.sources.image_files import LISTED_TWICE, ListedImages, is_list, listed_files
from pipelines.sources.names import LINK_OUTSIDE, SUFFIXES, ImageIds, name_fault, names_sha256, shown_uri
from pipelines.sources.reading import read_file
from pipelines.stages import Stopwatch
from pipelines.storage import Store, open_store, split_uri
from pipelines.transforms import decode


class Input(NamedTuple):
    """One image that is to be predicted."""

    name: str
    """Of its file, or the number of its row in the shards"""
    image_id: int | None
    """None where only the row has it, or a name cannot be used"""
    fault: str = ""
    """Why it cannot be used, where the name alone shows it"""


@dataclass(frozen=True)
class Chunk:
    """Consecutive inputs, which become one part of the output."""

    number: int
    inputs: list[Input]
    versions_sha256: str = ""
    """Of their files (`Store.versions`); empty where nothing is known of these"""

    def to_json(self) -> str:
        """For a file on the storage."""
        return json.dumps({"inputs": self.inputs, "versions_sha256": self.versions_sha256})

    @classmethod
    def from_json(cls, number: int, text: bytes) -> Chunk:
        """The inverse of `to_json`."""
        content = json.loads(text)
        return cls(number, [Input(*each) for each in content["inputs"]], content["versions_sha256"])


@dataclass(frozen=True)
class Picture:
    """One image, decoded."""

    image_id: int
    uri: str
    pixels: NDArray[np.uint8]
    source_size: tuple[int, int]
    """Height and width of the original, in whose pixels the results are"""


class Reader(Protocol):
    """Reads inputs; threads may do so at once."""

    def picture_name(self, item: Input) -> str:
        """A file name for what is drawn of an input, without suffix and different for each"""

    def read(self, item: Input, watch: Stopwatch) -> Picture | Reject:
        """The image, or why there is none. Errors of the store itself (credentials, no connection) are raised."""


class Inputs(Protocol):
    """All that is to be predicted, in an order of its own that never changes."""

    uri: str

    @property
    def count(self) -> int:
        """How many inputs there are"""

    @property
    def sha256(self) -> str:
        """Of all names, or of the shards' manifest"""

    @property
    def reader(self) -> Reader:
        """What reads them, on any machine"""

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All inputs, `size` at a time; to be gone through by one at a time."""


def open_inputs(uri: str, *, max_pixels: int) -> Inputs:
    """List the images below a folder, or of a .txt file of URIs, or take the rows of a folder of shards.

    Raises FileNotFoundError where there are none, PermissionError or ValueError where they cannot be listed.
    """
    if is_list(uri):
        store, name = split_uri(uri)
        listed = ListedImages(f"{store.uri}/{name}")
        inputs = NamedInputs(FileReader(listed, max_pixels))
        for full, fault in listed_files(uri):
            inputs.add(full, fault=fault or "")
        return inputs
    folder = open_store(uri).check_folder()
    return ShardInputs(folder.uri) if _holds_shards(folder) else _files_below(folder, max_pixels)


def _holds_shards(folder: Store) -> bool:
    """A folder of images may have a manifest.json, too."""
    if not folder.exists(FILE_NAME):
        return False
    try:
        content = json.loads(folder.read_bytes(FILE_NAME))
    except ValueError:
        return False
    return isinstance(content, dict) and {"shards", "categories"} <= content.keys()


def _files_below(folder: Store, max_pixels: int) -> NamedInputs:
    inputs = NamedInputs(FileReader(folder, max_pixels))
    for name, version in folder.versions(SUFFIXES):
        inputs.add(name, version=version, fault=name_fault(name) or "")
    if not inputs.count:
        raise FileNotFoundError(f"{folder.uri} holds no images ({', '.join(SUFFIXES)}): give the folder that does")
    for name in folder.linked_folders():
        inputs.add(name, fault=LINK_OUTSIDE)
    return inputs


class NamedInputs:
    """Files by their names."""

    def __init__(self, reader: FileReader) -> None:
        self.reader, self.uri, self.count = reader, reader.images.uri, 0
        self._ids, self._digest = ImageIds(), hashlib.sha256()
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it goes with this object)
        weakref.finalize(self, self._file.close)

    def add(self, name: str, *, version: str = "", fault: str = "") -> None:
        """One more, before the first chunk is asked for."""
        self._file.write(json.dumps([name, version, fault]) + "\n")
        self._digest.update(printable(name).encode() + b"\n")
        self.count += 1
        if not fault:
            self._ids.add(name)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def chunks(self, size: int) -> Iterator[Chunk]:
        self._file.seek(0)
        seen: dict[int, str] = {}  # of those that repeat
        for number in range(-(-self.count // size)):
            entries = [json.loads(line) for line in islice(self._file, size)]
            versions = [version for _, version, _ in entries]
            digest = names_sha256(versions) if any(versions) else ""
            yield Chunk(number, [self._input(name, fault, seen) for name, _, fault in entries], digest)

    def _input(self, name: str, fault: str, seen: dict[int, str]) -> Input:
        if fault:
            return Input(name, None, fault)
        id_ = self._ids.id_of(name)
        if self._ids.repeats(name):
            if seen.get(id_) == name:
                return Input(name, None, LISTED_TWICE)
            if id_ in seen:
                raise ValueError(f"{seen[id_]} and {name} get the same image id, {id_}: rename one of them")
            seen[id_] = name
        return Input(name, id_)


class ShardInputs:
    """Rows of shards, as `mrcnn build-data` makes them."""

    def __init__(self, uri: str) -> None:
        self.reader = ShardReader(uri)
        self.uri, manifest = self.reader.dataset.uri, self.reader.dataset.manifest
        if manifest.totals.further_tiles:
            raise ValueError(f"{uri} holds tiles, not whole images: give the images themselves, and --tile")
        if not len(self.reader.dataset):
            raise FileNotFoundError(f"{uri} holds shards without a row: give those that have some")
        self.count, self.sha256 = len(self.reader.dataset), manifest.digest

    def chunks(self, size: int) -> Iterator[Chunk]:
        for number, start in enumerate(range(0, self.count, size)):
            rows = range(start, min(start + size, self.count))
            yield Chunk(number, [Input(str(row), None) for row in rows])


@dataclass(frozen=True)
class FileReader:
    """Reads image files."""

    images: Images
    max_pixels: int

    def uri_of(self, item: Input) -> str:
        """As it may be shown and stored."""
        return shown_uri(self.images, item.name)

    def picture_name(self, item: Input) -> str:
        """The file's own, or of a list its id and the end of its URI."""
        is_folder = isinstance(self.images, Store)
        return item.name if is_folder else f"{item.image_id}-{item.name.rpartition('/')[2]}"

    def read(self, item: Input, watch: Stopwatch) -> Picture | Reject:
        uri = self.uri_of(item)
        if item.fault or item.image_id is None:
            return Reject(uri, None, "source", item.fault)
        with watch("reading"):
            data = read_file(self.images, item.name, follow_links=False, max_pixels=self.max_pixels)
        if isinstance(data, str):
            return Reject(uri, item.image_id, "read", data)
        try:
            with watch.cpu("decoding"):
                pixels = decode(data, max_pixels=self.max_pixels)
        except DecodeError as error:
            return Reject(uri, item.image_id, "decode", str(error))
        return Picture(item.image_id, uri, pixels, (pixels.shape[0], pixels.shape[1]))


@dataclass(frozen=True)
class ShardReader:
    """Reads rows of shards. A damaged one is no reject but an error: what was built has to be built again."""

    uri: str

    @cached_property
    def dataset(self) -> ShardDataset:
        """The shards."""
        return ShardDataset(self.uri)

    def picture_name(self, item: Input) -> str:
        """By the row's number."""
        return f"row-{item.name}"

    def read(self, item: Input, watch: Stopwatch) -> Picture | Reject:
        with watch.cpu("decoding"):
            row = self.dataset.read(int(item.name))
        return Picture(row.image_id, row.uri, row.image, row.source_size)
