"""Writing into a run of MLflow, without waiting for it: everything goes by a spool in the run's folder.

    <storage>/<run>/mlflow/metrics/...   metrics, tags and the status that MLflow has not got yet, as JSON lines
    <storage>/<run>/mlflow/files/...     its artifacts: pictures and tables, under the names that they get there

Both are empty while MLflow answers. Two spools, because MLflow may answer where the place of its artifacts does not.
MLflow takes the same thing twice without harm: a metric of the same key, step, time and value is there once, an
artifact of the same name is replaced.
"""

from __future__ import annotations

import io
import json
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import mlflow
import numpy as np
from mlflow.entities import Metric, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_LOGGED_IMAGES
from PIL import Image

from jobs.redaction import redact
from jobs.spool import Item, Spool
from jobs.tracking import RunHandle, clean_tags, readable_errors
from jobs.tracking_system import SystemMonitor
from pipelines.storage import Store, open_store

Status = Literal["FINISHED", "FAILED", "KILLED"]

PATIENCE = 15.0
"""Seconds without progress after which the driver gives up at the end."""

_METRIC_ROOMS = ("train", "val", "perf", "best")
_METRIC_BATCH = 1000  # MLflow's bound
_THUMBNAIL = (256, 256)  # pixels; what the UI's image grid shows
_LINES = "records.jsonl"


@dataclass(frozen=True)
class Unsent:
    """What MLflow has not got of a run; it is kept in the run's folder."""

    run_uri: str
    metrics: int
    """Values"""
    others: int
    """Tags, and the run's status"""
    files: int
    reason: str

    @property
    def counts(self) -> str:
        """In words."""
        counts = {"metric values": self.metrics, "tags and states": self.others, "files": self.files}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

    def __str__(self) -> str:
        return (
            f"MLflow lacks {self.counts}: {self.reason}\n"
            f"  kept in   {_folder(self.run_uri).uri}\n  write it  mrcnn replay-mlflow {self.run_uri}"
        )


class RunLogger:
    """Writes into a run that exists; rank 0 alone has one, and the driver when no worker is there.

    No method waits for MLflow but `close`, and none raises because of it. `run_uri` is the run's folder; `machine` asks
    for system/..., too.
    """

    def __init__(self, handle: RunHandle, run_uri: str, *, machine: bool = False) -> None:
        self._handle, self._run_uri = handle, run_uri
        self._step: int | None = None  # of the newest metrics
        self._told: dict[str, str] = {}  # tags that are set once
        self._client: mlflow.MlflowClient | None = None
        self._connecting = threading.Lock()
        folder = _folder(run_uri)
        self._records = Spool(folder.join("metrics"), self._send_records, receiver="MLflow", parts=True)
        self._files = Spool(folder.join("files"), self._send_files, receiver="MLflow's store of artifacts")
        self._monitor = SystemMonitor(self._system) if machine else None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step, named train/..., val/..., perf/... or best/..."""
        assert all(key.split("/")[0] in _METRIC_ROOMS for key in values), sorted(values)
        self._step = step
        self._put({"metrics": {key: float(value) for key, value in values.items()}, "step": step})

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, without credentials."""
        self._put({"tags": clean_tags(values)})

    def image(self, image: np.ndarray, key: str, step: int) -> None:
        """An RGB uint8 picture (H, W, 3) for the image grid of the UI; use the same keys at every step."""
        picture = Image.fromarray(image)
        # as MLflow's log_image names them, but once and for all, so that another try makes no second picture
        name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{_now()}+{uuid.uuid4()}"
        whole = Item(f"{name}.png", _encoded(picture, "png"))
        picture.thumbnail(_THUMBNAIL)
        self._files.put(whole, Item(f"{name}+compressed.webp", _encoded(picture, "webp")))
        self._tag_once(MLFLOW_LOGGED_IMAGES, "True")

    def table(self, columns: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
        """A table of equally long columns, e.g. AP by category; it replaces the one that is there."""
        rows = list(zip(*columns.values(), strict=True))
        text = json.dumps({"columns": list(columns), "data": rows}, allow_nan=False)
        self._files.put(Item(artifact_file, redact(text).encode()))
        self._tag_once(MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": artifact_file, "type": "table"}]))

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run. The driver's business: a worker cannot know whether it is retried."""
        self._put({"status": status})

    def keep(self) -> None:
        """Once this returns, the death of the process loses nothing of what has been logged."""
        self._records.keep()
        self._files.keep()

    def close(self, patience: float | None = None) -> None:
        """Write what is left, but wait no longer than `patience` seconds without progress (by default `PATIENCE`); keep
        the rest."""
        if self._monitor:
            self._monitor.close()
        patience = PATIENCE if patience is None else patience
        self._records.close(patience)
        self._files.close(0 if self._records.error else patience)  # there is no place for files without MLflow

    def unsent(self) -> Unsent | None:
        """What MLflow has not got, of what was kept."""
        return unsent(self._run_uri, self._records.error or self._files.error or "it took too long")

    def _put(self, record: Mapping[str, Any]) -> None:
        self._records.put(Item(_LINES, json.dumps({**record, "timestamp": _now()}).encode() + b"\n"))

    def _tag_once(self, key: str, value: str) -> None:
        if self._told.get(key) != value:
            self._told[key] = value
            self.tags({key: value})

    def _system(self, values: Mapping[str, float]) -> None:
        if self._step is not None:  # before, there is no step to log them at
            self._put({"metrics": dict(values), "step": self._step})

    def _connected(self) -> mlflow.MlflowClient:
        """Made by a thread of the spools: of a store in a database, this asks the database."""
        with self._connecting:
            self._client = self._client or mlflow.MlflowClient(self._handle.tracking_uri)
            return self._client

    def _send_records(self, items: Sequence[Item]) -> None:
        records = [json.loads(line) for item in items for line in item.data.splitlines()]
        metrics = [
            Metric(key, value, record["timestamp"], record["step"])
            for record in records
            for key, value in record.get("metrics", {}).items()
        ]
        tags = {key: value for record in records for key, value in record.get("tags", {}).items()}
        with readable_errors(self._handle.tracking_uri):
            client, run_id = self._connected(), self._handle.run_id
            for start in range(0, len(metrics), _METRIC_BATCH):
                client.log_batch(run_id, metrics=metrics[start : start + _METRIC_BATCH])
            if tags:
                client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()])
            for record in records:
                if "status" in record:
                    client.set_terminated(run_id, record["status"], record["timestamp"])

    def _send_files(self, items: Sequence[Item]) -> None:
        with readable_errors(self._handle.tracking_uri), tempfile.TemporaryDirectory(prefix="mrcnn-") as folder:
            for item in items:
                name = PurePosixPath(item.name)
                local = Path(folder, name.name)
                local.write_bytes(item.data)
                place = None if name.parent == PurePosixPath() else str(name.parent)
                self._connected().log_artifact(self._handle.run_id, str(local), place)


@dataclass
class RunEnd:
    """What `run_status` tells after its block."""

    unsent: Unsent | None = None


@contextmanager
def run_status(handle: RunHandle, run_uri: str) -> Iterator[RunEnd]:
    """End a run with the status that fits how the block ends, and write what the workers could not.

    That MLflow does not answer is no error of the block: what it has not got is told, and kept.
    """
    end = RunEnd()
    try:
        yield end
    except BaseException as error:
        try:
            left = _end_run(handle, run_uri, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except (OSError, ValueError) as second:  # the storage; what went wrong first matters more
            error.add_note(f"nor could the run's status be kept: {second}")
        else:
            if left:
                print(left, flush=True)
        raise
    end.unsent = _end_run(handle, run_uri, "FINISHED")


def replay(handle: RunHandle, run_uri: str) -> Unsent | None:
    """Write into a run what is kept in its folder. Returns what could not be written."""
    logger = RunLogger(handle, run_uri)
    logger.close()
    return logger.unsent()


def unsent(run_uri: str, reason: str) -> Unsent | None:
    """What is kept in a run's folder, if there is something."""
    folder = _folder(run_uri)
    store, files = folder.join("metrics"), len(list(folder.join("files").list()))
    records = [json.loads(line) for name in store.list() for line in store.read_bytes(name).splitlines()]
    metrics = sum(len(record.get("metrics", {})) for record in records)
    others = sum(len(record.get("tags", {})) + ("status" in record) for record in records)
    if not (metrics or others or files):
        return None
    return Unsent(run_uri, metrics=metrics, others=others, files=files, reason=reason)


def _end_run(handle: RunHandle, run_uri: str, status: Status) -> Unsent | None:
    logger = RunLogger(handle, run_uri)
    logger.finish(status)
    logger.close()
    return logger.unsent()


def _folder(run_uri: str) -> Store:
    return open_store(run_uri).join("mlflow")


def _now() -> int:
    """Milliseconds, as MLflow has them."""
    return time.time_ns() // 1_000_000


def _encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()
