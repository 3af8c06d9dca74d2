"""Which images the workers of a training have taken, and a way to make them wait: for tests that kill some of them.

`record` runs in each process of a Ray cluster that `environment` was given to.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

FOLDER = "MRCNN_TEST_SEEN"
SAVE_SECONDS = "MRCNN_TEST_SAVE_SECONDS"
"""That a checkpoint's writing takes longer"""
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Taken:
    """What a worker has taken for a step."""

    run: str
    began: float
    """When the worker did, in seconds of the clock"""
    at: float
    step: int
    rank: int
    workers: int
    pid: int
    node: str
    """IP address"""
    images: tuple[int, ...]
    """None where it begins"""


def environment(folder: Path) -> dict[str, str]:
    """Of the nodes."""
    return {
        # the root, too: without it the folder tests/mrcnn would be taken for a package
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{record.__name__}",
        FOLDER: str(folder),
    }


def record() -> None:
    """Make the workers of this process write down what they take, before a step, and wait where they are told to."""
    import jobs.worker

    original = jobs.worker._Worker._stream

    def stream(self: jobs.worker._Worker) -> Iterator[Any]:
        folder, began = Path(os.environ[FOLDER]), time.time()
        run = self.phase.run_uri.rsplit("/", 1)[-1]

        def note(step: int, images: tuple[int, ...]) -> None:
            taken = Taken(run, began, time.time(), step, self.rank, self.world_size, os.getpid(), _node(), images)
            with (folder / f"{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps(asdict(taken)) + "\n")

        note(self.engine.step, ())
        with closing(original(self)) as batches:  # type: ignore[type-var]
            for batch in batches:
                step = self.engine.step + 1
                note(step, batch.image_ids)
                while (folder / f"hold-{run}-{step}").exists():
                    time.sleep(0.02)
                yield batch

    jobs.worker._Worker._stream = stream  # type: ignore[method-assign]
    if seconds := os.environ.get(SAVE_SECONDS):
        _slow_down_saving(float(seconds))


def _slow_down_saving(seconds: float) -> None:
    import jobs.checkpoint

    original = jobs.checkpoint.Checkpoints.save

    def save(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **kwargs)

    jobs.checkpoint.Checkpoints.save = save  # type: ignore[method-assign]


def _node() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())


class Seen:
    """What was recorded in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hold(self, run: str, step: int) -> Path:
        """The workers of a run wait before a step until this file is removed."""
        file = self.folder / f"hold-{run}-{step}"
        file.touch()
        return file

    def attempts(self, run: str) -> int:
        """How often workers have begun to train."""
        return sum(each.rank == 0 and not each.images for each in self._records(run))

    def taken(self, run: str) -> list[Taken]:
        """In the order of time."""
        return [each for each in self._records(run) if each.images]

    def _records(self, run: str) -> list[Taken]:
        lines = [line for file in self.folder.glob("*.jsonl") for line in file.read_text().splitlines(keepends=True)]
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        records = [Taken(**{**each, "images": tuple(each["images"])}) for each in found]
        return sorted((each for each in records if each.run == run), key=lambda each: each.at)

    def wait_for(
        self, run: str, condition: Callable[[Taken], bool], *, count: int, still: Callable[[], bool]
    ) -> list[Taken]:
        """The first `count` records of a run that fulfil a condition, while the training is still there."""
        until = time.monotonic() + 240
        while True:
            running = still()
            found = [each for each in self.taken(run) if condition(each)]
            if len(found) >= count:
                return found[:count]
            assert running, "the training has ended"
            assert time.monotonic() < until
            time.sleep(0.05)

    def images(self, run: str) -> list[int]:
        """What the weights at the end have seen, in order: of each step its last workers' images."""
        by_step: dict[int, list[Taken]] = {}
        for each in self.taken(run):
            by_step.setdefault(each.step, []).append(each)
        images: list[int] = []
        for step in sorted(by_step):
            last = max(by_step[step], key=lambda each: each.at)
            # those of one attempt begin together, those of the next only after them
            group = [each for each in by_step[step] if each.workers == last.workers][-last.workers :]
            assert {each.rank for each in group} == set(range(last.workers)), group
            images += [image for each in sorted(group, key=lambda each: each.rank) for image in each.images]
        return images
