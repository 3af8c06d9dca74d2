"""What `mrcnn benchmark` can time."""

from __future__ import annotations

from typing import Literal

BenchmarkName = Literal["model-eval", "train-step", "roi-align", "nms", "masks"]
"""Against torchvision's (jobs/benchmark_cases.py)"""
PredictBenchmarkName = Literal["predict", "predict-small"]
"""Against a loop around torchvision's model (jobs/benchmark_predict.py)"""
AnyBenchmarkName = Literal[BenchmarkName, PredictBenchmarkName, "build-data", "train-overhead"]
