"""When workers look for orders, and what they make of a notice."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import orders
from jobs.orders import Order, Orders, StopRequest


class World:
    """The clocks, Ray's notice and the driver's request, as a test sets them."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.notice: Any = None
        self.asked = 0
        self.request = False

    def look(self) -> Any:
        self.asked += 1
        return self.notice


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(orders.time, "monotonic", lambda: world.seconds)
    monkeypatch.setattr(orders.time, "time", lambda: world.seconds)
    monkeypatch.setattr(orders.ray.train, "get_preemption_info", world.look)
    monkeypatch.setattr(StopRequest, "is_made", lambda self: world.request)
    return world


def heeded(world: World, steps: int, seconds_a_step: float) -> dict[int, Order]:
    """What is ordered at which steps of so many."""
    found = {}
    own = Orders(StopRequest("test"), rank=0, world_size=1)
    for step in range(1, steps + 1):
        world.seconds += seconds_a_step
        order = own.at(step)
        if order is not Order.GO_ON:
            found[step] = order
    return found


def test_workers_look_about_every_two_seconds(world: World) -> None:
    heeded(world, 2000, 0.05)  # 100 s
    assert 45 <= world.asked <= 65
    world.asked = 0
    heeded(world, 20, 10.0)
    assert world.asked == 20


def test_the_driver_s_request_is_seen(world: World) -> None:
    world.request = True
    assert heeded(world, 1, 0.1) == {1: Order.STOP}


def test_a_notice_saves_at_once_and_shortly_before_its_deadline(world: World) -> None:
    world.notice = SimpleNamespace(deadline_ms=1_030_000.0)  # at second 1030
    assert heeded(world, 25, 1.0) == {1: Order.SAVE, 20: Order.SAVE}


def test_a_notice_without_a_deadline_saves_once(world: World) -> None:
    world.notice = SimpleNamespace(deadline_ms=None)
    assert heeded(world, 25, 1.0) == {1: Order.SAVE}


def test_a_worker_s_first_sigterm_is_noted_while_it_trains_and_the_next_one_ends_it() -> None:
    ended: list[int] = []
    noted = orders._SignalOfWorker()
    before = signal.signal(signal.SIGTERM, lambda signum, frame: ended.append(signum))
    try:
        noted.install()
        signal.raise_signal(signal.SIGTERM)
        assert (noted.received, len(ended)) == (False, 1)
        with noted.noted():
            signal.raise_signal(signal.SIGTERM)
            assert (noted.received, len(ended)) == (True, 1)
            signal.raise_signal(signal.SIGTERM)
        assert len(ended) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
