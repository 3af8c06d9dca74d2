"""The accounts of a build: what went in, what became of it, and whether too much was rejected."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import BuildConfig
from pipelines.manifest import Manifest, RejectList, Totals, reject_list
from pipelines.records import (
    REJECTED_ANNOTATIONS,
    REJECTS,
    Reject,
    RejectedAnnotation,
    SourceData,
    by_reason,
    to_parquet,
    without_particulars,
)
from pipelines.shard_task import Receipt
from pipelines.shards import UNREADABLE
from pipelines.storage import Store

REJECTS_FILE = "rejects.parquet"
REJECTED_ANNOTATIONS_FILE = "rejected_annotations.parquet"
TOLD = ["uri", "stage", "reason"]  # columns of a list
EXAMPLES = 3
WITH_ITS_IMAGE = "image rejected:"  # how the reason begins where the annotation is not at fault


@dataclass(frozen=True)
class Accounts:
    """What is known of a build's images and annotations, once some or all of its shards have receipts."""

    images: int
    annotations: int | None
    """Of the source, as the images; None where they are not all counted yet"""
    rows: int
    instances: int
    rejects: Sequence[Reject]
    rejected_annotations: Sequence[RejectedAnnotation]
    further_tiles: int = 0
    further_parts: int = 0
    dropped_parts: int = 0

    def totals(self) -> Totals:
        """The sums of all shards. Raises LostError where they do not add up."""
        assert self.annotations is not None
        return Totals(
            images=self.images,
            rows=self.rows,
            rejects=len(self.rejects),
            annotations=self.annotations,
            instances=self.instances,
            rejected_annotations=len(self.rejected_annotations),
            further_tiles=self.further_tiles,
            further_parts=self.further_parts,
            dropped_parts=self.dropped_parts,
        )

    def write_rejects(self, out: Store) -> tuple[RejectList, ...]:
        """Write the lists of all that was rejected. Returns what a manifest says of them."""
        lists = {
            REJECTS_FILE: to_parquet(self.rejects, REJECTS),
            REJECTED_ANNOTATIONS_FILE: to_parquet(self.rejected_annotations, REJECTED_ANNOTATIONS),
        }
        for name, data in lists.items():
            out.write_bytes(name, data)
        return tuple(reject_list(name, data) for name, data in lists.items())

    def excess(self, config: BuildConfig) -> str | None:
        """Why this is not to be used, however the other shards turn out; None where it may be."""
        if len(self.rejects) >= self.images:
            return f"not one image of {config.images} could be used{_breakdown(self.rejects)}"
        # divided, not multiplied: 0.29 * 100 is less than 29
        if len(self.rejects) / self.images > config.max_reject_share:
            share = _share(len(self.rejects), self.images, "images")
            return f"{share}, --max-reject-share is {config.max_reject_share:g}{_breakdown(self.rejects)}"
        own = [each for each in self.rejected_annotations if not each.reason.startswith(WITH_ITS_IMAGE)]
        inputs = (self.annotations or 0) - (len(self.rejected_annotations) - len(own))
        if self.annotations is not None and inputs and len(own) / inputs > config.max_rejected_annotation_share:
            share = _share(len(own), inputs, "annotations of images that could be used")
            bound = f"--max-rejected-annotation-share is {config.max_rejected_annotation_share:g}"
            return f"{share}, {bound}{_breakdown(own)}"
        return None


def account(source: SourceData, receipts: Collection[Receipt] = (), *, complete: bool = False) -> Accounts:
    """The accounts of the source and of shards, which may be `complete`: all of them."""
    annotations = source.annotations
    if annotations is None and complete:
        annotations = len(source.rejected_annotations) + sum(receipt.annotations for receipt in receipts)
    return Accounts(
        images=source.images,
        annotations=annotations,
        rows=sum(receipt.info.rows for receipt in receipts),
        instances=sum(receipt.instances for receipt in receipts),
        rejects=[*source.rejects, *(each for receipt in receipts for each in receipt.rejects)],
        rejected_annotations=[
            *source.rejected_annotations,
            *(each for receipt in receipts for each in receipt.rejected_annotations),
        ],
        further_tiles=sum(receipt.further_tiles for receipt in receipts),
        further_parts=sum(receipt.further_parts for receipt in receipts),
        dropped_parts=sum(receipt.dropped_parts for receipt in receipts),
    )


def read_accounts(out: Store, manifest: Manifest) -> Accounts:
    """The accounts of a finished build."""
    totals = manifest.totals
    sums = {each.name: getattr(totals, each.name) for each in fields(totals) if not each.name.startswith("reject")}
    rejects = [Reject(**each) for each in _read(out, REJECTS_FILE, REJECTS, manifest)]
    lost = [
        RejectedAnnotation(**each) for each in _read(out, REJECTED_ANNOTATIONS_FILE, REJECTED_ANNOTATIONS, manifest)
    ]
    return Accounts(**sums, rejects=rejects, rejected_annotations=lost)


def _read(out: Store, name: str, schema: pa.Schema, manifest: Manifest) -> list[dict[str, Any]]:
    data = out.read_bytes(name)
    stated = {each.name: each for each in manifest.reject_lists}
    with _damage_told(out, name):
        if stated and stated.get(name) != reject_list(name, data):
            raise ValueError("its checksum is not the stated one")
        table = pq.read_table(io.BytesIO(data))
        if not table.schema.equals(schema):
            raise ValueError(f"its columns are {table.schema.names}")
        return table.to_pylist()


@contextmanager
def _damage_told(out: Store, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{out.uri_of(name)} is missing: build the data again") from None
    except UNREADABLE as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{out.uri_of(name)} is damaged ({told}): remove it and build the data again") from None


def _share(rejected: int, inputs: int, what: str) -> str:
    return f"{rejected} of {inputs} {what} ({rejected / inputs:.1%}) were rejected"


def _breakdown(rejects: Sequence[Reject | RejectedAnnotation]) -> str:
    reasons = by_reason((each.stage, each.reason) for each in rejects)
    counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    examples = "; ".join(f"{each.uri}: {each.reason}" if each.uri else each.reason for each in rejects[:EXAMPLES])
    return f" ({counts}), such as {examples}" if rejects else ""


def reasons_in(out: Store, name: str) -> dict[str, int]:
    """Counts by reason of a list of rejects that lies there, most frequent first."""
    return {each.reason: each.count for each in rejected_in(out, name)}


@dataclass
class Rejected:
    """All that was rejected for one reason."""

    reason: str
    """"stage: reason", without particulars"""
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    """URI and full reason of the first few"""


def _has_nulls(batch: pa.RecordBatch) -> bool:
    return any(column.null_count for column in batch.columns)


def rejected_in(out: Store, name: str) -> list[Rejected]:
    """What a list of rejects that lies there holds, most frequent reason first. The list is never in memory."""
    found: dict[str, Rejected] = {}
    with out.local_copy(name) as path, _damage_told(out, name), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=TOLD):
            if [field.type for field in batch.schema] != [pa.string()] * len(TOLD) or _has_nulls(batch):
                raise ValueError(f"of {', '.join(TOLD)} not all are there")
            for uri, stage, reason in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                shared = without_particulars(stage, reason)
                same = found.setdefault(shared, Rejected(shared))
                same.count += 1
                if len(same.examples) < EXAMPLES:
                    same.examples.append((uri, reason))
    return sorted(found.values(), key=lambda each: -each.count)
