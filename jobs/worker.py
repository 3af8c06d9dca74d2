"""What each training worker does. Rank 0 also writes checkpoints, logs and the model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from torch.nn.parallel import DistributedDataParallel

from jobs.checkpoint import Checkpoints, Progress
from jobs.config import TrainConfig
from jobs.engine import (
    Engine,
    Losses,
    NonFiniteLossError,
    check_finite,
    check_finite_weights,
    learning_rate,
    read_losses,
)
from jobs.evaluate import JudgedRow, found_kinds, judge_rows, metrics_of
from jobs.evaluations import Evaluations, ap_metrics
from jobs.schedule import PhaseOfRun
from jobs.tracking import RunHandle
from jobs.tracking_log import RunLogger
from jobs.tracking_system import gpu_memory
from mrcnn.model import MaskRCNN
from mrcnn.structures import Category
from mrcnn.training_parts import TrainedPart
from mrcnn.visualize import draw_detections
from mrcnn.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights, model_files, model_from_files
from pipelines.augment import Augmentation
from pipelines.dataset import ShardDataset
from pipelines.loader import Batch, batches
from pipelines.proposals import ProposalDataset
from pipelines.storage import open_store

OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How training, or a phase of it, ended."""

    step: int = 0
    """Of the run"""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation; none where a phase does not end with a whole detector"""
    images_per_second: float = 0.0
    """Of training proper, over all workers; 0 if nothing was left to train"""
    failure: str | None = None
    """Why the workers gave up, if they did"""


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker is told. Credentials are not in here: they are in its environment."""

    config: TrainConfig
    data: str
    val_data: str
    run: RunHandle
    weights: str | None
    phase: PhaseOfRun
    proposals: str | None = None
    """URI of those that the phase trains on"""


def train_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train's entry: train to the last step of a phase, from the newest checkpoint if there is one.

    How it ended goes to OUTCOME_FILE in the phase's folder: Ray brings back metrics only with a checkpoint of its own.
    """
    settings: WorkerSettings = loop_config["settings"]
    worker = _Worker(settings)
    try:
        outcome = worker.run()
    except NonFiniteLossError as error:  # on all ranks at once; another try would end the same, so do not ask for one
        outcome = Outcome(failure=str(error))
    finally:
        worker.end_log()
    if ray.train.get_context().get_world_rank() == 0:
        open_store(settings.phase.uri).write_bytes(OUTCOME_FILE, json.dumps(asdict(outcome), indent=1).encode())


class _Worker:
    """One training process: what it trains, and when it logs, evaluates and saves."""

    def __init__(self, settings: WorkerSettings) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.settings, self.config, self.phase = settings, settings.config, settings.phase
        self.data, self.val_data = ShardDataset(settings.data), ShardDataset(settings.val_data)
        self.checkpoints = Checkpoints(self.phase.uri)
        self.logger = RunLogger(settings.run, self.phase.run_uri, machine=True) if self.rank == 0 else None
        device = get_device()
        self.model = initial_model(settings, self.data.categories)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        part = TrainedPart(self.model, self.phase.phase.part, self.phase.phase.learns)
        distributed = DistributedDataParallel(part, gradient_as_bucket_view=True) if self.world_size > 1 else None
        self.engine = Engine(distributed or part, self.config, device)
        self.meter = Meter(self.config)

    def run(self) -> Outcome:
        """Train what is left, evaluate, export the model."""
        newest = same_on_all_ranks(max(self.checkpoints.steps(), default=0), self.world_size, self.engine.device)
        if newest:
            self.checkpoints.restore(self.model, self.engine, newest)
            self._say(f"going on from {self.checkpoints.store.uri} at step {newest}")
        metrics: dict[str, float] | None = None
        with closing(self._stream()) as stream:  # type: ignore[type-var]
            while self.engine.step < self.config.steps:
                self._train_step(stream)
                metrics = self._after_step()
        self._export()
        if metrics is None:  # nothing was left to train
            metrics = self._evaluate()
        return Outcome(self._step_of_run, metrics, self.meter.images_per_second)

    def _stream(self) -> Iterator[Batch]:
        proposals = self.settings.proposals
        return batches(
            self.data,
            seed=self.config.seed,
            global_batch=self.config.global_batch,
            rank=self.rank,
            world_size=self.world_size,
            start_images=self.phase.first_step * self.config.global_batch + self.engine.images_seen,
            aspect_groups=self.config.aspect_groups,
            augmentation=augmentation_of(self.config),
            pin_memory=self.engine.device.type == "cuda",
            threads=self.config.loader_threads,
            network_input=self.config.model.input,
            proposals=ProposalDataset(proposals, self.data.manifest) if proposals else None,
        )

    @property
    def _step_of_run(self) -> int:
        """What is logged; the engine, its learning rate and the checkpoints count the steps of the phase."""
        return self.phase.first_step + self.engine.step

    def _train_step(self, stream: Iterator[Batch]) -> None:
        with self.meter.waiting_for_data():
            batch = next(stream)
        self.meter.add(self.engine.train_step(batch.images, batch.targets, batch.proposals))

    def _after_step(self) -> dict[str, float] | None:
        """What is due after a step: log, save, evaluate. Returns the metrics of an evaluation."""
        step, config = self.engine.step, self.config
        is_last = step == config.steps
        save = step % config.checkpoint_every == 0 or is_last
        if step % config.log_every == 0 or save:  # a checkpoint is logged, too: nothing that is not finite is kept
            self._log()
        if save:
            self._save()
        metrics = self._evaluate() if step % config.evaluate_every == 0 or is_last else None
        self.engine.model.train()  # as the phase has it: after an evaluation the bare model trains what is fixed, too
        self.meter.restart()
        return metrics

    def _save(self) -> None:
        """Every rank looks at the weights, which are the same, so that all of them stop if they are spoilt."""
        step = self.engine.step
        check_finite_weights(self.model, step)
        if self.logger:
            self.logger.keep()  # what is due before a checkpoint is not logged again by those who go on from it
            progress = Progress(step, self.engine.images_seen, self.config.seed, self.data.manifest.digest)
            self.checkpoints.save(self.model, self.engine, progress, keep=self.config.keep_checkpoints)

    def _log(self) -> None:
        step = self.engine.step
        losses, speed = self.meter.read()
        losses = mean_over_ranks(losses, self.world_size, self.engine.device)
        check_finite(losses, step)
        if self.logger:
            rate = learning_rate(step - 1, self.config)
            self.logger.metrics({f"train/{name}": value for name, value in losses.items()}, self._step_of_run)
            perf = {**speed, **gpu_memory(self.engine.device)}
            self.logger.metrics({**perf, "train/learning_rate": rate}, self._step_of_run)
        self._say(progress_line(step, self.config.steps, losses, speed, self.config.global_batch))

    def _evaluate(self) -> dict[str, float]:
        """COCO AP on every validation image: each rank detects in its share, rank 0 computes and has the numbers.

        Nothing in a phase after which the model is not yet a whole detector.
        """
        if not self.phase.is_last:
            return {}
        if self.world_size > 1:  # batch norm's statistics of the last step are each rank's own: rank 0's are exported
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
        mine = range(self.rank, len(self.val_data), self.world_size)
        rows = gather(judge_rows(self.model, self.val_data, mine), self.rank, self.world_size)
        if self.logger is None:
            return {}
        found = metrics_of(rows, self.val_data.categories, found_kinds(self.config.model))
        metrics, evaluations = ap_metrics(found), Evaluations(self.phase.run_uri)
        evaluations.add(self._step_of_run, found)
        self.logger.metrics({**metrics, **evaluations.best()}, self._step_of_run)
        self.logger.table(evaluations.table(), "per_category_AP.json")
        self._log_pictures()
        self.logger.keep()  # those who go on from a checkpoint of this step do not evaluate it again
        self._say(f"step {self.engine.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        return metrics

    def _log_pictures(self) -> None:
        assert self.logger is not None
        for i in range(min(self.config.pictures, len(self.val_data))):
            row = self.val_data.read(i)
            (found,) = self.model.predict([row.image])
            picture = draw_detections(row.image, found, self.val_data.categories)
            self.logger.image(picture, f"val/image_{i}", self._step_of_run)

    def end_log(self) -> None:
        """Write the rest of what is logged; the driver writes what cannot be written in a moment."""
        if self.logger:
            self.logger.close(patience=2)

    def _export(self) -> None:
        if self.rank == 0:
            store = open_store(self.phase.model_uri)
            for name, data in model_files(self.model).items():
                store.write_bytes(name, data)

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(f"{self.phase.label}{line}", flush=True)


def augmentation_of(config: TrainConfig) -> Augmentation:
    """What a training does to its images."""
    return Augmentation(
        flip=config.flip,
        jitter_sides=config.jitter_sides,
        large_jitter=config.large_jitter,
        max_objects=config.max_objects,
    )


def initial_model(settings: WorkerSettings, categories: Sequence[Category]) -> MaskRCNN:
    """The model that a phase starts from: an earlier phase's, or the initial one, by seed and perhaps a file."""
    if settings.phase.start_uri:
        model = read_model(settings.phase.start_uri)
        assert model.config == settings.config.model
        return model
    torch.manual_seed(settings.config.seed)
    model = MaskRCNN(settings.config.model, categories)
    if settings.weights:
        load_weights(model, settings.weights)
    return model


def read_model(uri: str) -> MaskRCNN:
    """A model from its folder in any store."""
    store = open_store(uri)
    return model_from_files({name: store.read_bytes(name) for name in (WEIGHTS_FILE, CONFIG_FILE)}, uri)


class Meter:
    """Losses, throughput and time spent waiting for data since the last report."""

    def __init__(self, config: TrainConfig) -> None:
        self.global_batch = config.global_batch
        self.restart()
        self.losses: list[Losses] = []
        self.seconds = self.wait_seconds = 0.0
        self.total_images, self.total_seconds = 0, 0.0

    def restart(self) -> None:
        """Do not count what passed since the last step: evaluation and checkpoints are not training."""
        self.mark = time.monotonic()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time in here as data-wait."""
        started = time.monotonic()
        yield
        self.wait_seconds += time.monotonic() - started

    def add(self, losses: Losses) -> None:
        """One step is done."""
        self.losses.append(losses)
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Mean losses, and perf/...; then start over."""
        started = time.monotonic()
        losses = read_losses(self.losses)  # on a GPU the host waits here for the steps themselves
        self.seconds += time.monotonic() - started
        images = len(self.losses) * self.global_batch
        self.total_images, self.total_seconds = self.total_images + images, self.total_seconds + self.seconds
        speed = {
            "perf/images_per_second": images / self.seconds,
            "perf/step_seconds": self.seconds / len(self.losses),
            "perf/data_wait_share": self.wait_seconds / self.seconds,
        }
        self.losses, self.seconds, self.wait_seconds = [], 0.0, 0.0
        return losses, speed

    @property
    def images_per_second(self) -> float:
        """Over all reports so far."""
        return self.total_images / self.total_seconds if self.total_seconds else 0.0


def progress_line(step: int, steps: int, losses: dict[str, float], speed: dict[str, float], batch: int) -> str:
    """One line that tells how training goes."""
    parts = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
    rate = speed["perf/images_per_second"]
    minutes, seconds = divmod(round((steps - step) * batch / rate), 60)
    return (
        f"step {step}/{steps}  {parts}  {rate:.1f} images/s  "
        f"data-wait {speed['perf/data_wait_share']:.0%}  {minutes}:{seconds:02d} left"
    )


def mean_over_ranks(values: dict[str, float], world_size: int, device: torch.device) -> dict[str, float]:
    """The same numbers on every rank."""
    if world_size == 1:
        return values
    sums = torch.tensor(list(values.values()), device=device)
    dist.all_reduce(sums)
    return dict(zip(values, (sums / world_size).tolist(), strict=True))


def same_on_all_ranks(number: int, world_size: int, device: torch.device) -> int:
    """Rank 0's number."""
    if world_size == 1:
        return number
    shared = torch.tensor(number, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)


def gather(rows: list[JudgedRow], rank: int, world_size: int) -> list[JudgedRow]:
    """All ranks' rows on rank 0; elsewhere an empty list."""
    if world_size == 1:
        return rows
    everyone: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(rows, everyone)
    return [row for part in everyone or [] for row in part]
