"""Bars on the terminal of a training's driver, which its first worker moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from ray.experimental import tqdm_ray

T = TypeVar("T")


class Bar:
    """A bar at the foot of the driver's terminal, or nothing at all if it is not `shown`.

    It comes there as Ray's log lines do, at most one message a second, and other lines appear above it. Moving it costs
    nothing and waits for nothing.
    """

    def __init__(self, label: str, total: int, unit: str, *, shown: bool) -> None:
        self.shown, self._label = shown, label
        self._bar = tqdm_ray.tqdm(desc=label, total=total, unit=unit) if shown else None

    def move(self, done: int, note: str = "") -> None:
        """So much of the total is done; the note stands beside it."""
        if self._bar:
            self._bar.n = done
            self._bar.set_description(f"{self._label} {note}" if note else self._label)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()


def counted(items: Iterable[T], label: str, total: int, unit: str, *, shown: bool) -> Iterator[T]:
    """The items, with a bar that counts them."""
    with Bar(label, total, unit, shown=shown) as bar:
        for done, item in enumerate(items):
            bar.move(done)
            yield item
        bar.move(total)
