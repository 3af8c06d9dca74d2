"""Waiting for a storage that is away: what takes days should not end because a server restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from pipelines.storage_errors import UnreachableError

R = TypeVar("R")

GIVE_UP_SECONDS = 600.0
BETWEEN_TRIES = 2.0


def patiently(call: Callable[[], R], *, seconds: float = GIVE_UP_SECONDS, unwanted: Event | None = None) -> R:
    """The result of a call that may be made again, once the storage answers; says when it waits, and when that is over.

    Raises UnreachableError when that has taken `seconds`, or as soon as the result is `unwanted`.
    """
    unwanted = unwanted or Event()
    away_since = None
    while True:
        try:
            result = call()
        except UnreachableError as error:
            if away_since is None:
                away_since = time.monotonic()
                print(f"warning: {error}; trying again for up to {seconds / 60:.0f} min", flush=True)
            if time.monotonic() - away_since + BETWEEN_TRIES > seconds:
                raise
            if unwanted.wait(BETWEEN_TRIES):
                raise
            continue
        if away_since is not None:
            print(f"the storage answers again, after {time.monotonic() - away_since:.0f} s", flush=True)
        return result
