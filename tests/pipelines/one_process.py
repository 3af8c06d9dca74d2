"""Builds without Ray."""

from __future__ import annotations

import pytest
from inline import run_inline

from pipelines.build import BuildSummary, build
from pipelines.config import BuildConfig


def build_here(config: BuildConfig) -> BuildSummary:
    """`build` with its tasks one after another in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.build.run_tasks", run_inline)
        return build(config)
