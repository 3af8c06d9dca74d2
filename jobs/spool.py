"""A queue to a receiver that may be away, such as MLflow.

Whoever puts something in never waits for the receiver: a thread sends it, in order, and tries again with growing
pauses. What is not sent yet is in memory, and in files of the spool's folder once it has to outlive the process
(`keep`) or becomes much. A spool sends first what others have left in its folder, be they dead or alive. Everything
arrives at least once, in case of doubt twice: the receiver has to be one that takes the same thing twice without harm.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from jobs.redaction import in_one_line
from pipelines.storage import Store

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries
GATHER_SECONDS = 5.0  # between two deliveries of parts
MEMORY = 16 * 2**20  # bytes that may wait in memory
BATCH = 500  # parts of a file that are sent at once


@dataclass(frozen=True)
class Item:
    """Something to send."""

    name: str
    """Of the file that it is, or is a part of"""
    data: bytes


Send = Callable[[Sequence[Item]], None]
"""Gives items to the receiver; raises whatever it likes if that did not work"""


class Spool:
    """The queue, its folder and its thread.

    Items of one name are parts of one file where `parts`, and are sent many at a time; otherwise each is a whole file,
    of which the newest one of a name counts, and is sent alone. `receiver` names it in warnings.
    """

    def __init__(self, store: Store, send: Send, *, receiver: str, parts: bool = False) -> None:
        self.store, self.receiver = store, receiver
        self.error: str | None = None
        """Why the newest try failed; None while the receiver answers"""
        self._send, self._parts = send, parts
        self._waiting: deque[Item] = deque()
        self._kept: deque[str] | None = None  # files in the folder, oldest first; None until somebody has looked
        self._progress = 0  # a count
        self._closing = self._stopped = False
        self._changed = threading.Condition()  # guards all of the above
        self._keeping = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"spool to {receiver}", daemon=True)
        self._thread.start()

    def put(self, *items: Item) -> None:
        """Add items. Waits for nobody but, where very much is waiting already, for the folder's storage."""
        with self._changed:
            self._waiting.extend(items)
            too_much = sum(len(item.data) for item in self._waiting) > MEMORY
            self._changed.notify_all()
        if too_much:
            self.keep()

    def keep(self) -> None:
        """Write what is not sent yet to the folder: once this returns, the death of the process loses none of it.

        Raises what the store raises.
        """
        with self._keeping:
            with self._changed:
                items = list(self._waiting)
            folder = f"{time.time_ns():020d}"
            files = {f"{folder}/{name}": data for name, data in self._as_files(items).items()}
            for name, data in files.items():
                self.store.write_bytes(name, data)
            with self._changed:
                self._forget(items)
                self._kept = self._kept if self._kept is None else deque([*self._kept, *files])

    def close(self, patience: float) -> None:
        """Send what is left, but wait no longer than `patience` seconds for a sign of progress; keep the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._has_work() and self._progresses(patience):
                pass
        self.keep()
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=FIRST_PAUSE)  # it may be in the middle of a try that takes minutes

    def _progresses(self, patience: float) -> bool:
        before = self._progress
        return self._changed.wait_for(lambda: self._progress != before, patience)

    def _as_files(self, items: Sequence[Item]) -> dict[str, bytes]:
        files: dict[str, list[bytes]] = {}
        for item in items:
            parts = files.setdefault(item.name, [])
            if not self._parts:
                parts.clear()
            parts.append(item.data)
        return {name: b"".join(parts) for name, parts in files.items()}

    def _has_work(self) -> bool:
        return self._kept is None or bool(self._kept) or bool(self._waiting)

    def _forget(self, items: Sequence[Item]) -> None:
        gone = {id(item) for item in items}
        self._waiting = deque(item for item in self._waiting if id(item) not in gone)

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._has_work())
                if self._stopped:
                    return
            try:
                self._send_next()
            except Exception as error:  # whatever it is: it must not stop a training, and it will be told
                self._failed(error)
                self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = FIRST_PAUSE

    def _send_next(self) -> None:
        if self._kept is None:
            self._look()
        elif self._kept:
            self._send_kept(self._kept[0])
        else:
            with self._changed:
                items = list(islice(self._waiting, BATCH if self._parts else 1))
            if items:  # they may have been kept in between
                self._deliver(items)
            with self._changed:
                self._forget(items)
                self._count_progress()
                if self._parts and not self._waiting:  # let some come together: they cost little more than one
                    self._changed.wait_for(lambda: self._closing, GATHER_SECONDS)

    def _look(self) -> None:
        """Find what earlier spools have left."""
        with self._keeping:  # what is being kept is found, or added by `keep`, but not both
            found = sorted(self.store.list())
            with self._changed:
                self._kept = deque(found)
                self._count_progress()

    def _send_kept(self, name: str) -> None:
        folder, _, own_name = name.partition("/")
        try:
            items = [Item(own_name, self.store.read_bytes(name))]
        except FileNotFoundError:
            items = []  # another process has sent it
        if items:
            self._deliver(items)
            with suppress(FileNotFoundError):
                self.store.remove(name)
        self.store.remove_empty_folders(folder)  # another process may be about to write more into it
        assert self._kept is not None
        with self._changed:
            self._kept.remove(name)
            self._count_progress()

    def _deliver(self, items: Sequence[Item]) -> None:
        self._send(items)
        if self.error is not None:
            print(f"{self.receiver} answers again", flush=True)
        self.error = None

    def _count_progress(self) -> None:
        self._progress += 1
        self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        """At the end there is no time for long ones."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds)
            self._changed.wait_for(lambda: self._stopped, FIRST_PAUSE)

    def _failed(self, error: Exception) -> None:
        if self.error is None:
            print(f"warning: {self.receiver} does not answer, what is logged waits: {in_one_line(error)}", flush=True)
        self.error = in_one_line(error)
