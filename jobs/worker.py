"""What each training worker does. Rank 0 also writes checkpoints, logs and the model."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jobs.checkpoint import Checkpoints, Progress
from jobs.compiled import compile_backbones
from jobs.config import TrainConfig
from jobs.engine import Engine, learning_rate
from jobs.evaluate import found_kinds, judge_rows, metrics_of
from jobs.evaluations import Evaluations, ap_metrics
from jobs.guards import (
    SKIPPED,
    BatchTooLargeError,
    NonFiniteLossError,
    check_finite_weights,
    check_losses,
    check_skipped,
    is_out_of_memory,
    too_large,
)
from jobs.meter import Meter, progress_line
from jobs.orders import Order, Orders, StopRequest, WorkersEndedError, termination
from jobs.progress import Bar, counted
from jobs.ranks import all_image_ids, gather, mean_over_ranks, same_on_all_ranks
from jobs.schedule import PhaseOfRun
from jobs.stream import training_stream
from jobs.tracking import RunHandle
from jobs.tracking_log import RunLogger
from jobs.tracking_system import gpu_memory
from mrcnn.distributed import train_together
from mrcnn.model import MaskRCNN
from mrcnn.structures import Category
from mrcnn.training_parts import TrainedPart
from mrcnn.visualize import draw_detections
from mrcnn.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights, model_files, model_from_files
from pipelines.dataset import ShardDataset
from pipelines.loader import Batch
from pipelines.proposals import ProposalDataset
from pipelines.storage import Store, open_store

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
    stopped: bool = False
    """Whether it was told to end before its last step"""


@dataclass(frozen=True)
class WorkerSettings:
    """All that a worker is told. Credentials are not in here: they are in its environment."""

    config: TrainConfig
    data: str
    val_data: str
    run: RunHandle
    weights: str | None
    phase: PhaseOfRun
    request: StopRequest
    """The driver's way to end it"""
    bars: bool = False
    """Whether the driver has a terminal for bars"""
    proposals: str | None = None
    """URI of those that the phase trains on"""


def train_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train's entry: train to the last step of a phase, from the newest checkpoint if there is one.

    How it ended goes to OUTCOME_FILE in the phase's folder: Ray brings back metrics only with a checkpoint of its own.
    """
    settings: WorkerSettings = loop_config["settings"]
    store = open_store(settings.phase.uri)
    if store.exists(OUTCOME_FILE):  # a worker has given up, and Ray has started others in its place
        return
    worker = _Worker(settings)
    try:
        with termination.noted():
            outcome = worker.run()
    except NonFiniteLossError as error:  # on all ranks at once; another try would end the same, so do not ask for one
        outcome = Outcome(failure=str(error))
    except BatchTooLargeError as error:  # on one rank, for which the others wait: Ray has to end them
        _write_outcome(store, Outcome(failure=str(error)))
        raise
    finally:
        worker.end_log()
    if ray.train.get_context().get_world_rank() == 0:
        _write_outcome(store, outcome)


def _write_outcome(store: Store, outcome: Outcome) -> None:
    store.write_bytes(OUTCOME_FILE, json.dumps(asdict(outcome), indent=1).encode())


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
        if self.config.compile:
            compile_backbones(self.model)
        part = TrainedPart(self.model, self.phase.phase.part, self.phase.phase.learns)
        distributed = None
        if self.world_size > 1:
            assert dist.group.WORLD is not None
            train_together(part, dist.group.WORLD)
            distributed = DistributedDataParallel(part, gradient_as_bucket_view=True)
        self.engine = Engine(distributed or part, self.config, device)
        self.meter = Meter(self.config)
        self.orders = Orders(settings.request, rank=self.rank, world_size=self.world_size)
        self.saved_step = 0
        self._shows_bars = settings.bars and self.rank == 0
        self.skipped = 0  # steps with a loss that was not finite, of this attempt

    def run(self) -> Outcome:
        """Train what is left, evaluate, export the model."""
        newest = same_on_all_ranks(max(self.checkpoints.steps(), default=0), self.world_size, self.engine.device)
        if newest:
            self.checkpoints.restore(self.model, self.engine, newest)
            self._say(f"going on from {self.checkpoints.store.uri} at step {newest}")
        metrics: dict[str, float] | None = None
        with closing(self._stream()) as stream, self._bar() as bar:
            while self.engine.step < self.config.steps:
                self._train_step(stream)
                bar.move(self.engine.step, self.meter.note())
                metrics = self._after_step()
                if self.engine.step < self.config.steps and self._heed_orders() is Order.STOP:
                    return Outcome(self._step_of_run, stopped=True)
        self._export()
        if metrics is None:  # nothing was left to train
            metrics = self._evaluate()
        return Outcome(self._step_of_run, metrics, self.meter.images_per_second)

    def _bar(self) -> Bar:
        bar = Bar(f"{self.phase.label}training", self.config.steps, "step", shown=self._shows_bars)
        bar.move(self.engine.step)
        return bar

    def _stream(self) -> Generator[Batch]:
        proposals = self.settings.proposals
        return training_stream(
            self.config,
            self.data,
            rank=self.rank,
            world_size=self.world_size,
            start_images=self.phase.first_step * self.config.global_batch + self.engine.images_seen,
            pin_memory=self.engine.device.type == "cuda",
            proposals=ProposalDataset(proposals, self.data.manifest) if proposals else None,
        )

    @property
    def _step_of_run(self) -> int:
        """What is logged; the engine, its learning rate and the checkpoints count the steps of the phase."""
        return self.phase.first_step + self.engine.step

    def _train_step(self, stream: Iterator[Batch]) -> None:
        image_ids: list[int] = []
        ends_step = False
        while not ends_step:
            with self.meter.waiting_for_data():
                batch = next(stream)
            self._accumulate(batch)
            image_ids += batch.image_ids
            ends_step = batch.ends_step
        self.meter.add(self.engine.update(), image_ids)

    def _accumulate(self, batch: Batch) -> None:
        part = batch.images, batch.targets, batch.proposals
        try:
            self.engine.accumulate(*part, weight=batch.weight, ends_step=batch.ends_step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise too_large(batch.images, batch.targets, batch.image_ids, self._step_of_run + 1) from error

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

    def _heed_orders(self) -> Order:
        """Save if that is asked for. Raises WorkersEndedError, on all ranks, where one of them was told to end."""
        order = self.orders.at(self.engine.step)
        if order >= Order.SAVE:
            if self.saved_step != self.engine.step:
                if self.meter.losses:
                    self._log()
                self._save()
            self.meter.restart()
        if order is Order.RESTART:
            raise WorkersEndedError("a training worker was told to end (SIGTERM); the others ended with it")
        return order

    def _save(self) -> None:
        """Every rank looks at the weights, which are the same, so that all of them stop if they are spoilt."""
        step = self.saved_step = self.engine.step
        check_finite_weights(self.model, step)
        if self.logger:
            self.logger.keep()  # what is due before a checkpoint is not logged again by those who go on from it
            progress = Progress(step, self.engine.images_seen, self.config.seed, self.data.manifest.digest)
            self.checkpoints.save(self.model, self.engine, progress, keep=self.config.keep_checkpoints)

    def _log(self) -> None:
        step = self.engine.step
        steps, image_ids, speed = self.meter.read()
        losses = self._checked(steps, image_ids)
        if self.logger:
            rate = learning_rate(step - 1, self.config)
            self.logger.metrics({f"train/{name}": value for name, value in losses.items()}, self._step_of_run)
            skipped = {"train/skipped_batches": float(self.skipped)} if self.config.skips_allowed else {}
            perf = {**speed, **gpu_memory(self.engine.device)}
            self.logger.metrics({**perf, "train/learning_rate": rate, **skipped}, self._step_of_run)
        self.meter.last_loss = losses.get("loss")
        if not self._shows_bars:
            self._say(progress_line(step, self.config.steps, losses, speed, self.config.global_batch))

    def _checked(self, steps: Tensor, image_ids: list[list[int]]) -> dict[str, float]:
        """Means of the losses of the steps since the last report, over all ranks. Raises NonFiniteLossError, on all
        ranks, where one of them is not finite or too many were skipped."""
        names, first_step = self.meter.names, self._step_of_run - len(steps) + 1
        steps = mean_over_ranks(steps, self.world_size, self.engine.device)
        of_steps = [dict(zip(names, row, strict=True)) for row in steps.tolist()]
        skipped = [step for step in of_steps if step.get(SKIPPED)]
        self.skipped += len(skipped)
        if skipped or not bool(steps.isfinite().all()):
            everyones = all_image_ids(image_ids, self.world_size)
            check_losses(of_steps, first_step=first_step, image_ids=everyones)
            last = max((i for i, step in enumerate(of_steps) if step.get(SKIPPED)), default=-1)
            check_skipped(self.skipped, self.config.skips_allowed, step=first_step + last, image_ids=everyones[last])
        taken = steps[[i for i, step in enumerate(of_steps) if not step.get(SKIPPED)]]
        losses = dict(zip(names, taken.mean(dim=0).tolist(), strict=True)) if len(taken) else {}
        return {name: value for name, value in losses.items() if name != SKIPPED}

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
        seen = counted(mine, "evaluation", len(mine), "image", shown=self._shows_bars)
        rows = gather(judge_rows(self.model, self.val_data, seen), self.rank, self.world_size)
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
