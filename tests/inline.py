"""Tasks without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipelines.tasks import Task, checked


def run_inline(function: Callable[[Task], Task], tasks: Iterable[Task]) -> Iterator[Task]:
    """As `pipelines.tasks.run_tasks`, one after another in this process."""
    return (checked(function(task)) for task in tasks)
