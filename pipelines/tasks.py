"""Many tasks through Ray Data, some at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from itertools import islice
from typing import Any

import ray
import ray.data
from ray.data import DataContext

AHEAD = 64  # tasks a CPU is given at once: what the driver holds a second time, and Ray's object store a third
TRIES = 4  # of a task whose process dies
FAILURES: dict[str, type[Exception]] = {
    error.__name__: error for error in (PermissionError, FileNotFoundError, ValueError, RuntimeError)
}

Task = dict[str, Any]


def run_tasks(function: Callable[[Task], Task], tasks: Iterable[Task]) -> Iterator[Task]:
    """`function`, made by `failing_in_words`, of each task, one CPU for each, as they end. Ray must be running.

    What it raised is raised here. RuntimeError where a task's process dies again and again.
    """
    assert ray.is_initialized(), "start Ray first, see jobs/cluster.py"
    context = DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; callers count images
    context.memory_usage_poll_interval_s = None  # a walk through all memory maps each second, for statistics
    attempts = count_attempts()
    waiting, many = iter(tasks), AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    while some := list(islice(waiting, many)):
        dataset = ray.data.from_items(some, override_num_blocks=len(some))
        counted = partial(_run_counted, function=function, attempts=attempts)
        yield from map(checked, dataset.map(counted, num_cpus=1).iter_rows())


def count_attempts() -> Any:
    """Handle of a new `_Attempts`, for `begin_or_explain`. It counts anew if its node dies."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()


class _Attempts:
    """Actor: how often each task was begun. Ray Data itself tries for ever one whose process dies, as a file may make
    it that crashes its decoder."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        self._begun[name] += 1
        return self._begun[name]


def _run_counted(task: Task, *, function: Callable[[Task], Task], attempts: Any) -> Task:
    return begin_or_explain(attempts, task["name"]) or function(task)


def begin_or_explain(attempts: Any, name: str) -> Task | None:
    """Count that a task of this name begins; what it returns at once instead, where it has begun too often."""
    if ray.get(attempts.begin.remote(name)) <= TRIES:
        return None
    message = (
        f"{name}: its process died {TRIES} times: memory is short, or a file of it crashes its decoder (see "
        "the logs of Ray). What is finished is kept, the same command goes on"
    )
    return {"failure": RuntimeError.__name__, "message": message}


def checked(row: Task) -> Task:
    """What a task has returned; raises what it has raised."""
    if row["failure"]:
        raise FAILURES[row["failure"]](row["message"])
    return row


def failing_in_words(function: Callable[..., Task]) -> Callable[..., Task]:
    """A task that returns what it raises, if a user can mend it, as {failure, message}: Ray would wrap it in an error
    of its own, and print a traceback."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Task:
        try:
            return {**function(*args, **kwargs), "failure": "", "message": ""}
        except (ValueError, OSError) as error:
            kind = next((name for name, kind in FAILURES.items() if isinstance(error, kind)), ValueError.__name__)
            return {"failure": kind, "message": str(error)}
        except MemoryError as error:
            message = f"memory is short ({error}): give fewer --cpus, each of which works on images of its own"
            return {"failure": RuntimeError.__name__, "message": message}

    return guarded
