"""What training workers are told on the way: to save, or to save and end.

SIGTERM or SIGINT to the driver    it asks the workers, which save a checkpoint and end (see jobs/stopping.py).
SIGTERM to a worker                all workers save a checkpoint and end with an error, after which Ray starts others.
Ray's preemption notice            the workers save at once, and again shortly before the deadline, at which Ray starts
                                   others elsewhere.

Workers look every few seconds, between two steps. They agree on the step by a message from host to host: none of them
waits for its device.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_put

LOOK_SECONDS = 2.0  # between two looks
LAST_SAVE_SECONDS = 10.0  # before the deadline of a preemption


class StopRequest:
    """The driver's word to the workers of one attempt, in Ray's own key-value store: that needs no process, as an actor
    would, and no request to the run's storage every few seconds."""

    def __init__(self, attempt: str) -> None:
        self._key = f"mrcnn-stop-{attempt}"

    def make(self) -> None:
        """Ask the workers to save and end."""
        _internal_kv_put(self._key, b"1")

    def is_made(self) -> bool:
        """Whether they shall."""
        return bool(_internal_kv_exists(self._key))

    def withdraw(self) -> None:
        """Leave nothing behind."""
        _internal_kv_del(self._key)


class Order(IntEnum):
    """What the workers have to do, in order of importance."""

    GO_ON = 0
    SAVE = 1
    RESTART = 2
    """Save and end; Ray starts other workers"""
    STOP = 3
    """Save and end the run"""


class WorkersEndedError(RuntimeError):
    """The workers have saved and ended because one of them was told to; Ray starts others."""


class Orders:
    """The orders for a worker's process group: every rank gets the same ones at the same steps."""

    def __init__(self, request: StopRequest, *, rank: int, world_size: int) -> None:
        self._request, self._rank, self._world_size = request, rank, world_size
        needs_group = world_size > 1 and dist.get_backend() != "gloo"  # nccl would queue behind the device's work
        self._group: Any = dist.new_group(backend="gloo") if needs_group else None
        self._looked_at, self._looked_step, self._next_step = time.monotonic(), -1, 0
        self._notice: Any = None
        self._saves_left: list[float] = []  # times of the clock, of rank 0

    def at(self, step: int) -> Order:
        """What to do after a step, counted in this phase; nothing, in no time, at most steps."""
        if step < self._next_step:
            return Order.GO_ON
        order, ahead = self._agree(max(self._preemption(), self._told()), self._steps_ahead(step))
        self._looked_at, self._looked_step, self._next_step = time.monotonic(), step, step + ahead
        return order

    def wait_for_all(self) -> None:
        """Wait until every rank calls it, too."""
        if self._world_size > 1:
            dist.barrier(group=self._group)

    def _told(self) -> Order:
        if self._rank == 0 and self._request.is_made():
            return Order.STOP
        return Order.RESTART if termination.received else Order.GO_ON

    def _preemption(self) -> Order:
        """Every rank asks Ray, which answers them all the same; the clock of rank 0 decides when to save."""
        notice = ray.train.get_preemption_info()
        now = time.time()
        if notice is not None and notice != self._notice:
            self._notice, self._saves_left = notice, [now]
            if notice.deadline_ms is not None:
                self._saves_left.append(max(now, notice.deadline_ms / 1000 - LAST_SAVE_SECONDS))
        due = [each for each in self._saves_left if each <= now]
        self._saves_left = [each for each in self._saves_left if each > now]
        return Order.SAVE if due and self._rank == 0 else Order.GO_ON

    def _steps_ahead(self, step: int) -> int:
        """Steps until the next look, by the pace since the last one."""
        seconds = max(time.monotonic() - self._looked_at, 1e-6)
        done = step - self._looked_step if self._looked_step >= 0 else 0
        return min(max(1, int(done * LOOK_SECONDS / seconds)), 2 * max(done, 1))

    def _agree(self, order: Order, ahead: int) -> tuple[Order, int]:
        if self._world_size == 1:
            return order, ahead
        both = torch.tensor([int(order), ahead if self._rank == 0 else 0])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        return Order(int(both[0])), int(both[1])


class _SignalOfWorker:
    """SIGTERM to a training worker. Its main thread handles it when Ray next runs something there: within a second, as
    Ray asks workers for their state."""

    def __init__(self) -> None:
        self.received = False
        self.is_training = False
        self._before: Any = None

    def install(self) -> None:
        """Call it in the main thread."""
        self._before = signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the block the first SIGTERM is only noted; all others end the process, as Ray has it."""
        self.is_training = True
        try:
            yield
        finally:
            self.is_training = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.is_training and not self.received:
            self.received = True
        else:
            self._before(signum, frame)


termination = _SignalOfWorker()
"""Of this process"""
