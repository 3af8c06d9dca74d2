"""Images -> detections as Parquet, as a Ray Data pipeline over a pool of actors with the model.

The inputs are cut into chunks before anything runs (pipelines/inputs.py). A chunk is one call of one actor: threads
read, decode and resize ahead of the model, another makes run lengths after it, and rows are written as they come. Then
the chunk's receipt is written. Only numbers of chunks and small sums travel through Ray. A chunk with a receipt is not
predicted again (pipelines/predict_folder.py), so the same command completes what a killed one left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from mrcnn.model import MaskRCNN
from mrcnn.weights import CONFIG_FILE, WEIGHTS_FILE
from pipelines.attempts import begin_or_explain, count_attempts
from pipelines.inputs import Chunk, Input, Reader
from pipelines.manifest import check_sum
from pipelines.pixels import allow_pixels
from pipelines.predict_folder import (
    ChunkReceipt,
    part_name,
    read_chunk,
    read_model,
    receipt_if_there,
    write_receipt,
)
from pipelines.predict_options import PredictOptions
from pipelines.predictor import Seen, View, load_predictor, some_of
from pipelines.prefetch import prefetched
from pipelines.records import Reject
from pipelines.stages import WAITING, Stopwatch
from pipelines.storage import Store
from pipelines.tally import tally_part
from pipelines.tasks import checked, failing_in_words

SCHEMA_VERSION = 5  # of the folder; 4: rows in groups, and names of lists and shards; 5: the manifest has tallies
READ_THREADS = 2
READ_AHEAD = 4  # decoded images in memory
MANY = 4  # tasks for each actor
ROWS_A_GROUP = 64  # of a part: what is in memory before it is written

ModelFiles = Mapping[str, bytes]
T = TypeVar("T")

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
        # the number that is the file's name, else a hash of it (`image_ids`); of shards the row's own
        pa.field("image_id", pa.int64()),
        pa.field("uri", pa.string()),
        pa.field("height", pa.int32()),  # of the source image, as all coordinates
        pa.field("width", pa.int32()),
        pa.field("detections", pa.list_(DETECTION)),  # best first
    ],
    metadata={"mrcnn.schema_version": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True)
class PredictSettings:
    """What all chunks have in common."""

    reader: Reader
    out: Store
    options: PredictOptions
    threads: int = READ_THREADS
    """That read, decode and resize"""


def predict_chunks(numbers: Sequence[int], settings: PredictSettings, pool: ModelPool) -> Iterator[ChunkReceipt]:
    """Predict chunks in a pool: their inputs and the model are on the storage. Receipts come as parts are
    finished, without their rejects. Raises what a user can mend as FileNotFoundError, PermissionError, ValueError;
    RuntimeError where a chunk's process dies again and again."""
    context = DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; callers count images
    context.memory_usage_poll_interval_s = None
    tasks = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    receipts = tasks.map_batches(
        ChunkPredictor,
        fn_constructor_args=(settings, count_attempts()),
        batch_size=1,
        **pool.arguments,
    )
    for row in map(checked, receipts.iter_rows()):
        yield ChunkReceipt.from_json(row["receipt"])


@dataclass(frozen=True)
class ModelPool:
    """Actors with a model each."""

    actors: int
    gpus_per_actor: float
    """0: a CPU each"""
    room: int
    """How many the running Ray has resources for"""
    in_flight: int = 1
    """Tasks that an actor has at once, of which it does one. With a second one it need not wait until Ray Data looks
    again; but of few tasks the first actor that is there must not take what others could begin."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `map_batches`."""
        strategy = ActorPoolStrategy(size=self.actors, max_tasks_in_flight_per_actor=self.in_flight)
        resources = {"num_gpus": self.gpus_per_actor} if self.gpus_per_actor else {"num_cpus": 1}
        return {"compute": strategy, **resources}


def model_pool(tasks: int, *, actors: int | None = None, gpus_per_actor: float = 1.0) -> ModelPool:
    """By default as many actors as there are GPUs for, or a CPU each if there are none; not more than tasks."""
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0) if gpus_per_actor else 0
    room = int(gpus / gpus_per_actor + 1e-6) if gpus else int(resources.get("CPU", 0))
    size = max(1, min(actors or room, tasks))
    return ModelPool(size, gpus_per_actor if gpus else 0, room, in_flight=2 if tasks >= MANY * size else 1)


def place_model(model: MaskRCNN) -> MaskRCNN:
    """Put an actor's model on its GPU; without one, keep it to the one core that the actor has."""
    if ray.get_gpu_ids():
        return model.to("cuda")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    return model


@dataclass(frozen=True)
class _Loaded:
    """An image as the model takes it."""

    image_id: int
    uri: str
    view: View


@dataclass(frozen=True)
class _Found:
    """The same with what the model has found, without the pixels."""

    image_id: int
    uri: str
    size: tuple[int, int]
    seen: list[Seen]


class ChunkPredictor:
    """Actor: loads the model once, then turns chunks into parts."""

    def __init__(self, settings: PredictSettings, attempts: Any = None) -> None:
        self.settings, self.attempts = settings, attempts
        files = read_model(settings.out, (WEIGHTS_FILE, CONFIG_FILE))
        self.predictor = load_predictor(files, "the model", settings.options)
        place_model(self.predictor.model)
        allow_pixels(settings.options.max_pixels)
        ahead = max(READ_AHEAD, settings.threads, self.predictor.at_once)
        self.ahead = 1 if self.predictor.tiling.side else ahead  # images that are cut are large

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        rows = [{"receipt": "", **self._run(int(number))} for number in batch["number"]]
        return {name: [row[name] for row in rows] for name in ("receipt", "failure", "message")}

    @failing_in_words
    def _run(self, number: int) -> dict[str, str]:
        """A receipt may be there already where an actor died after it had written it."""
        receipt = receipt_if_there(self.settings.out, number)
        if receipt is None:
            failure = begin_or_explain(self.attempts, part_name(number))
            if failure is not None:
                return failure
            receipt = self.predict(read_chunk(self.settings.out, number))
        return {"receipt": receipt.without_rejects().to_json()}

    def predict(self, chunk: Chunk) -> ChunkReceipt:
        """Write the part of a chunk, then its receipt."""
        begun, out = time.perf_counter(), self.settings.out
        watch, rejects = Stopwatch(), list[Reject]()
        with out.new_file(part_name(chunk.number)) as path:
            with pq.ParquetWriter(path, PREDICTIONS, compression="zstd") as writer:
                rows, detections = self._write(writer, self._answers(chunk, watch), rejects, watch)
            size, tally, closed = path.stat().st_size, tally_part(path), time.perf_counter()
        watch.add({"writing": time.perf_counter() - closed})
        check_sum("images", len(chunk.inputs), rows, len(rejects))
        receipt = ChunkReceipt(
            number=chunk.number,
            rows=rows,
            detections=detections,
            size=size,
            rejects=len(rejects),
            versions_sha256=chunk.versions_sha256,
            tally=tally,
            rejected=rejects,
            seconds=watch.seconds,
            wall=time.perf_counter() - begun,
        )
        write_receipt(out, receipt)
        return receipt

    def _write(
        self,
        writer: pq.ParquetWriter,
        answers: Iterable[dict[str, Any] | Reject],
        rejects: list[Reject],
        watch: Stopwatch,
    ) -> tuple[int, int]:
        """Rows and detections written; what is no row goes to the rejects."""
        rows = detections = 0
        for some in some_of(_without_rejects(answers, rejects), ROWS_A_GROUP):
            with watch("writing"):
                writer.write_table(pa.Table.from_pylist(some, schema=PREDICTIONS))
            rows += len(some)
            detections += sum(len(row["detections"]) for row in some)
        return rows, detections

    def _answers(self, chunk: Chunk, watch: Stopwatch) -> Iterator[dict[str, Any] | Reject]:
        """A row or a reject for each input, in order."""
        load, threads = partial(self._load, watch), self.settings.threads
        loaded = prefetched(load, chunk.inputs, threads=threads, ahead=self.ahead)
        found = self._found(_waited_for(loaded, watch), watch)
        return prefetched(partial(self._answer, watch), found, threads=1, ahead=READ_AHEAD)

    def _load(self, watch: Stopwatch, item: Input) -> _Loaded | Reject:
        picture = self.settings.reader.read(item, watch)
        if isinstance(picture, Reject):
            return picture
        with watch.cpu("decoding"):
            return _Loaded(picture.image_id, picture.uri, self.predictor.prepare(picture))

    def _found(self, loaded: Iterable[_Loaded | Reject], watch: Stopwatch) -> Iterator[_Found | Reject]:
        """In this thread, which is the model's."""
        for some in some_of(loaded, self.predictor.at_once):
            with watch("model"):
                seen = iter(self.predictor.detect_all([each.view for each in some if isinstance(each, _Loaded)]))
            for each in some:
                if isinstance(each, Reject):
                    yield each
                else:
                    yield _Found(each.image_id, each.uri, each.view.source_size, next(seen))

    def _answer(self, watch: Stopwatch, found: _Found | Reject) -> dict[str, Any] | Reject:
        if isinstance(found, Reject):
            return found
        with watch.cpu("masks"):
            detections = self.predictor.rows(found.image_id, found.size, found.seen)
        height, width = found.size
        row = {"image_id": found.image_id, "uri": found.uri, "height": height, "width": width}
        return {**row, "detections": detections}


def _without_rejects(answers: Iterable[dict[str, Any] | Reject], rejects: list[Reject]) -> Iterator[dict[str, Any]]:
    for answer in answers:
        if isinstance(answer, Reject):
            rejects.append(answer)
        else:
            yield answer


def _waited_for(items: Iterator[T], watch: Stopwatch) -> Iterator[T]:
    """The items; the time until each is there is the model's waiting."""
    while True:
        with watch(WAITING):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
