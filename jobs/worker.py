"""What each training worker does. Rank 0 also writes checkpoints, logs and the model."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jobs.checkpoint import Checkpoints, DamagedCheckpointError, Progress, load_model_files
from jobs.compiled import compile_backbones
from jobs.config import TrainConfig
from jobs.engine import Engine, learning_rate
from jobs.evaluate import found_kinds, judge_rows, metrics_of
from jobs.guards import (
    SKIPPED,
    check_finite_weights,
    check_losses,
    check_skipped,
    is_out_of_memory,
    too_large,
)
from jobs.meter import Meter, progress_line
from jobs.orders import Order, Orders, StopRequest, WorkersEndedError, termination
from jobs.progress import Bar, counted
from jobs.ranks import all_image_ids, gather, list_of_rank_0, mean_over_ranks, same_on_all_ranks
from jobs.redaction import in_one_line
from jobs.schedule import PhaseOfRun
from jobs.stream import training_stream
from jobs.tracking import RunHandle
from jobs.tracking_log import RunLogger
from jobs.tracking_system import gpu_memory
from jobs.validation import Validation, evaluation_line
from mrcnn.distributed import train_together
from mrcnn.model import MaskRCNN
from mrcnn.structures import Category
from mrcnn.training_parts import TrainedPart
from mrcnn.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights, model_files, model_from_files
from pipelines.dataset import ShardDataset
from pipelines.loader import Batch
from pipelines.patience import patiently
from pipelines.proposals import ProposalDataset
from pipelines.storage import Store, open_store

OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How training, or a phase of it, ended."""

    step: int = 0
    """Of the run"""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last step, which the driver adds; none where it could not be evaluated"""
    images_per_second: float = 0.0
    """Of training proper, over all workers; 0 if nothing was left to train"""
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
    evaluate_beside: bool = False
    """Whether others evaluate the checkpoints (jobs/beside.py)"""

    @property
    def validation(self) -> Validation:
        """Of the phase's checkpoints."""
        return Validation(self.phase, self.val_data, self.config.pictures)


def train_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train's entry: train to the last step of a phase, from the newest checkpoint if there is one.

    What came of it goes to OUTCOME_FILE in the phase's folder: Ray brings back metrics only with a checkpoint of its
    own. What it raises decides whether Ray tries again (jobs/failures.py).
    """
    settings: WorkerSettings = loop_config["settings"]
    worker = _Worker(settings)
    try:
        with termination.noted():
            outcome = worker.run()
    finally:
        worker.end_log()
    if ray.train.get_context().get_world_rank() == 0:
        _write_outcome(open_store(settings.phase.uri), outcome)


def _write_outcome(store: Store, outcome: Outcome) -> None:
    data = json.dumps(asdict(outcome), indent=1).encode()
    patiently(lambda: store.write_bytes(OUTCOME_FILE, data))


class _Worker:
    """One training process: what it trains, and when it logs, evaluates and saves."""

    def __init__(self, settings: WorkerSettings) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.settings, self.config, self.phase = settings, settings.config, settings.phase
        self.data, self.val_data = (patiently(partial(ShardDataset, uri)) for uri in (settings.data, settings.val_data))
        self.checkpoints = Checkpoints(self.phase.uri)
        self.logger = RunLogger(settings.run, self.phase.run_uri, machine=True) if self.rank == 0 else None
        # Ray's own choice would be the first GPU of the machine where Ray has given it none
        device = get_device() if ray.get_gpu_ids() else torch.device("cpu")
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
        self._evaluate_what_is_due()
        self._go_on()
        with closing(self._stream()) as stream, self._bar() as bar:
            while self.engine.step < self.config.steps:
                self._train_step(stream)
                bar.move(self.engine.step, self.meter.note())
                self._after_step()
                if self.engine.step < self.config.steps and self._heed_orders() is Order.STOP:
                    return Outcome(self._step_of_run, stopped=True)
        self._export()
        return Outcome(self._step_of_run, images_per_second=self.meter.images_per_second)

    def _go_on(self) -> None:
        """Load the newest good checkpoint, if there is one: rank 0 finds it, and the others take the same."""
        step = self.checkpoints.restore_newest(self.model, self.engine) if self.rank == 0 else 0
        step = same_on_all_ranks(step, self.world_size, self.engine.device)
        if step and self.rank > 0:
            self.checkpoints.restore(self.model, self.engine, step)
        workers = f"{self.world_size} worker{'s' if self.world_size > 1 else ''}"
        if step:
            self._say(f"going on from {self.checkpoints.store.uri} at step {step} with {workers}")
        else:
            self._say(f"beginning with {workers}")

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
            proposals=patiently(partial(ProposalDataset, proposals, self.data.manifest)) if proposals else None,
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

    def _after_step(self) -> None:
        """What is due after a step: log, save, evaluate."""
        step, config = self.engine.step, self.config
        is_last = step == config.steps
        evaluate = self.phase.is_last and (step % config.evaluate_every == 0 or is_last)
        save = step % config.checkpoint_every == 0 or evaluate or is_last
        if step % config.log_every == 0 or save:  # a checkpoint is logged, too: nothing that is not finite is kept
            self._log()
        if save:
            self._save(to_evaluate=evaluate)
        if evaluate and not self.settings.evaluate_beside:
            self._evaluate(step)
        self.engine.model.train()  # as the phase has it: after an evaluation the bare model trains what is fixed, too
        self.meter.restart()

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
            self.orders.wait_for_all()  # Ray kills them all at the first error: rank 0 might be saving still
            raise WorkersEndedError("a training worker was told to end (SIGTERM); the others ended with it")
        return order

    def _save(self, *, to_evaluate: bool = False) -> None:
        """Every rank looks at the weights, which are the same, so that all of them stop if they are spoilt."""
        step, config = self.engine.step, self.config
        self.saved_step = step
        check_finite_weights(self.model, step)
        if self.logger:
            patiently(self.logger.keep)  # what is due before is not logged again by those who go on from here
            progress = Progress(step, self.engine.images_seen, config.seed, self.data.manifest.digest)
            keep = config.keep_checkpoints
            self.checkpoints.save(self.model, self.engine, progress, keep=keep, to_evaluate=to_evaluate)

    def _log(self) -> None:
        step = self.engine.step
        steps, image_ids, speed = self.meter.read()
        losses = self._checked(steps, image_ids)
        if self.logger:
            rate = learning_rate(step - 1, self.config)
            self.logger.metrics({f"train/{name}": value for name, value in losses.items()}, self._step_of_run)
            skipped = {"train/skipped_batches": float(self.skipped)} if self.config.skips_allowed else {}
            perf = {**speed, **gpu_memory(self.engine.device), "perf/workers": float(self.world_size)}
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

    def _evaluate_what_is_due(self) -> None:
        """Checkpoints whose evaluation was not finished when an earlier attempt was killed, and the last one in any
        case: what is asked for now may end earlier."""
        if not self.phase.is_last:
            return
        if self.rank == 0 and self.config.steps in patiently(self.checkpoints.steps):
            self.checkpoints.mark_to_evaluate(self.config.steps)
        if self.settings.evaluate_beside:
            return
        due = list_of_rank_0(patiently(self.checkpoints.due) if self.rank == 0 else [], self.world_size)
        initial = deepcopy(self.model.state_dict()) if due else {}
        for step in due:
            try:
                files = self.checkpoints.read_model(step)
            except DamagedCheckpointError as error:  # the same on every rank
                self._tell_failure(step, error)
            else:
                load_model_files(self.model, files, self.checkpoints.uri(step))
                self._evaluate(step)
        if due:
            self.model.load_state_dict(initial)

    def _evaluate(self, step: int) -> None:
        """COCO AP of the checkpoint of a step, which the model is: each rank detects in its share of the validation
        images, rank 0 computes and has the numbers."""
        if self.world_size > 1:  # batch norm's statistics of the last step are each rank's own: rank 0's are saved
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
        mine = range(self.rank, len(self.val_data), self.world_size)
        seen = counted(mine, "evaluation", len(mine), "image", shown=self._shows_bars)
        rows = gather(judge_rows(self.model, self.val_data, seen), self.rank, self.world_size)
        if self.logger:
            found = metrics_of(rows, self.val_data.categories, found_kinds(self.config.model))
            metrics = self.settings.validation.record(step, found, self.model, self.logger)
            self._say(evaluation_line(step, metrics))

    def _tell_failure(self, step: int, error: Exception) -> None:
        if self.logger:
            self._say(f"warning: step {step} is not evaluated: {in_one_line(error)}")
            self.settings.validation.record_failure(step, in_one_line(error), self.logger)

    def end_log(self) -> None:
        """Write the rest of what is logged; the driver writes what cannot be written in a moment."""
        if self.logger:
            self.logger.close(patience=2)

    def _export(self) -> None:
        if self.rank == 0:
            store = open_store(self.phase.model_uri)
            for name, data in model_files(self.model).items():
                patiently(partial(store.write_bytes, name, data))

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
    """A model from its folder in any store, which is waited for."""
    store = open_store(uri)
    files = {name: patiently(partial(store.read_bytes, name)) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    return model_from_files(files, uri)
