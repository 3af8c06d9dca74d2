"""What a source hands to the build: image records, and what it could not use."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from mrcnn.structures import Category

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


@dataclass(frozen=True)
class Reject:
    """An image that did not become a row."""

    uri: str
    image_id: int | None
    stage: Stage
    reason: str


@dataclass(frozen=True)
class RejectedAnnotation:
    """An annotation that did not become an instance."""

    uri: str
    image_id: int | None
    annotation_id: int | None
    stage: Stage
    reason: str


@dataclass(frozen=True)
class ImageRecord:
    """One image as its source describes it. Sizes are None where the source does not say."""

    image_id: int
    file_name: str
    height: int | None
    width: int | None
    annotations: list[dict[str, Any]] = field(default_factory=list)
    """COCO annotations (id, category_id, bbox, area, iscrowd, segmentation, keypoints) with `label` added"""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SourceData:
    """Everything of one annotation file: images = records + rejects."""

    categories: tuple[Category, ...]
    records: list[ImageRecord]
    rejects: list[Reject]
    rejected_annotations: list[RejectedAnnotation]
    images: int
    annotations: int
    sha256: str
    """Of the annotation file"""

    def __post_init__(self) -> None:
        assert self.images == len(self.records) + len(self.rejects)
        kept = sum(len(record.annotations) for record in self.records)
        assert self.annotations == kept + len(self.rejected_annotations)


def by_reason(stages_and_reasons: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Counts of "stage: reason", the particulars after the colon left out; most frequent first."""
    return dict(Counter(f"{stage}: {reason.split(':')[0]}" for stage, reason in stages_and_reasons).most_common())


def to_parquet(rejects: Sequence[Reject | RejectedAnnotation], schema: pa.Schema) -> bytes:
    """The bytes of rejects.parquet or rejected_annotations.parquet."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(each) for each in rejects], schema=schema), sink)
    return sink.getvalue()
