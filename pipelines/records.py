"""What a source hands to the build: image records, and what it could not use."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mrcnn.structures import Category
from pipelines.manifest import check_sum
from pipelines.storage_errors import public_uris, without_secrets

Stage = Literal["source", "read", "decode", "validate"]

REJECTS = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("image_id", pa.int64()),  # null where the source gave none that is valid
        pa.field("stage", pa.string()),  # source, read, decode or validate
        pa.field("reason", pa.string()),  # a fixed phrase, then perhaps a colon and the particulars
    ]
)
REJECTED_ANNOTATIONS = REJECTS.insert(2, pa.field("annotation_id", pa.int64()))
LONGEST = 1000  # characters of a reason, which may quote what is of any size


def printable(text: str) -> str:
    """The text as it can be stored, whatever bytes or JSON escapes it comes from."""
    return text.encode(errors="backslashreplace").decode()


def _stored(reason: str) -> str:
    """A reason as it can be stored: it may quote what is no Unicode, what is of any size, and addresses that are
    signed."""
    text = public_uris(printable(reason[: 10 * LONGEST]))  # which would not know half an address
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@dataclass(frozen=True)
class Reject:
    """An image that did not become a row."""

    uri: str
    image_id: int | None
    stage: Stage
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", without_secrets(self.uri))
        object.__setattr__(self, "reason", _stored(self.reason))


@dataclass(frozen=True)
class RejectedAnnotation:
    """An annotation that did not become an instance."""

    uri: str
    image_id: int | None
    annotation_id: int | None
    stage: Stage
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", without_secrets(self.uri))
        object.__setattr__(self, "reason", _stored(self.reason))


class SourceError(ValueError):
    """An image's annotation file that cannot be used; the message is the reject's reason."""


class Images(Protocol):
    """Where the images of a source are: a folder (`Store`), or files anywhere (sources/image_files.py)."""

    @property
    def uri(self) -> str:
        """The folder, or the list"""

    @property
    def is_local(self) -> bool:
        """Whether all of them are on disks of this machine"""

    def uri_of(self, name: str) -> str:
        """Full URI of a file."""

    def read_bytes(self, name: str, at_most: int | None = None) -> bytes:
        """A whole file; raises as `Store` does."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image as its source describes it. Annotations are still as they were found: only the image's task parses
    them, so that the driver can hold many records."""

    image_id: int
    file_name: str
    """Relative to the source's images"""
    height: int | None = None
    width: int | None = None
    """None where the source does not say"""
    annotations: str = ""
    """JSON list, where all annotations lie in one file"""
    annotation_files: Sequence[str] = ()
    """Names of the image's own annotation files, relative to the source's images"""
    version: str = ""
    """Of the image and its annotation files, see `Store.versions`; empty where the source lists no files"""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Objects:
    """The annotations of one image, parsed."""

    usable: list[dict[str, Any]] = field(default_factory=list)
    """As in COCO (id, category_id, bbox, area, iscrowd, segmentation, keypoints), with `label` added"""
    rejected: list[tuple[int | None, str]] = field(default_factory=list)
    """Id and reason of the others"""
    height: int | None = None
    width: int | None = None
    """Of the image as the annotations have it; None where they do not say"""
    image: bytes | None = None
    """The image file, where it lies in the annotations"""


@dataclass(frozen=True)
class SourceData:
    """What the driver knows of a source. Raises LostError unless images = records + rejects."""

    images_at: Images
    categories: tuple[Category, ...]
    """In the order of their labels, 1..K"""
    records: list[ImageRecord]
    rejects: list[Reject]
    images: int
    """Counted as they were found, before anything was made of them"""
    sha256: str
    """Of the annotation file, or of the names of the images"""
    rejected_annotations: list[RejectedAnnotation] = field(default_factory=list)
    annotations: int | None = None
    """All in the annotation file; None where each image has its own: then the tasks count them"""
    passed_over: tuple[str, ...] = ()
    """Files among the images that are not named as images are"""

    def __post_init__(self) -> None:
        check_sum("images", self.images, len(self.records), len(self.rejects))


def by_reason(stages_and_reasons: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Counts of "stage: reason" without particulars, most frequent first."""
    return dict(Counter(without_particulars(*each) for each in stages_and_reasons).most_common())


def without_particulars(stage: str, reason: str) -> str:
    """ "stage: reason", what follows the reason's first colon left out."""
    return f"{stage}: {reason.split(':')[0]}"


def to_parquet(rejects: Sequence[Reject | RejectedAnnotation], schema: pa.Schema) -> bytes:
    """The bytes of rejects.parquet or rejected_annotations.parquet."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(each) for each in rejects], schema=schema), sink)
    return sink.getvalue()
