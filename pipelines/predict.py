"""Images -> detections as Parquet, as a Ray Data pipeline over a pool of actors with the model.

The sorted file names are cut into chunks before anything runs. A chunk is one call of one actor, which
writes the chunk's part, then its receipt; only receipts travel through Ray. A chunk with a receipt is not
predicted again, so the same command completes what a killed one left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from mrcnn.evaluation import coco_results
from mrcnn.model import MaskRCNN
from mrcnn.structures import Detections
from mrcnn.visualize import draw_detections
from mrcnn.weights import model_from_files
from pipelines.prefetch import prefetched
from pipelines.records import Reject, Stage
from pipelines.sources.names import image_ids
from pipelines.storage import Store
from pipelines.storage_errors import FileRefusedError
from pipelines.transforms import DecodeError, Pixels, decode, encode

SCHEMA_VERSION = 3  # of the parts; 3: image ids depend on names alone
PROGRESS = "_progress"
READ_THREADS = 2
READ_AHEAD = 4  # decoded images in memory

ModelFiles = Mapping[str, bytes]

DETECTION = pa.struct(
    [
        pa.field("label", pa.int16()),  # 1..K
        pa.field("category_id", pa.int32()),  # the training data's own
        pa.field("score", pa.float32()),
        pa.field("box", pa.list_(pa.float32(), 4)),  # x, y, width, height in source pixels
        # null from a model without masks; of a list of fixed size in a null, Parquet cannot be read back
        pa.field("rle", pa.struct([pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.string())])),
        # x, y, score of each keypoint of the category, in source pixels; null without
        pa.field("keypoints", pa.list_(pa.float32())),
    ]
)

PREDICTIONS = pa.schema(
    [
        pa.field("image_id", pa.int64()),  # the number that is the file's name, else a hash of it: `image_ids`
        pa.field("uri", pa.string()),
        pa.field("height", pa.int32()),  # of the source image, as all coordinates
        pa.field("width", pa.int32()),
        pa.field("detections", pa.list_(DETECTION)),  # best first
    ],
    metadata={"mrcnn.schema_version": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True)
class Chunk:
    """Some images, and the name of the part that their rows go to."""

    part: str
    image_ids: list[int]
    names: list[str]


@dataclass(frozen=True)
class ChunkReceipt:
    """What became of a chunk: images = rows + rejects."""

    part: str
    rows: int
    detections: int
    rejects: list[Reject]


@dataclass(frozen=True)
class PredictSettings:
    """What all chunks have in common."""

    images: Store
    out: Store
    overlays: frozenset[str]
    """Names of the images that are drawn"""


def receipt_name(part: str) -> str:
    """Where the receipt of a part lies until all are there."""
    return f"{PROGRESS}/{PurePosixPath(part).name}.json"


def overlay_name(name: str) -> str:
    """Where the picture of an image goes."""
    return f"overlays/{name}.png"  # a.jpg and a.png are two


def write_receipt(out: Store, receipt: ChunkReceipt) -> None:
    """Say that a chunk is finished: only when its part and its pictures are written."""
    out.write_bytes(receipt_name(receipt.part), json.dumps(asdict(receipt)).encode())


def read_receipt(out: Store, part: str) -> ChunkReceipt:
    """The receipt of a finished chunk."""
    return _receipt_from_json(out.read_bytes(receipt_name(part)))


def cut(names: Sequence[str], size: int) -> list[Chunk]:
    """Chunks of sorted names, with their ids."""
    ids = image_ids(names)
    return [
        Chunk(f"predictions/part-{i:05d}.parquet", ids[start : start + size], list(names[start : start + size]))
        for i, start in enumerate(range(0, len(names), size))
    ]


def predict_chunks(chunks: Sequence[Chunk], files: ModelFiles, settings: PredictSettings) -> Iterator[ChunkReceipt]:
    """Predict chunks on all GPUs or CPUs of the running Ray; receipts come as parts are finished."""
    tasks = ray.data.from_items([{"chunk": json.dumps(asdict(c))} for c in chunks], override_num_blocks=len(chunks))
    receipts = tasks.map_batches(
        ChunkPredictor,
        fn_constructor_args=(ray.put(dict(files)), settings),
        batch_size=1,
        **model_pool(len(chunks)),
    )
    for row in receipts.iter_rows():
        yield _receipt_from_json(row["receipt"])


def model_pool(tasks: int) -> dict[str, Any]:
    """Arguments of `map_batches` for actors with a model: one a GPU, or a CPU if there is none, or a task."""
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    pool = ActorPoolStrategy(size=max(1, min(int(resources.get(kind, 1)), tasks)))
    return {"compute": pool, "num_gpus": 1} if kind == "GPU" else {"compute": pool, "num_cpus": 1}


def place_model(model: MaskRCNN) -> MaskRCNN:
    """Put an actor's model on its GPU; without one, keep it to the one core that the actor has."""
    if ray.get_gpu_ids():
        return model.to("cuda")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return model


class ChunkPredictor:
    """Actor: loads the model once, then turns chunks into parts."""

    def __init__(self, files: ray.ObjectRef[ModelFiles], settings: PredictSettings) -> None:
        self.model = place_model(model_from_files(ray.get(files), "the model"))
        self.settings = settings

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        chunks = [Chunk(**json.loads(chunk)) for chunk in batch["chunk"]]
        return {"receipt": [json.dumps(asdict(self.predict(chunk))) for chunk in chunks]}

    def predict(self, chunk: Chunk) -> ChunkReceipt:
        """Write the part of a chunk, then its receipt."""
        rows: list[dict[str, Any]] = []
        rejects: list[Reject] = []
        read = partial(_read_image, self.settings.images)
        images = prefetched(read, chunk.names, threads=READ_THREADS, ahead=READ_AHEAD)
        for image_id, name, image in zip(chunk.image_ids, chunk.names, images, strict=True):
            uri = self.settings.images.uri_of(name)
            if isinstance(image, _Unusable):
                rejects.append(Reject(uri, image_id, image.stage, image.reason))
                continue
            (found,) = self.model.predict([image])
            rows.append(self._row(image_id, uri, found))
            if name in self.settings.overlays:
                self._draw(name, image, found)
        with self.settings.out.new_file(chunk.part) as part:
            pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS), part, compression="zstd")
        receipt = ChunkReceipt(chunk.part, len(rows), sum(len(row["detections"]) for row in rows), rejects)
        write_receipt(self.settings.out, receipt)
        return receipt

    def _row(self, image_id: int, uri: str, found: Detections) -> dict[str, Any]:
        height, width = found.image_size
        entries = coco_results(image_id, found, self.model.categories)
        detections = [
            {
                "label": label,
                "category_id": entry["category_id"],
                "score": entry["score"],
                "box": entry["bbox"],
                "rle": entry.get("segmentation"),
                "keypoints": entry.get("keypoints"),
            }
            for label, entry in zip(found.labels.tolist(), entries, strict=True)
        ]
        return {"image_id": image_id, "uri": uri, "height": height, "width": width, "detections": detections}

    def _draw(self, name: str, image: Pixels, found: Detections) -> None:
        picture = draw_detections(image, found, self.model.categories)
        self.settings.out.write_bytes(overlay_name(name), encode(picture, "png"))


@dataclass(frozen=True)
class _Unusable:
    """Why a file is no image."""

    stage: Stage
    reason: str


def _read_image(images: Store, name: str) -> Pixels | _Unusable:
    """The image, or why there is none. Errors of the store itself (credentials, no connection) are raised."""
    try:
        return decode(images.read_bytes(name))
    except DecodeError as error:
        return _Unusable("decode", str(error))
    except FileNotFoundError:
        return _Unusable("read", "no such file")
    except FileRefusedError:
        return _Unusable("read", "no permission")


def _receipt_from_json(text: str | bytes) -> ChunkReceipt:
    content = json.loads(text)
    return ChunkReceipt(**{**content, "rejects": [Reject(**each) for each in content["rejects"]]})
