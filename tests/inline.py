"""Tasks and builds without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

from pipelines.attempts import Task
from pipelines.build import BuildSummary, build
from pipelines.config import BuildConfig
from pipelines.tasks import checked


def run_inline(function: Callable[[Task], Task], tasks: Iterable[Task]) -> Iterator[Task]:
    """As `pipelines.tasks.run_tasks`, one after another in this process."""
    return (checked(function(task)) for task in tasks)


def build_here(config: BuildConfig) -> BuildSummary:
    """`build` with its tasks one after another in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.build.run_tasks", run_inline)
        return build(config)
