"""Fixtures of the operators' tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """The same inputs in every run, so that a red test is a change's doing.

    MRCNN_TEST_SEED=fresh draws others, and a failing test shows the number that repeats them.
    """
    chosen = os.environ.get("MRCNN_TEST_SEED", "0")
    seed = torch.seed() % 2**32 if chosen == "fresh" else int(chosen)
    request.node.add_report_section("setup", "seed", f"MRCNN_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def roi_oracle() -> Mapping[str, np.ndarray]:
    """RoI operators' outputs and gradients of torchvision and of a numpy reference, from roi_ops.npz."""
    beside = Path(__file__).resolve().parents[4] / "shared" / "oracle"
    path = Path(os.environ.get("MRCNN_ORACLE", beside)) / "roi_ops.npz"
    if not path.is_file():
        pytest.skip(f"no {path}: set MRCNN_ORACLE to the folder of roi_ops.npz")
    return np.load(path)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU, for tests marked gpu."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
