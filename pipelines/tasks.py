"""Many tasks through Ray Data, some at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext

from pipelines.attempts import Task, begin_or_explain, count_attempts
from pipelines.prefetch import batched

AHEAD = 64  # tasks a CPU is given at once: what the driver holds a second time, and Ray's object store a third
TOGETHER = 16  # tasks that one process does without a pause, at most
FAILURES: dict[str, type[Exception]] = {
    error.__name__: error for error in (PermissionError, FileNotFoundError, ValueError, RuntimeError)
}


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


def _run_counted(task: Task, *, function: Callable[[Task], Task], attempts: Any) -> Task:
    result = begin_or_explain(attempts, task["name"])
    if result is None:
        result = function(task)
    attempts.end.remote(task["name"], result)
    return result


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
