"""How a build's tasks are dealt out to its CPUs."""

from __future__ import annotations

import pytest

from pipelines.tasks import TOGETHER, _together


@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 24, 128, 1000])
def test_each_cpu_gets_the_same_until_little_is_left(count: int, cpus: int) -> None:
    tasks = [{"name": str(i)} for i in range(count)]
    parts = list(_together(tasks, cpus))
    assert [task for part in parts for task in part] == tasks
    sizes = [len(part) for part in parts]
    assert all(0 < size <= TOGETHER for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1:] in ([], [1]), "nobody is waited for long"
    turns = [sizes[i : i + cpus] for i in range(0, len(sizes), cpus)]
    assert all(len(set(turn)) == 1 for turn in turns[:-1]), "all begin and end together"
