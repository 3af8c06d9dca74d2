"""What is known of a training between two reports: losses, images, throughput, time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from jobs.config import TrainConfig
from jobs.engine import Losses, read_losses


class Meter:
    """Losses, throughput and time spent waiting for data since the last report."""

    def __init__(self, config: TrainConfig) -> None:
        self.global_batch = config.global_batch
        self.restart()
        self.losses: list[Losses] = []
        self.image_ids: list[list[int]] = []
        self.names: list[str] = []
        self.seconds = self.wait_seconds = 0.0
        self.total_images, self.total_seconds = 0, 0.0
        self.last_loss: float | None = None

    def restart(self) -> None:
        """Do not count what passed since the last step: evaluation and checkpoints are not training."""
        self.mark = time.monotonic()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time in here as data-wait."""
        started = time.monotonic()
        yield
        self.wait_seconds += time.monotonic() - started

    def add(self, losses: Losses, image_ids: list[int]) -> None:
        """One step is done, on these images of this rank."""
        self.losses.append(losses)
        self.image_ids.append(image_ids)
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def read(self) -> tuple[Tensor, list[list[int]], dict[str, float]]:
        """Losses (steps, names), image ids of the steps, and perf/...; then start over."""
        started = time.monotonic()
        self.names = list(self.losses[0])
        losses, image_ids = read_losses(self.losses), self.image_ids  # on a GPU the host waits here for the steps
        self.seconds += time.monotonic() - started
        images = len(self.losses) * self.global_batch
        self.total_images, self.total_seconds = self.total_images + images, self.total_seconds + self.seconds
        speed = {
            "perf/images_per_second": images / self.seconds,
            "perf/step_seconds": self.seconds / len(self.losses),
            "perf/data_wait_share": self.wait_seconds / self.seconds,
        }
        self.losses, self.image_ids, self.seconds, self.wait_seconds = [], [], 0.0, 0.0
        return losses, image_ids, speed

    def note(self) -> str:
        """What a bar says between two reports: the last one's loss, and the speed since then by the host's clock:
        it waits for nothing."""
        loss = f"loss {self.last_loss:.3f}, " if self.last_loss is not None else ""
        if not self.losses:
            return loss.removesuffix(", ")
        rate, wait = len(self.losses) * self.global_batch / self.seconds, self.wait_seconds / self.seconds
        return f"{loss}{rate:.1f} images/s, data-wait {wait:.0%}"

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
