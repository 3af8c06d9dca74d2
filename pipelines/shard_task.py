"""One task of a build: image records -> one shard, read, decoded, resized, written a row at a time.

An image or annotation that cannot be used becomes a reject in the task's receipt. What is not the data's
fault (credentials, an endpoint that is gone, a full disk) ends the build.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mrcnn.preprocess import resize_image, resized_size
from pipelines.config import Encoding
from pipelines.manifest import ShardInfo
from pipelines.prefetch import prefetched
from pipelines.records import ImageRecord, Reject, RejectedAnnotation, Stage
from pipelines.scaling import Scaling
from pipelines.shards import write_shard
from pipelines.storage import Store
from pipelines.transforms import DecodeError, Pixels, decode, encode, use_one_thread
from pipelines.validate import AnnotationError, to_instance

PROGRESS = "_progress"
READ_THREADS = 4  # hide the latency of S3
READ_AHEAD = 8  # compressed images in memory


@dataclass(frozen=True)
class ShardSettings:
    """What all tasks of a build have in common."""

    images: Store
    out: Store
    shorter_side: int
    longer_side: int
    encoding: Encoding


@dataclass(frozen=True)
class Receipt:
    """What became of one shard's records; written after the shard itself."""

    info: ShardInfo
    instances: int
    rejects: list[Reject]
    rejected_annotations: list[RejectedAnnotation]

    def to_json(self) -> str:
        """For a row of Ray Data and for _progress/."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """The inverse of `to_json`."""
        content = json.loads(text)
        return cls(
            info=ShardInfo(**content["info"]),
            instances=content["instances"],
            rejects=[Reject(**each) for each in content["rejects"]],
            rejected_annotations=[RejectedAnnotation(**each) for each in content["rejected_annotations"]],
        )


def receipt_name(shard: str) -> str:
    """Where the receipt of a shard lies until the build is complete."""
    return f"{PROGRESS}/{shard}.json"


def make_shard(task: dict[str, Any], settings: ShardSettings) -> dict[str, Any]:
    """A task of Ray Data: {name, records} -> {name, receipt, failure, message}.

    Errors that a user can mend come back as values: Ray would wrap them in its own, and print a traceback.
    """
    use_one_thread()
    records = [ImageRecord(**each) for each in json.loads(task["records"])]
    try:
        receipt = _ShardTask(settings).run(task["name"], records).to_json()
    except (ValueError, OSError) as error:
        return {"name": task["name"], "receipt": "", "failure": _public_name(error), "message": str(error)}
    return {"name": task["name"], "receipt": receipt, "failure": "", "message": ""}


def _public_name(error: Exception) -> str:
    kinds = (PermissionError, FileNotFoundError)
    return next((kind.__name__ for kind in kinds if isinstance(error, kind)), ValueError.__name__)


@dataclass
class _ShardTask:
    """The rows of one shard, and what was rejected on the way."""

    settings: ShardSettings
    instances: int = 0
    rejects: list[Reject] = field(default_factory=list)
    rejected_annotations: list[RejectedAnnotation] = field(default_factory=list)

    def run(self, name: str, records: list[ImageRecord]) -> Receipt:
        out = self.settings.out
        with out.new_file(name) as part:
            rows = write_shard(part, self._rows(records))
            info = ShardInfo(name, rows, part.stat().st_size, _sha256(part))
        assert rows + len(self.rejects) == len(records)
        receipt = Receipt(info, self.instances, self.rejects, self.rejected_annotations)
        out.write_bytes(receipt_name(name), receipt.to_json().encode())
        return receipt

    def _rows(self, records: list[ImageRecord]) -> Iterator[dict[str, Any]]:
        read = partial(_read, self.settings.images)
        for record, data in prefetched(read, records, threads=READ_THREADS, ahead=READ_AHEAD):
            row = self._row(record, data)
            if row is not None:
                yield row

    def _row(self, record: ImageRecord, data: bytes | None) -> dict[str, Any] | None:
        """The row of an image, or None where it was rejected."""
        if data is None:
            self._reject(record, "read", "no such file")
            return None
        try:
            image = decode(data)
        except DecodeError as error:
            self._reject(record, "decode", str(error))
            return None
        height, width = image.shape[:2]
        if record.annotations and (record.height or height, record.width or width) != (height, width):
            stated = f"{record.width} x {record.height} stated, {width} x {height} decoded"
            self._reject(record, "validate", f"image is not of the annotated size: {stated}")
            return None
        return self._finish(record, image)

    def _finish(self, record: ImageRecord, image: Pixels) -> dict[str, Any]:
        settings, source = self.settings, image.shape[:2]
        size = resized_size(*source, shorter_side=settings.shorter_side, longer_side=settings.longer_side)
        return {
            "image_id": record.image_id,
            "uri": settings.images.uri_of(record.file_name),
            "height": size[0],
            "width": size[1],
            "source_height": source[0],
            "source_width": source[1],
            "encoding": settings.encoding,
            "image": encode(resize_image(image, *size), settings.encoding),
            "instances": self._instances(record, Scaling((source[0], source[1]), size)),
        }

    def _instances(self, record: ImageRecord, scaling: Scaling) -> list[dict[str, Any]]:
        instances = []
        for annotation in record.annotations:
            try:
                instances.append(to_instance(annotation, scaling))
            except AnnotationError as error:
                self._reject_annotation(record, annotation, "validate", str(error))
        self.instances += len(instances)
        return instances

    def _reject(self, record: ImageRecord, stage: Stage, reason: str) -> None:
        self.rejects.append(Reject(self.settings.images.uri_of(record.file_name), record.image_id, stage, reason))
        for annotation in record.annotations:
            self._reject_annotation(record, annotation, stage, f"image rejected: {reason}")

    def _reject_annotation(self, record: ImageRecord, annotation: dict[str, Any], stage: Stage, reason: str) -> None:
        uri = self.settings.images.uri_of(record.file_name)
        self.rejected_annotations.append(RejectedAnnotation(uri, record.image_id, annotation["id"], stage, reason))


def _read(images: Store, record: ImageRecord) -> tuple[ImageRecord, bytes | None]:
    """None for a file that is not there. Anything else that goes wrong is no fault of this image."""
    try:
        return record, images.read_bytes(record.file_name)
    except FileNotFoundError:
        return record, None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
