"""How often each task of a run was begun, so that none whose process dies is tried for ever.

An actor counts. Its process imports this module, which stays small: Ray Data's took it a second of a core that tasks
could have used.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray

TRIES = 4  # of a task whose process dies

Task = dict[str, Any]


def count_attempts(remembered: int = 0) -> Any:
    """Handle of a new `_Attempts`, for `begin_or_explain`. It counts anew if its node dies."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote(remembered)


class _Attempts:
    """Actor: how often each task was begun, and what so many of the last ones ended with. After the first that failed,
    all that begin end with its failure.

    Ray Data itself tries for ever a task whose process dies, as a file may make it that crashes its decoder; and it
    then repeats those that the process has done together with it.
    """

    def __init__(self, remembered: int) -> None:
        self._begun: Counter[str] = Counter()
        self._ended: dict[str, Task] = {}
        self._remembered = remembered
        self._failure: Task | None = None

    def begin(self, name: str) -> tuple[int, Task | None]:
        if self._failure or name in self._ended:
            return 0, self._failure or self._ended[name]
        self._begun[name] += 1
        return self._begun[name], None

    def end(self, name: str, result: Task) -> None:
        if result["failure"]:
            self._failure = self._failure or result
        self._ended[name] = result
        if len(self._ended) > self._remembered:
            del self._ended[next(iter(self._ended))]


def begin_or_explain(attempts: Any, name: str) -> Task | None:
    """Count that a task of this name begins. What it returns at once instead: its result, where it has ended; why it
    fails, where it has begun too often or another has failed."""
    count, result = ray.get(attempts.begin.remote(name))
    if result is not None or count <= TRIES:
        return result
    message = (
        f"{name}: its process died {TRIES} times: memory is short, or a file of it crashes its decoder (see "
        "the logs of Ray). What is finished is kept, the same command goes on"
    )
    return {"failure": RuntimeError.__name__, "message": message}
