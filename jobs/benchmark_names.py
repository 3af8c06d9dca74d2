"""What `mrcnn benchmark` can time."""

from __future__ import annotations

from typing import Literal

BenchmarkName = Literal["model-eval", "train-step", "roi-align", "nms", "masks"]
"""Against torchvision's (jobs/benchmark_cases.py)"""
AnyBenchmarkName = Literal[BenchmarkName, "build-data", "train-overhead"]
