"""`mrcnn benchmark train-overhead`: what Ray Train and its surroundings cost, and whether the loader keeps up.

One worker of `mrcnn train` against a bare loop around the same step: the same model, loader and data, each in a process
of its own, in turn. Both read their losses at the same steps; images a second are those between two such moments, so
that neither start nor end counts. The loader is then read by a step that does nothing for 150 ms.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import ray
import torch

from jobs import tracking
from jobs.benchmark import machine_of
from jobs.cluster import ray_session
from jobs.config import OptimizerConfig, TrainConfig, TrainJob
from jobs.engine import Engine, Losses, read_losses
from jobs.presets import PRESETS
from jobs.stream import training_stream
from jobs.train import train
from mrcnn.model import MaskRCNN
from pipelines.build import build
from pipelines.config import BuildConfig
from pipelines.dataset import ShardDataset
from pipelines.toy import make_toy_data

STEP_SECONDS = 0.15


@dataclass(frozen=True)
class OverheadSizes:
    """How much is timed."""

    images: int = 32
    """Of the data set"""
    side: int = 128
    """Their shorter side in pixels, for what is trained"""
    loader_side: int = 800
    """The same for what the loader alone reads"""
    warm_up_steps: int = 60
    """Not timed: so long other processes of Ray are still about to start on the same cores"""
    steps: int = 180
    report_every: int = 5
    """Steps between two moments"""
    batch: int = 2
    loader_steps: int = 60


@dataclass(frozen=True)
class OverheadReport:
    """What `mrcnn benchmark train-overhead` prints and writes."""

    machine: dict[str, str | int]
    ray_train: float
    """Images a second, median over all intervals"""
    plain_loop: float
    data_wait_share: float
    """Of the time that goes by while steps of STEP_SECONDS run, one after the other"""
    intervals: int

    @property
    def ratio(self) -> float:
        """Ray Train's images a second as a share of the plain loop's."""
        return self.ray_train / self.plain_loop

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += [
            "",
            f"train-overhead                  images/s  (medians of {self.intervals} intervals)",
            f"Ray Train, one worker           {self.ray_train:8.2f}",
            f"the same step in a plain loop   {self.plain_loop:8.2f}",
            f"Ray Train : plain loop          {self.ratio:8.3f}",
            f"data-wait, {1000 * STEP_SECONDS:.0f} ms a step        {self.data_wait_share:8.2%}",
        ]
        return "\n".join(lines)

    def write(self, file: str) -> None:
        """Write all of it as a local JSON file."""
        Path(file).write_text(json.dumps({**asdict(self), "ratio": self.ratio}, indent=2) + "\n")


def run_overhead_benchmark(
    *, threads: int = 1, repeats: int = 5, device: str = "cpu", sizes: OverheadSizes | None = None
) -> OverheadReport:
    """Time both so many times in turn, with so many CPU threads for each, on made data.

    Raises ValueError for numbers below 1, and for a device that the machine does not have.
    """
    for argument, value in (("threads", threads), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{argument} is {value}, but must be at least 1: 1 thread and 5 repeats are the default")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}, which cannot be used: give cpu, or cuda where there is a GPU")
    sizes = sizes or OverheadSizes()
    config = _config(sizes)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrcnn-benchmark-")))
        stack.enter_context(_environment(_variables(folder, threads, device)))
        stack.enter_context(ray_session(dashboard=True))
        data, loader_data = (_shards(folder, sizes.images, side) for side in (sizes.side, sizes.loader_side))
        ours: list[float] = []
        plain: list[float] = []
        for i in range(repeats):
            ours += _intervals(_ray_times(config, data, folder, f"run-{i}"), sizes)
            plain += _intervals(_in_own_process(_plain_times, config, data, device), sizes)
        (share,) = _in_own_process(_data_wait, replace(config, steps=sizes.loader_steps), loader_data, device)
    machine = machine_of(torch.device(device), threads) | {"ray": ray.__version__}
    return OverheadReport(machine, statistics.median(ours), statistics.median(plain), share, len(ours))


def _config(sizes: OverheadSizes) -> TrainConfig:
    never = 10**9
    return replace(
        PRESETS["toy"], optimizer=OptimizerConfig(base_lr=0.01), steps=sizes.warm_up_steps + sizes.steps,
        global_batch=sizes.batch, log_every=sizes.report_every, evaluate_every=never, checkpoint_every=never,
        pictures=0,
    )  # fmt: skip


def _variables(folder: Path, threads: int, device: str) -> dict[str, str]:
    """Of all processes that are started here. Without GPUs in sight Ray Train takes none either."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {"OMP_NUM_THREADS": str(threads), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", **hidden}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _shards(folder: Path, images: int, side: int) -> str:
    made = make_toy_data(str(folder / f"toy-{side}"), images=images, seed=0, size=side)
    out = str(folder / f"shards-{side}")
    build(BuildConfig(images=made.images_uri, annotations=made.annotations_uri, out=out, shorter_side=side,
                      longer_side=2 * side, encoding="raw"))  # fmt: skip
    return out


def _ray_times(config: TrainConfig, data: str, folder: Path, run: str) -> list[float]:
    """Seconds of the clock at which a training has reported its losses, in the order of steps."""
    job = TrainJob(data=data, val_data=data, storage=str(folder / "runs"), run=run)
    run_id = train(job, config).run_id
    history = tracking.client().get_metric_history(run_id, "train/loss")
    return [metric.timestamp / 1000 for metric in sorted(history, key=lambda metric: metric.step)]


def _intervals(times: Sequence[float], sizes: OverheadSizes) -> list[float]:
    """Images a second between two moments, once it is warm."""
    images = sizes.batch * sizes.report_every
    warm = times[(sizes.warm_up_steps - 1) // sizes.report_every :]
    return [images / (after - before) for before, after in pairwise(warm)]


def _in_own_process(
    function: Callable[[TrainConfig, str, str], list[float]], config: TrainConfig, data: str, device: str
) -> list[float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, config, data, device).result()


def _plain_times(config: TrainConfig, data: str, device: str) -> list[float]:
    """As `_ray_times`, of a loop as one writes it first: no Ray, no MLflow, no checkpoint."""
    where, dataset = torch.device(device), ShardDataset(data)
    config = replace(config, model=replace(config.model, num_classes=len(dataset.categories)))
    torch.manual_seed(config.seed)
    model = MaskRCNN(config.model, dataset.categories)
    model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    engine = Engine(model, config, where)
    times: list[float] = []
    steps: list[Losses] = []
    with closing(training_stream(config, dataset, pin_memory=where.type == "cuda")) as stream:
        while engine.step < config.steps:
            batch = next(stream)
            steps.append(engine.train_step(batch.images, batch.targets))
            if engine.step % config.log_every == 0:
                read_losses(steps)
                times.append(time.time())
                steps.clear()
    return times


def _data_wait(config: TrainConfig, data: str, device: str) -> list[float]:
    """The share of time for which steps wait that else do nothing; the loader begins with nothing read ahead."""
    waited = 0.0
    with closing(training_stream(config, ShardDataset(data), pin_memory=device == "cuda")) as stream:
        next(stream)
        started = time.monotonic()
        for _ in range(config.steps):
            time.sleep(STEP_SECONDS)
            asked = time.monotonic()
            next(stream)
            waited += time.monotonic() - asked
        return [waited / (time.monotonic() - started)]
