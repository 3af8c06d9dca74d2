"""Many tasks through Ray Data, some at a time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from pipelines.prefetch import batched

AHEAD = 64  # tasks a CPU is given at once: what the driver holds a second time, and Ray's object store a third
TRIES = 4  # of a task whose process dies
TOGETHER = 16  # tasks that one process does without a pause, at most
FAILURES: dict[str, type[Exception]] = {
    error.__name__: error for error in (PermissionError, FileNotFoundError, ValueError, RuntimeError)
}

Task = dict[str, Any]


def run_tasks(function: Callable[[Task], Task], tasks: Iterable[Task]) -> Iterator[Task]:
    """`function`, made by `failing_in_words`, of each task, one CPU for each, as they end. Ray must be running.

    What it raised is raised here, when all that had been begun has ended: nothing is left half made, or lost that was
    nearly done. RuntimeError where a task's process dies again and again.
    """
    assert ray.is_initialized(), "start Ray first, see jobs/cluster.py"
    context = DataContext.get_current()
    context.enable_progress_bars = False  # they count blocks; callers count images
    context.memory_usage_poll_interval_s = None  # a walk through all memory maps each second, for statistics
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    attempts = count_attempts(remembered=2 * TOGETHER * cpus)
    for some in batched(tasks, AHEAD * cpus):
        dataset = ray.data.from_arrow([pa.Table.from_pylist(each) for each in _together(some, cpus)])
        dataset.context.target_max_block_size = 1  # a row is handed on when the next is there, not with the last
        counted = partial(_run_counted, function=function, attempts=attempts)
        rows = iter(dataset.map(counted, num_cpus=1).iter_rows())
        for row in rows:
            if row["failure"]:
                deque(rows, maxlen=0)  # none of them begins any more
            yield checked(row)


def _together(tasks: Sequence[Task], cpus: int) -> Iterator[Sequence[Task]]:
    """Cut so that each process has some to do one after another: after them it waits for Ray Data, which looks every
    0.1 s for who has ended. All CPUs are given the same, then three quarters of what is left: in the end, where one has
    work and others none, it is little."""
    start = 0
    while left := len(tasks) - start:
        count = min(max(left * 3 // 4 // cpus, 1), TOGETHER)
        end = min(start + cpus * count, len(tasks))
        yield from (tasks[i : min(i + count, end)] for i in range(start, end, count))
        start = end


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


def _run_counted(task: Task, *, function: Callable[[Task], Task], attempts: Any) -> Task:
    result = begin_or_explain(attempts, task["name"])
    if result is None:
        result = function(task)
    attempts.end.remote(task["name"], result)
    return result


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
            return {"failure": "", "message": "", **function(*args, **kwargs)}
        except (ValueError, OSError) as error:
            kind = next((name for name, kind in FAILURES.items() if isinstance(error, kind)), ValueError.__name__)
            return {"failure": kind, "message": str(error)}
        except MemoryError as error:
            message = f"memory is short ({error}): give fewer --cpus, each of which works on images of its own"
            return {"failure": RuntimeError.__name__, "message": message}

    return guarded
