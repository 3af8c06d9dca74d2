"""How busy the machine of rank 0 is: CPU, memory, disk, network and GPUs, as MLflow's own monitors read them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

SECONDS = 10.0  # between two samples; MLflow's own default


class SystemMonitor:
    """A thread that gives samples, named system/... as MLflow's UI expects them, to `log` until it is closed.

    MLflow's own one writes to MLflow itself, and ends when that fails once.
    """

    def __init__(self, log: Callable[[Mapping[str, float]], None]) -> None:
        self._log = log
        self._seconds = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SECONDS
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="system metrics", daemon=True).start()

    def close(self) -> None:
        """Take no more samples."""
        self._closed.set()

    def _work(self) -> None:
        monitors = _monitors()
        while not self._closed.wait(self._seconds):
            sample: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                sample |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._log({f"system/{name}": value for name, value in sample.items()})


def gpu_memory(device: torch.device) -> dict[str, float]:
    """perf/gpu_memory_gb: the most that tensors have taken on a GPU since the last call, in 1e9 bytes; no host
    synchronisation. Nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"perf/gpu_memory_gb": peak / 1e9}


def _monitors() -> list[BaseMetricsMonitor]:
    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(RuntimeError):  # there is no GPU
        monitors.append(GPUMonitor())
    return monitors
