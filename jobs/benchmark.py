"""`mrcnn benchmark`: the model and its operators against torchvision's, with the same weights and inputs.

Both take turns in one process, so that what else the machine does falls on both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

from jobs.benchmark_cases import BENCHMARKS, Case, Sizes
from jobs.benchmark_names import BenchmarkName

PROFILE_ROWS = 15


@dataclass(frozen=True)
class Timing:
    """Medians of one case, milliseconds."""

    what: str
    ours: float
    torchvision: float
    repeats: int

    @property
    def ratio(self) -> float:
        """How many times as fast as torchvision's ours is."""
        return self.torchvision / self.ours


@dataclass(frozen=True)
class Report:
    """What `mrcnn benchmark` prints and writes."""

    benchmark: BenchmarkName
    machine: dict[str, str | int]
    timings: tuple[Timing, ...]
    profiles: tuple[str, ...] = ()

    def __str__(self) -> str:
        machine = "\n".join(f"{name}: {value}" for name, value in self.machine.items())
        width = max(len(one.what) for one in self.timings)
        lines = [f"{self.benchmark:{width}}  {'ours ms':>10}  {'torchvision ms':>14}  {'ratio':>6}"]
        lines += [f"{t.what:{width}}  {t.ours:10.2f}  {t.torchvision:14.2f}  {t.ratio:6.2f}" for t in self.timings]
        return "\n".join([machine, "", *lines, *(f"\n{text}" for text in self.profiles)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the profiles."""
        timings = [{**asdict(timing), "ratio": timing.ratio} for timing in self.timings]
        return {"benchmark": self.benchmark, "machine": self.machine, "milliseconds": timings}

    def write(self, file: str) -> None:
        """Write `to_dict` as a local JSON file."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def run_benchmark(
    name: BenchmarkName,
    *,
    threads: int = 2,
    repeats: int = 5,
    device: str = "cpu",
    sizes: Sizes | None = None,
    with_profile: bool = False,
) -> Report:
    """Measure every case of a benchmark: one call of each to warm up, then ours and torchvision's in turn.

    Raises:
        ValueError: for a device that is not there, or numbers below 1.
    """
    for argument, value in (("threads", threads), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{argument} is {value}, but must be at least 1: 2 threads and 5 repeats are the default")
    where = _device(device)
    with torch_threads(threads):
        cases = BENCHMARKS[name](sizes or Sizes(), where)
        timings = tuple(_measure(case, repeats, where) for case in cases)
        profiles = [_profile(case, where) for case in cases] if with_profile else []
    return Report(name, machine_of(where, threads), timings, tuple(profiles))


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used ({first_line}): give cpu or cuda") from error
    return torch.device(name)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch in this process, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(case: Case, repeats: int, device: torch.device) -> Timing:
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for i in range(repeats + 1):
        for who, function in (("ours", case.ours), ("peer", case.peer)):
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            if i > 0:
                seconds[who].append(time.perf_counter() - start)
    ours, peer = (1000 * statistics.median(seconds[who]) for who in ("ours", "peer"))
    return Timing(case.what, ours, peer, repeats)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(case: Case, device: torch.device) -> str:
    """Where ours and torchvision's spend their time, the largest entries first."""
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities, order = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
    texts = []
    for who, function in (("ours", case.ours), ("torchvision", case.peer)):
        with profile(activities=activities) as profiled:
            function()
            _wait(device)
        table = profiled.key_averages().table(sort_by=order, row_limit=PROFILE_ROWS, max_name_column_width=60)
        texts.append(f"{case.what}, {who}\n{table}")
    return "\n".join(texts)


def machine_of(device: torch.device, threads: int) -> dict[str, str | int]:
    """What a table of timings has to name."""
    machine: dict[str, str | int] = {"CPU": _cpu_name(), "cores": os.cpu_count() or 1, "threads": threads}
    if device.type == "cuda":
        machine |= {"GPU": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda)}
    return machine | {"torch": torch.__version__, "torchvision": torchvision.__version__}


def _cpu_name() -> str:
    """The processor's name, which Python alone does not tell on Linux."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
