"""Evaluation beside training: workers save checkpoints that are due to be evaluated, and go on.

A thread of the driver has each of them evaluated by a Ray task, one after the other, on a device that training does not
take. What is due is known from the checkpoints' folder alone (jobs/checkpoint.py), so that nothing is forgotten,
whoever dies. An evaluation that fails does not stop the training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from jobs.cluster import cluster_size
from jobs.config import TrainJob
from jobs.evaluate import found_kinds, judge_rows, metrics_of
from jobs.redaction import in_one_line
from jobs.tracking import RunHandle
from jobs.tracking_log import RunLogger
from jobs.validation import Validation, evaluation_line
from jobs.worker import WorkerSettings
from mrcnn.weights import model_from_files
from pipelines.dataset import ShardDataset
from pipelines.patience import GIVE_UP_SECONDS
from pipelines.storage_errors import UnreachableError

TRIES = 3  # of an evaluation
SECONDS = 2.0  # between two looks for checkpoints that are due


def evaluates_beside(job: TrainJob, *, use_gpu: bool) -> bool:
    """Whether a training is evaluated beside it: if that is wanted and the cluster has room; says so if not."""
    if job.evaluate_beside == "no":
        return False
    workers = job.worker_range.most
    if _has_room(workers, use_gpu=use_gpu):
        return True
    kind = "GPUs" if use_gpu else "CPUs"
    print(f"evaluating within training: the cluster has no more {kind} than training may take ({workers})", flush=True)
    return False


def _has_room(workers: int, *, use_gpu: bool) -> bool:
    """Whether the cluster has one more of what each worker takes: a GPU, or a CPU where there are none.

    On a CPU an evaluation could not keep up with training on GPUs.
    """
    return cluster_size().total("GPU" if use_gpu else "CPU") > workers


@contextmanager
def evaluating_beside(settings: WorkerSettings, *, workers: int, use_gpu: bool) -> Iterator[None]:
    """Evaluate a phase's checkpoints while the block trains it; it ends when all that are due are evaluated.

    Does nothing where `settings` does not ask for it, or the phase does not end with a whole detector. Where the block
    raises, what is due remains so. Raises what the storage raises at the end.
    """
    if not (settings.evaluate_beside and settings.phase.is_last):
        yield
        return
    evaluator = _Evaluator(settings, workers=workers, use_gpu=use_gpu)
    with ThreadPoolExecutor(1, thread_name_prefix="evaluating beside training") as pool:
        work = pool.submit(evaluator.work)
        try:
            yield
            evaluator.training_ended.set()
            work.result()
        finally:
            evaluator.abandoned.set()
            evaluator.training_ended.set()


def evaluate_checkpoint(validation: Validation, handle: RunHandle, step: int) -> dict[str, float]:
    """A Ray task: evaluate the checkpoint of a step as a training worker does, and log it. Returns what was found.

    One model is in memory, and none of the optimizer's state.
    """
    data, checkpoints = ShardDataset(validation.val_data), validation.checkpoints
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    model = model_from_files(checkpoints.read_model(step), checkpoints.uri(step), device=device)
    model.to(memory_format=torch.channels_last)  # as in training, to the bit
    rows = judge_rows(model, data, range(len(data)))
    found = metrics_of(rows, data.categories, found_kinds(model.config))
    logger = RunLogger(handle, validation.phase.run_uri)
    try:
        return validation.record(step, found, model, logger)
    finally:
        logger.close(patience=2)


class _Evaluator:
    """What the driver's thread does."""

    def __init__(self, settings: WorkerSettings, *, workers: int, use_gpu: bool) -> None:
        self.validation, self.handle, self.label = settings.validation, settings.run, settings.phase.label
        self.training_ended, self.abandoned = threading.Event(), threading.Event()
        self._workers, self._use_gpu = workers, use_gpu
        # max_retries: Ray itself would try without end where memory is short
        device: dict[str, Any] = {"num_cpus": 0 if use_gpu else 1, "num_gpus": int(use_gpu), "max_retries": 0}
        self._task = ray.remote(**device)(evaluate_checkpoint)

    def work(self) -> None:
        """Evaluate what is due until training has ended and nothing is due any more, or all is abandoned."""
        away_since = None
        while not self.abandoned.is_set():
            try:
                if self._look():
                    return
                away_since = None
            except (OSError, ValueError) as error:  # of the storage
                if away_since is None:
                    away_since = time.monotonic()
                    self._say(f"warning: evaluation waits for the storage: {in_one_line(error)}")
                patience = GIVE_UP_SECONDS if isinstance(error, UnreachableError) else 0
                if self.training_ended.is_set() and time.monotonic() - away_since >= patience:
                    raise
                self.abandoned.wait(SECONDS)

    def _look(self) -> bool:
        """Evaluate one checkpoint, or wait a little where none is due. Returns whether there is nothing more to do."""
        ended = self.training_ended.is_set()  # before looking: no checkpoint can come after that
        due = self.validation.checkpoints.due()
        # where a node is lost, training comes first
        if due and (ended or _has_room(self._workers, use_gpu=self._use_gpu)):
            if ended:
                self._say(f"training is done, evaluating step {due[0]}")
            self._evaluate(due[0])
        elif not ended:
            self.training_ended.wait(SECONDS)
        return ended and not due

    def _evaluate(self, step: int) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                self._run(step)
                return
            except RayError as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, UnreachableError):
                    raise error.cause from None  # the storage's fault
                reason = _reason(error)
            if self.abandoned.is_set():
                return
            self._say(f"warning: evaluating step {step} failed, try {attempt} of {TRIES}: {reason}")
            self.abandoned.wait(SECONDS)
        logger = RunLogger(self.handle, self.validation.phase.run_uri)
        try:
            self.validation.record_failure(step, reason, logger)
        finally:
            logger.close(patience=2)

    def _run(self, step: int) -> None:
        """Raises RayError, whatever the reason."""
        started = time.monotonic()
        running = self._task.remote(self.validation, self.handle, step)
        while not ray.wait([running], timeout=1)[0]:
            if self.abandoned.is_set():
                ray.cancel(running, force=True)
        metrics = ray.get(running)
        self._say(f"{evaluation_line(step, metrics)} (beside training, {time.monotonic() - started:.0f} s)")

    def _say(self, line: str) -> None:
        print(f"{self.label}{line}", flush=True)


def _reason(error: RayError) -> str:
    """In a line: what the task has raised, or what became of its process."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    is_plain = isinstance(cause, (RayError, OSError, ValueError))
    return in_one_line(cause) if is_plain else f"{type(cause).__name__}: {in_one_line(cause)}"
