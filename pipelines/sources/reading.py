"""What a task gets of a record: its files, then what is in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from mrcnn.structures import Category
from pipelines.config import Format
from pipelines.pixels import BYTES_OF_PIXEL, MAX_PIXELS, DecodeError, Pixels
from pipelines.records import ImageRecord, Images, Objects, SourceError, Stage
from pipelines.sources import SOURCES
from pipelines.sources.names import LINK_OUTSIDE, links_outside, name_fault, plain_name
from pipelines.storage import Store
from pipelines.storage_errors import FileRefusedError, UnfitFileError
from pipelines.transforms import decode

MISSING = "no such file"

Fault = tuple[Stage, str]


@dataclass(frozen=True)
class ReadRecord:
    """A record and what could be read of its files."""

    record: ImageRecord
    image: bytes
    files: tuple[bytes, ...]
    """The annotation files, in the order of the record; empty unless all could be read"""
    fault: Fault | None
    """Why the record cannot be used"""


@dataclass(frozen=True)
class OpenedRecord:
    """A record with its annotations parsed and its image decoded."""

    record: ImageRecord
    objects: Objects
    pixels: Pixels | None
    """None where there is a fault"""
    fault: Fault | None
    """Why the record cannot be used"""


def read_record(images: Images, record: ImageRecord, *, follow_links: bool, max_pixels: int = MAX_PIXELS) -> ReadRecord:
    """Read a record's files. One that is missing, refused, outside of the folder, or larger than any image of
    `max_pixels` is a fault of the record; anything else that goes wrong (credentials, no connection) is raised. The
    record of an image that is found by one of its `_other_spellings` has that name."""
    read, files = partial(read_file, images, follow_links=follow_links, max_pixels=max_pixels), list[bytes]()
    for name in record.annotation_files:
        data = read(name)
        if isinstance(data, str):
            return ReadRecord(record, b"", (), ("read", f"annotation file, {data}: {name}"))
        files.append(data)
    image = read(record.file_name)
    for other in _other_spellings(images, record.file_name) if image == MISSING else ():
        image = read(other)
        if image != MISSING:
            record = replace(record, file_name=other)
            break
    if isinstance(image, str):  # its annotations are counted nevertheless
        return ReadRecord(record, b"", tuple(files), ("read", image))
    return ReadRecord(record, image, tuple(files), None)


def _other_spellings(images: Images, name: str) -> list[str]:
    """The names of a file in a folder that may be meant by one: by a Windows program's with backslashes; by one whose
    letters have their accents apart, as on a Mac, or not."""
    plain = plain_name(name.replace("\\", "/"))
    spellings = dict.fromkeys([plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))])
    return [each for each in spellings if each != name and isinstance(images, Store) and name_fault(each) is None]


def open_record(
    read: ReadRecord, format_: Format, categories: Sequence[Category], *, max_pixels: int = MAX_PIXELS
) -> OpenedRecord:
    """What is in a record's files. Raises nothing that is the files' fault."""
    record = read.record
    if len(read.files) < len(record.annotation_files):
        return OpenedRecord(record, Objects(), None, read.fault)
    try:
        objects = SOURCES[format_].objects(record, read.files, categories)
    except SourceError as error:
        return OpenedRecord(record, Objects(), None, read.fault or ("source", str(error)))
    if read.fault is not None:
        return OpenedRecord(record, objects, None, read.fault)
    try:
        pixels = decode(objects.image or read.image, max_pixels=max_pixels)
    except DecodeError as error:
        return OpenedRecord(record, objects, None, ("decode", str(error)))
    return OpenedRecord(record, objects, pixels, None)


def read_file(images: Images, name: str, *, follow_links: bool, max_pixels: int = MAX_PIXELS) -> bytes | str:
    """The file, or why it is none. Errors of the store itself (credentials, no connection) are raised."""
    if not follow_links and links_outside(images, name):
        return LINK_OUTSIDE
    try:
        return images.read_bytes(name, at_most=max_pixels * BYTES_OF_PIXEL)
    except FileNotFoundError:
        return MISSING
    except FileRefusedError:
        return "no permission"
    except UnfitFileError as error:
        return error.reason
