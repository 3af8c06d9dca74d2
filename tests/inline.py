"""Tasks and builds without Ray."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import cv2
import pytest
import torch
from PIL import Image

from pipelines.attempts import Task
from pipelines.build import BuildSummary, build
from pipelines.config import BuildConfig
from pipelines.tasks import checked


def run_inline(function: Callable[[Task], Task], tasks: Iterable[Task]) -> Iterator[Task]:
    """As `pipelines.tasks.run_tasks`, one after another in this process."""
    for task in tasks:
        with _process_unchanged():
            result = function(task)
        yield checked(result)


@contextmanager
def _process_unchanged() -> Iterator[None]:
    """What a task sets for its own process is not left to the tests that come."""
    depth, threads, cv2_threads = sys.getrecursionlimit(), torch.get_num_threads(), cv2.getNumThreads()
    pixels = Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        sys.setrecursionlimit(depth)
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv2_threads)
        Image.MAX_IMAGE_PIXELS = pixels


def build_here(config: BuildConfig) -> BuildSummary:
    """`build` with its tasks one after another in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.build.run_tasks", run_inline)
        return build(config)
