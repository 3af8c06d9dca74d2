"""`mrcnn verify-data`: is all there that the manifest states, and is it what a training can use?

Shard by shard as tasks of Ray Data (one CPU and one shard each; from S3 a shard passes through a temporary file). Of
each, the driver gets what is wrong and the image ids.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mrcnn.structures import Category
from pipelines.accounts import REJECTED_ANNOTATIONS_FILE, REJECTS_FILE
from pipelines.attempts import Task
from pipelines.manifest import FILE_NAME, Manifest, ShardInfo, Totals, reject_list
from pipelines.records import REJECTED_ANNOTATIONS, REJECTS, Stage
from pipelines.schema import SHARD
from pipelines.shards import UNREADABLE, checksum, portrait_bits
from pipelines.storage import Store, open_store
from pipelines.tasks import failing_in_words, run_tasks
from pipelines.text import shown_name
from pipelines.verify_rows import row_faults

FAULTS_TOLD = 5  # of a shard; one damaged shard may have a fault in every row
PROBLEMS_TOLD = 3  # in the error's one line
CHECKED = """the manifest's digest and sums; of every shard size, checksum, schema and number of rows; of every row
that the image decodes to its stated size, boxes lie inside, masks fit, labels are known; image ids differ; the lists
of rejects are as stated; no file is there that does not belong"""


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what is wrong."""

    uri: str
    manifest: Manifest
    problems: tuple[str, ...]
    """Each begins with the file's name; empty where all is well"""
    extra: tuple[str, ...]
    """Files that do not belong to the data set but do it no harm"""
    seconds: float

    def __str__(self) -> str:
        totals, size = self.manifest.totals, sum(shard.bytes for shard in self.manifest.shards)
        lines = [
            f"{self.uri}: {len(self.manifest.shards)} shards, {size / 1e6:.1f} MB in {self.seconds:.1f} s",
            f"{totals.rows} rows + {totals.rejects} rejects = {totals.images} images",
            f"{totals.instances} instances + {totals.rejected_annotations} rejected = {totals.annotations} annotations",
            f"checked: {' '.join(CHECKED.split())}",
            *(f"not of this data set: {shown_name(name)}" for name in self.extra),
            *(f"BROKEN {shown_name(problem)}" for problem in self.problems),
            f"digest {self.manifest.digest}",
        ]
        return "\n".join(lines)

    def check(self) -> None:
        """Raise ValueError, in one line, unless all is well."""
        if self.problems:
            more = f"; and {len(self.problems) - PROBLEMS_TOLD} more" if len(self.problems) > PROBLEMS_TOLD else ""
            told = "; ".join(self.problems[:PROBLEMS_TOLD])
            raise ValueError(f"{self.uri} is broken: {told}{more}. Remove these files and build the data again")


def verify(uri: str) -> VerifyReport:
    """Check a folder of shards. Ray must be running.

    Raises FileNotFoundError, PermissionError or ValueError where there is no manifest, it is damaged, or the storage
    does not answer; anything else that is wrong is in the report.
    """
    start = time.monotonic()
    store = open_store(uri).check_answers()
    manifest = Manifest.read(store)
    sizes = dict(store.entries(hidden=True))
    strays, extra = _strangers(sizes, manifest)
    problems = [*strays, *_missing(sizes, manifest), *_list_faults(store, sizes, manifest)]
    problems += _shard_faults(store, [each for each in manifest.shards if each.name in sizes], manifest)
    return VerifyReport(store.uri, manifest, tuple(problems), tuple(extra), time.monotonic() - start)


def _strangers(sizes: dict[str, int], manifest: Manifest) -> tuple[list[str], list[str]]:
    """Files beside the data set: shards, which readers of *.arrow would take for its own, and others."""
    own = {FILE_NAME, REJECTS_FILE, REJECTED_ANNOTATIONS_FILE, *(shard.name for shard in manifest.shards)}
    extra = sorted(sizes.keys() - own)
    strays = [name for name in extra if name.startswith("shard-") and name.endswith(".arrow")]
    return [f"{name}: the manifest does not know it" for name in strays], [e for e in extra if e not in strays]


def _missing(sizes: dict[str, int], manifest: Manifest) -> Iterator[str]:
    names = [REJECTS_FILE, REJECTED_ANNOTATIONS_FILE, *(shard.name for shard in manifest.shards)]
    return (f"{name}: it is missing" for name in names if name not in sizes)


def _list_faults(store: Store, sizes: dict[str, int], manifest: Manifest) -> Iterator[str]:
    """The two lists of rejects."""
    stated = {each.name: each for each in manifest.reject_lists}
    if "pixels_version" in manifest.build and len(stated) != 2:  # those from before it may have none
        yield f"{FILE_NAME}: it does not state the two lists of rejects"
    for name, schema, count in (
        (REJECTS_FILE, REJECTS, manifest.totals.rejects),
        (REJECTED_ANNOTATIONS_FILE, REJECTED_ANNOTATIONS, manifest.totals.rejected_annotations),
    ):
        if name in sizes:
            data = store.read_bytes(name)
            fault = _list_fault(data, schema, count)
            if fault is None and stated and stated.get(name) != reject_list(name, data):
                fault = "its checksum is not the stated one"
            if fault is not None:
                yield f"{name}: {fault}"


def _list_fault(data: bytes, schema: pa.Schema, count: int) -> str | None:
    try:
        table = pq.read_table(io.BytesIO(data))
        table.validate(full=True)
        stages, reasons = (
            table[name].to_pylist() if name in table.schema.names else [] for name in ("stage", "reason")
        )
    except UNREADABLE as error:
        return f"it is damaged: {_in_one_line(error)}"
    if not table.schema.equals(schema):
        return f"its columns are {table.schema.names}, not {schema.names}"
    if table.num_rows != count:
        return f"it has {table.num_rows} rows, {count} are stated"
    good = set(stages) <= set(get_args(Stage)) and all(reasons)
    return None if good else "a row has no stage or no reason"


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _shard_faults(store: Store, shards: list[ShardInfo], manifest: Manifest) -> Iterator[str]:
    tasks = ({"name": each.name, "shard": json.dumps(asdict(each))} for each in shards)
    function = partial(check_shard, store=store, categories=manifest.categories)
    found: dict[str, Task] = {}
    with tqdm(total=manifest.totals.rows, unit=" images", desc="verify-data", disable=None) as bar:
        for row in run_tasks(function, tasks) if shards else ():
            found[row["name"]] = row
            bar.update(len(row["ids"]) // 8)
    faults = [fault for shard in shards for fault in json.loads(found[shard.name]["faults"])]
    yield from faults
    yield from _twins({name: _ids(row["ids"]) for name, row in found.items()})
    if not faults and len(shards) == len(manifest.shards):
        yield from _sums(manifest.totals, list(found.values()))


def _sums(totals: Totals, found: list[Task]) -> Iterator[str]:
    """What all shards together have other than stated."""
    images = np.concatenate([_ids(b""), *(_ids(row["images"]) for row in found)])
    for what, stated, there in (
        ("rows", totals.rows, len(images)),
        ("images", totals.rows - totals.further_tiles, len(np.unique(images))),
        ("instances", totals.instances, sum(row["instances"] for row in found)),
    ):
        if stated != there:
            yield f"{FILE_NAME}: {stated} {what} are stated, {there} are in the shards"


def _ids(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.int64)


def _twins(ids: dict[str, np.ndarray]) -> Iterator[str]:
    """Image ids that come twice, in whichever shards."""
    names = sorted(ids)
    all_ids = np.concatenate([ids[name] for name in names]) if names else np.zeros(0, np.int64)
    order = np.argsort(all_ids, kind="stable")
    twice = order[1:][all_ids[order][1:] == all_ids[order][:-1]]
    starts = np.cumsum([0, *(len(ids[name]) for name in names)])
    for index in twice[:FAULTS_TOLD].tolist():
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        where = f"{names[shard]} row {index - starts[shard]}"
        yield f"{where}: image id {all_ids[index]} comes twice ({len(twice)} such rows in all)"


@failing_in_words
def check_shard(task: Task, store: Store, categories: tuple[Category, ...]) -> Task:
    """A task: {name, shard: ShardInfo as JSON} -> {name, faults (JSON list), ids, images (int64 bytes), instances}."""
    info = ShardInfo(**json.loads(task["shard"]))
    check = _ShardCheck(info, categories)
    with store.local_copy(info.name) as path:
        faults = list(check.run(path))
    if len(faults) > FAULTS_TOLD:
        faults[FAULTS_TOLD:] = [f"and {len(faults) - FAULTS_TOLD} faults more"]
    told = json.dumps([f"{info.name}{' ' if each.startswith('row ') else ': '}{each}" for each in faults])
    ids, images = (np.array(each, np.int64).tobytes() for each in (check.ids, check.images))
    return {"name": info.name, "faults": told, "ids": ids, "images": images, "instances": check.instances}


class _ShardCheck:
    """One pass over a shard; `ids` of rows, `images` that they are of, `tall` and `instances` are what it has found."""

    def __init__(self, info: ShardInfo, categories: tuple[Category, ...]) -> None:
        self.info, self.categories = info, categories
        self.ids: list[int] = []
        self.images: list[int] = []
        self.tall: list[bool] = []
        self.instances = 0

    def run(self, path: Path) -> Iterator[str]:
        """What is wrong, the whole file first."""
        if not path.is_file():  # to read a pipe would take for ever
            yield "it is missing, or not a regular file"
            return
        try:
            size = path.stat().st_size
            if size != self.info.bytes:
                yield f"it has {size} bytes, {self.info.bytes} are stated"
            if checksum(path) != self.info.xxh128:
                yield "its checksum is not the stated one"
        except OSError as error:
            yield f"it cannot be read: {_in_one_line(error)}"
            return
        try:
            with pa.memory_map(str(path)) as mapped:
                yield from self._file_faults(pa.ipc.open_file(mapped))
        except UNREADABLE as error:
            yield f"it is no Arrow file: {_in_one_line(error)}"

    def _file_faults(self, reader: pa.RecordBatchFileReader) -> Iterator[str]:
        if not reader.schema.equals(SHARD, check_metadata=True):
            yield "its schema is not that of this version"
            return
        if reader.num_record_batches != self.info.rows:
            yield f"it has {reader.num_record_batches} rows, {self.info.rows} are stated"
        for i in range(reader.num_record_batches):
            for fault in self._row_faults(reader, i):
                yield f"row {i}: {fault}"
        if self.info.portrait != portrait_bits(self.tall):
            yield "which rows are taller than wide is not as stated"

    def _row_faults(self, reader: pa.RecordBatchFileReader, number: int) -> Iterator[str]:
        try:
            batch = reader.get_batch(number)
            batch.validate(full=True)
            if batch.num_rows != 1 or batch["image"].null_count:
                yield f"{batch.num_rows} rows where one should be, or no image"
                return
            row: dict[str, Any] = batch.drop_columns(["image"]).to_pylist()[0]
        except UNREADABLE as error:
            yield f"it cannot be read: {_in_one_line(error)}"
            return
        self.ids.append(row["image_id"] if row["image_id"] is not None else -1)
        image_id = row["tile"]["image_id"] if row["tile"] else row["image_id"]
        self.images.append(image_id if image_id is not None else -1)
        self.tall.append((row["height"] or 0) > (row["width"] or 0))
        self.instances += len(row["instances"] or ())
        yield from row_faults(row, memoryview(batch["image"][0].as_buffer()).cast("B"), self.categories)
