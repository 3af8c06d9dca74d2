"""Where the time of a prediction goes: seconds of each stage, measured in the actors and added up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

STAGES = ("reading", "decoding", "model", "masks", "writing")
"""masks: from mask probabilities to run lengths. Reading, decoding and masks go on in threads beside the model."""
WAITING = "waiting"
"""Of the model, for decoded images"""
BUSY_SHARE = 0.5  # of an actor's time: below it the model is not what limits


class Stopwatch:
    """Seconds by stage. Threads may add at once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the block by the clock on the wall."""
        with self._measured(stage, time.perf_counter):
            yield

    @contextmanager
    def cpu(self, stage: str) -> Iterator[None]:
        """Measure the block by what this thread takes of a CPU: a stage beside others waits for them, too."""
        with self._measured(stage, time.thread_time):
            yield

    @contextmanager
    def _measured(self, stage: str, clock: Callable[[], float]) -> Iterator[None]:
        begun = clock()
        try:
            yield
        finally:
            self.add({stage: clock() - begun})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what others have measured."""
        with self._lock:
            for stage, each in seconds.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + each


def describe(seconds: Mapping[str, float], *, images: int, wall: float) -> str:
    """The share of each stage, the speed of one actor, and what limits it; `wall` is the time of all actors."""
    parts = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    total = sum(parts.values()) or 1.0
    shares = ", ".join(f"{stage} {100 * each / total:.0f} %" for stage, each in parts.items())
    return f"time: {shares}; {images / wall:.1f} images/s an actor; {_limit(parts, seconds, wall)}"


def _limit(parts: Mapping[str, float], seconds: Mapping[str, float], wall: float) -> str:
    waiting = seconds.get(WAITING, 0.0) / wall
    if parts["model"] / wall >= BUSY_SHARE or waiting < 0.1:
        slowest = max(("model", "masks", "writing"), key=lambda stage: parts[stage])
    else:
        slowest = max(("reading", "decoding"), key=lambda stage: parts[stage])
    return f"what limits it: {slowest}; the model works {100 * parts['model'] / wall:.0f} % of the time"
