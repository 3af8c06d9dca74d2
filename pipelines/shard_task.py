"""One task of a build: image records -> one shard, read, decoded, resized, written; where several sizes are wanted,
one shard of each.

A few images at a time take each of these steps together: a step that all of them take one after the other finds its
code and data in the processor's caches, which the pixels of one image drive out. That is a fifth of the time.

An image or annotation that cannot be used becomes a reject in the task's receipt. What is not the data's
fault (credentials, an endpoint that is gone, a full disk) ends the build.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import xxhash

from mrcnn.structures import Category
from pipelines.config import Encoding, Format
from pipelines.manifest import PROGRESS, ShardInfo, check_sum
from pipelines.pixels import allow_pixels
from pipelines.prefetch import batched, prefetched
from pipelines.records import ImageRecord, Images, Objects, Reject, RejectedAnnotation, Stage
from pipelines.rows import Picture, Scale, make_row, size_fault
from pipelines.shards import ShardWriter
from pipelines.sources.names import versions_sha256
from pipelines.sources.reading import OpenedRecord, ReadRecord, open_record, read_record
from pipelines.tasks import failing_in_words
from pipelines.tiling import Tiling, parts
from pipelines.transforms import use_one_thread
from pipelines.validate import AnnotationError, to_instance

READ_THREADS = 4  # hide the latency of S3, or of a mounted one
READ_AHEAD = 8  # compressed images in memory
LOCAL_READ_THREADS = 2
READ_TOGETHER = 8  # files, by each of these: to wake it for one takes longer than a disk's cache; so 24 in memory
TOGETHER = 8  # images that take a step together, unless they are large
TOGETHER_BYTES = 16 * 2**20  # of their pixels
ROWS_TOGETHER = 32
DEEPEST = 2000  # calls within each other: twice Python's, for what the driver could just parse lies deeper here


@dataclass(frozen=True)
class ShardSettings:
    """What all tasks of a build have in common."""

    format: Format
    images: Images
    categories: tuple[Category, ...]
    follow_links: bool
    scales: tuple[Scale, ...]
    tiling: Tiling
    encoding: Encoding
    max_pixels: int


@dataclass(frozen=True)
class Receipt:
    """What became of one shard's records; written after the shard itself."""

    info: ShardInfo
    annotations: int
    """Of all records: instances and rejected ones"""
    instances: int
    rejects: list[Reject]
    rejected_annotations: list[RejectedAnnotation]
    versions_sha256: str = ""
    """Of the records' files: where these have changed, the shard is made again"""
    further_tiles: int = 0
    """Rows beyond the first of their image"""
    further_parts: int = 0
    """Instances beyond the first of their annotation"""
    dropped_parts: int = 0
    """Of objects in tiles: left out, because a tile shows too little of them"""

    def to_json(self) -> str:
        """For a row of Ray Data."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """The inverse of `to_json`."""
        content = json.loads(text)
        return cls(
            **content
            | {
                "info": ShardInfo(**content["info"]),
                "rejects": [Reject(**each) for each in content["rejects"]],
                "rejected_annotations": [RejectedAnnotation(**each) for each in content["rejected_annotations"]],
            }
        )


def sealed(receipt: Receipt) -> bytes:
    """A receipt as it is stored, behind its checksum: what is damaged in it would go into the manifest."""
    text = receipt.to_json().encode()
    return xxhash.xxh3_128(text).hexdigest().encode() + b"\n" + text


def unsealed(data: bytes) -> Receipt:
    """The inverse of `sealed`. Raises ValueError where it was damaged, or made by another version."""
    checksum, _, text = data.partition(b"\n")
    if checksum != xxhash.xxh3_128(text).hexdigest().encode():
        raise ValueError("its checksum is not the stated one")
    return Receipt.from_json(text)


def receipt_name(shard: str) -> str:
    """Where the receipt of a shard lies until the build is complete."""
    return f"{PROGRESS}/{shard}.json"


@failing_in_words
def make_shard(task: dict[str, Any], settings: ShardSettings) -> dict[str, Any]:
    """A task of Ray Data: {name, records, scales, stated} -> {name, receipts}, one for each of the scales (JSON, their
    places among the settings'). `stated` (JSON) is for each of these the `ShardInfo` it has to come to, or null."""
    use_one_thread()
    sys.setrecursionlimit(max(DEEPEST, sys.getrecursionlimit()))
    allow_pixels(settings.max_pixels)
    records = [ImageRecord(**each) for each in json.loads(task["records"])]
    wanted = replace(settings, scales=tuple(settings.scales[i] for i in json.loads(task["scales"])))
    stated = [each and ShardInfo(**each) for each in json.loads(task["stated"])]
    receipts = _ShardTask(wanted, stated).run(task["name"], records)
    return {"name": task["name"], "receipts": [receipt.to_json() for receipt in receipts]}


@dataclass
class _ShardTask:
    """The rows of one shard, and what was rejected on the way."""

    settings: ShardSettings
    stated: Sequence[ShardInfo | None]
    """Of each scale"""
    images: int = 0
    annotations: int = 0
    instances: int = 0
    further_tiles: int = 0
    further_parts: int = 0
    dropped_parts: int = 0
    rejects: list[Reject] = field(default_factory=list)
    rejected_annotations: list[RejectedAnnotation] = field(default_factory=list)

    def run(self, name: str, records: list[ImageRecord]) -> list[Receipt]:
        receipts = [self._receipt(info, versions_sha256(records)) for info in self._write(name, records)]
        check_sum("images", len(records), self.images, len(self.rejects))
        for scale, receipt in zip(self.settings.scales, receipts, strict=True):
            scale.out.write_bytes(receipt_name(name), sealed(receipt))
        return receipts

    def _write(self, name: str, records: list[ImageRecord]) -> list[ShardInfo]:
        with ExitStack() as files:
            paths = [
                (files.enter_context(scale.out.new_file(name)), scale.out.is_local) for scale in self.settings.scales
            ]
            with ExitStack() as open_files:
                # on its way to S3 a file is read again at once
                writers = [open_files.enter_context(ShardWriter(path, direct=stays)) for path, stays in paths]
                for images in self._opened(records):
                    self._write_rows(images, writers)
            infos = [writer.info(name) for writer in writers]
            self._check_stated(infos)  # here they have no names yet
            return infos

    def _check_stated(self, infos: Sequence[ShardInfo]) -> None:
        """Raise ValueError where a shard that a finished data set has lost becomes another one."""
        for scale, info, stated in zip(self.settings.scales, infos, self.stated, strict=True):
            if stated and info != stated:
                raise ValueError(
                    f"{scale.out.uri_of(info.name)} cannot be made again as the manifest states it: its images have "
                    "changed since. Give a new --out"
                )

    def _write_rows(self, images: list[OpenedRecord], writers: list[ShardWriter]) -> None:
        for rows in batched(self._rows(images), ROWS_TOGETHER):
            for writer, of_scale in zip(writers, zip(*rows, strict=True), strict=True):
                writer.write(of_scale)

    def _receipt(self, info: ShardInfo, versions_sha256: str) -> Receipt:
        return Receipt(
            info=info,
            versions_sha256=versions_sha256,
            annotations=self.annotations,
            instances=self.instances,
            rejects=self.rejects,
            rejected_annotations=self.rejected_annotations,
            further_tiles=self.further_tiles,
            further_parts=self.further_parts,
            dropped_parts=self.dropped_parts,
        )

    def _opened(self, records: list[ImageRecord]) -> Iterator[list[OpenedRecord]]:
        """A few images at a time, decoded."""
        settings, images, size = self.settings, [], 0
        for read in self._read(records):
            images.append(open_record(read, settings.format, settings.categories, max_pixels=settings.max_pixels))
            size += 0 if images[-1].pixels is None else images[-1].pixels.nbytes
            if len(images) == TOGETHER or size >= TOGETHER_BYTES:
                yield images
                images, size = [], 0
        yield images

    def _read(self, records: list[ImageRecord]) -> Iterator[ReadRecord]:
        settings = self.settings
        read = partial(read_record, settings.images, follow_links=settings.follow_links, max_pixels=settings.max_pixels)
        if not settings.images.is_local:
            yield from prefetched(read, records, threads=READ_THREADS, ahead=READ_AHEAD)
            return
        together, threads = batched(records, READ_TOGETHER), LOCAL_READ_THREADS
        for some in prefetched(lambda some: [*map(read, some)], together, threads=threads, ahead=threads):
            yield from some

    def _rows(self, images: list[OpenedRecord]) -> Iterator[tuple[dict[str, Any], ...]]:
        """For each image, or tile of one, its row at every scale; none of an image that is rejected."""
        while images:  # none is held longer than the rows that are made of it
            yield from self._image_rows(images.pop(0))

    def _image_rows(self, opened: OpenedRecord) -> Iterator[tuple[dict[str, Any], ...]]:
        record, objects, image = opened.record, opened.objects, opened.pixels
        self.annotations += len(objects.usable) + len(objects.rejected)
        for annotation_id, reason in objects.rejected:
            self._reject_annotation(record, annotation_id, "source", reason)
        if image is None:
            assert opened.fault is not None
            self._reject(record, objects, *opened.fault)
            return
        wrong_size = self._size_fault(image.shape[0], image.shape[1], objects)
        if wrong_size is not None:
            self._reject(record, objects, "validate", wrong_size)
            return
        picture = Picture(record.image_id, self.settings.images.uri_of(record.file_name), image)
        yield from self._picture_rows(picture, record, objects)

    def _size_fault(self, height: int, width: int, objects: Objects) -> str | None:
        if objects.usable and (objects.height or height, objects.width or width) != (height, width):
            stated = f"{objects.width} x {objects.height} stated, {width} x {height} decoded"
            return f"image is not of the annotated size: {stated}"
        settings = self.settings
        return size_fault((height, width), tiling=settings.tiling, scales=settings.scales, encoding=settings.encoding)

    def _picture_rows(
        self, picture: Picture, record: ImageRecord, objects: Objects
    ) -> Iterator[tuple[dict[str, Any], ...]]:
        settings, size = self.settings, (picture.pixels.shape[0], picture.pixels.shape[1])
        ids, instances = self._instances(record, objects, size)
        shown: set[int] = set()
        for number, part in enumerate(parts(size, instances, settings.tiling)):
            yield tuple(make_row(picture, part, scale, settings.encoding) for scale in settings.scales)
            self.further_tiles += number > 0
            self.further_parts += len(shown.intersection(part.numbers))
            self.dropped_parts += part.dropped
            self.instances += len(part.numbers)
            shown.update(part.numbers)
        self.images += 1
        for number in sorted(set(range(len(ids))) - shown):
            reason = f"no tile shows enough of it: less than {settings.tiling.min_share:g} in each"
            self._reject_annotation(record, ids[number], "validate", reason)

    def _instances(
        self, record: ImageRecord, objects: Objects, size: tuple[int, int]
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Ids of the annotations that can be used, and what they become in the image before it is resized."""
        ids, instances = [], []
        for annotation in objects.usable:
            try:
                instances.append(to_instance(annotation, size))
                ids.append(annotation["id"])
            except AnnotationError as error:
                self._reject_annotation(record, annotation["id"], "validate", str(error))
        return ids, instances

    def _reject(self, record: ImageRecord, objects: Objects, stage: Stage, reason: str) -> None:
        self.rejects.append(Reject(self.settings.images.uri_of(record.file_name), record.image_id, stage, reason))
        for annotation in objects.usable:
            self._reject_annotation(record, annotation["id"], stage, f"image rejected: {reason}")

    def _reject_annotation(self, record: ImageRecord, annotation_id: int | None, stage: Stage, reason: str) -> None:
        uri = self.settings.images.uri_of(record.file_name)
        self.rejected_annotations.append(RejectedAnnotation(uri, record.image_id, annotation_id, stage, reason))
