"""SIGTERM and SIGINT to the driver of a training: its workers save a checkpoint first (see jobs/orders.py)."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

DRIVER_SECONDS = 40.0  # that the driver waits for the workers; `mrcnn jobs stop` kills it after 60


class Stopped(KeyboardInterrupt):
    """A run has ended because it was told to; it can go on with --resume."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f"; {where}" if where else ""))
        self.exit_code = 128 + signum


class Signals:
    """SIGTERM and SIGINT of the driver within a block of its main thread; elsewhere they stay as they are.

    They raise `Stopped`; while `wait_for` waits for workers, the first one asks these to save and end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._ask: Callable[[], None] | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, signum
        if again or self._ask is None:
            raise Stopped(signum)
        self._asked_at = time.monotonic()
        print(f"{signal.Signals(signum).name}: saving a checkpoint (once more: end at once)", flush=True)
        self._ask()

    def wait_for(self, work: Callable[[], object], ask: Callable[[], None]) -> None:
        """Do what waits for workers. Raises what it raises, and `Stopped` where they do not end in time.

        It runs in a thread: Ray handles SIGINT in its own way where it is called from the main thread.
        """
        failed: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True, name="fit")
        self._ask = ask
        try:
            thread.start()
            while thread.is_alive():
                thread.join(0.2)
                if self.received is not None and time.monotonic() - self._asked_at > DRIVER_SECONDS:
                    raise Stopped(
                        self.received, f"the workers have not ended in {DRIVER_SECONDS:.0f} s; go on with --resume"
                    )
        finally:
            self._ask = None
        if failed:
            raise failed[0]
