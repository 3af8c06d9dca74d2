"""`mrcnn benchmark build-data`: images a second and core of each step of a build, against Pillow and against Ray Data's
own way with Pillow, on the same images.

What is timed in this process takes turns, in CPU seconds: what else the machine does then hardly counts. The pipelines
run as they do for a user, on so many CPUs, twice: with enough images that all CPUs have work, and with more. The time
between the two is that of the further images, without the start of Ray's workers. Our decoding and resizing alone, on
all of these CPUs at once, takes turns with them: a core is not as fast in one minute as in the next, nor beside others.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import psutil
import ray
import ray.data
import simplejpeg
import torch
from PIL import Image

from jobs.benchmark import machine_of
from jobs.cluster import ray_session
from mrcnn.preprocess import resize_image, resized_size
from pipelines.build import PreparedBuild, build, prepare
from pipelines.config import BuildConfig, Encoding
from pipelines.shard_task import make_shard
from pipelines.transforms import decode, use_one_thread

SHORTER, LONGER = 800, 1333
MADE = 48  # images, where no folder is given
MOST = 256  # images that are taken from a folder
ROWS = 128  # of a shard
SHORT_SHARDS = 2  # of the short run, for each CPU: none has less to do than another
SHARDS = 10  # that the long run of our pipeline has more, for each CPU
PEERS_SHARE = 5  # a fifth of these has Ray Data's own way, which takes longer for each
MOST_PIPELINES = 3  # repeats of them, each of which takes a minute
SAMPLE_SECONDS = 0.1
BESIDE_SECONDS = 1.0
ENCODINGS: tuple[Encoding, ...] = ("raw", "jpeg")

PILLOW, OURS, BARE = "Pillow: decode, resize", "decode, resize", "simplejpeg and OpenCV or torch, bare"
BARE_FILE = "the same, and its bytes to a file"
PIPELINE, PEER = "build-data, raw", "Ray Data: read_images, Pillow, write_parquet"


@dataclass(frozen=True)
class Rate:
    """Images a second and core."""

    what: str
    images_per_second: float
    per_cpu_second: float | None = None
    """Of a pipeline: by the CPU time of all its processes, in which what else the machine does hardly counts"""
    peak_mb: float | None = None
    """Largest sum of the memory that Ray's worker processes have for themselves; None where it was not looked at"""
    beside: float | None = None
    """Of a pipeline: of our decoding and resizing alone on all its CPUs at once, a CPU second, before and after each of
    its runs"""


@dataclass(frozen=True)
class DataReport:
    """What `mrcnn benchmark build-data` prints and writes."""

    machine: dict[str, str | int]
    images: int
    rates: tuple[Rate, ...]
    """Pillow's first"""
    ratios: dict[str, float]
    bytes_per_image: dict[str, float] = field(default_factory=dict)
    """As they come, and as a shard stores them"""

    def __str__(self) -> str:
        width = max(len(each.what) for each in self.rates)
        pillow = self.rates[0].images_per_second
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        lines += ["", f"{'build-data':{width}}  images/s/core  x Pillow  images/CPU s  peak MB"]
        for each in self.rates:
            speed = each.images_per_second
            more = "" if each.per_cpu_second is None else f"{each.per_cpu_second:12.1f}  {each.peak_mb:7.0f}"
            lines.append(f"{each.what:{width}}  {speed:13.1f}  {speed / pillow:8.2f}  {more}".rstrip())
        lines += ["", *(f"{what}: {ratio:.2f}" for what, ratio in self.ratios.items())]
        lines += [f"{what}: {size / 1e3:.0f} kB an image" for what, size in self.bytes_per_image.items()]
        return "\n".join(lines)

    def write(self, file: str) -> None:
        """Write all of it as a local JSON file."""
        Path(file).write_text(json.dumps(asdict(self), indent=2) + "\n")


def run_data_benchmark(
    images: str | None = None, *, cpus: int = 2, repeats: int = 5, shards: int = SHARDS
) -> DataReport:
    """Measure on the JPEGs of a local folder, or on made ones of COCO's sizes.

    Raises:
        ValueError: for a folder without JPEGs, or numbers below 1.
    """
    for argument, value in (("threads", cpus), ("repeats", repeats), ("shards", shards)):
        if value < 1:
            raise ValueError(f"{argument} is {value}, but must be at least 1: 2 CPUs and 5 repeats are the default")
    use_one_thread()
    with tempfile.TemporaryDirectory(prefix="mrcnn-benchmark-") as name:
        folder = Path(name)
        files = jpegs_in(images) if images is not None else made_jpegs(folder / "made", MADE)
        few = SHORT_SHARDS * cpus * ROWS
        once, short = copied(files, folder / "once", len(files)), copied(files, folder / "short", few)
        more = {PIPELINE: shards * cpus * ROWS, PEER: -(-shards // PEERS_SHARE) * cpus * ROWS}
        long = {what: copied(files, folder / f"long-{n}", few + n) for what, n in more.items()}
        rates = _single(files, short, folder, repeats)
        with ray_session(cpus):
            for what, run in ((PIPELINE, _build_raw), (PEER, _ray_data_with_pillow)):
                further = Further(cpus, more[what], min(repeats, MOST_PIPELINES), files)
                rates.append(_pipeline(what, run, (short, long[what]), folder / "pipeline", further))
            sizes = {f"stored as {encoding}": _stored(once, folder / encoding, encoding) for encoding in ENCODINGS}
        sizes = {"as they come": statistics.mean(file.stat().st_size for file in files)} | sizes
    machine = machine_of(torch.device("cpu"), cpus) | {"Pillow": PIL.__version__, "OpenCV": cv2.__version__}
    return DataReport(machine, len(files), tuple(rates), _ratios(rates), sizes)


def _ratios(rates: Sequence[Rate]) -> dict[str, float]:
    speed = {each.what: each.images_per_second for each in rates}
    whole = next(each for each in rates if each.what == PIPELINE)
    assert whole.beside is not None
    assert whole.per_cpu_second is not None
    return {
        "decode + resize, ours : Pillow's": speed[OURS] / speed[PILLOW],
        "decode + resize, ours : bare library calls": speed[OURS] / speed[BARE],
        "whole pipeline : decode + resize beside it": whole.images_per_second / whole.beside,
        "whole pipeline : decode + resize beside it, by CPU time": whole.per_cpu_second / whole.beside,
        "whole pipeline : bare library calls": whole.images_per_second / speed[BARE],
        "whole pipeline : bare library calls, by CPU time": whole.per_cpu_second / speed[BARE],
        "whole pipeline, ours : Ray Data with Pillow": speed[PIPELINE] / speed[PEER],
    }


def jpegs_in(folder: str) -> list[Path]:
    """The first MOST of a local folder. Raises ValueError where there are none."""
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:MOST]
    if not found:
        raise ValueError(
            f"images is {folder}, which holds no .jpg files: give a local folder of JPEGs, or leave it out"
        )
    return found


def made_jpegs(folder: Path, count: int) -> list[Path]:
    """JPEGs of COCO's usual sizes and bytes: blots of colour with noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    files = []
    for i in range(count):
        height, width = [(480, 640), (427, 640), (640, 480), (640, 427), (500, 375)][i % 5]
        blots = cv2.resize(generator.random((12, 16, 3)) * 255, (width, height), interpolation=cv2.INTER_CUBIC)
        noise = cv2.GaussianBlur(generator.normal(0, 40, (height, width, 3)), (0, 0), 0.8)
        pixels = np.clip(blots + noise, 0, 255).astype(np.uint8)
        files.append(folder / f"{i:06d}.jpg")
        files[-1].write_bytes(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"))
    return files


def copied(files: Sequence[Path], folder: Path, count: int) -> Path:
    """A folder with so many files, one after the other and from the first again, as links where the disk is the same.

    Their names are their numbers.
    """
    folder.mkdir()
    for i, file in enumerate(islice(cycle(files), count)):
        target = folder / f"{i:06d}.jpg"
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
    return folder


def _single(files: Sequence[Path], copied: Path, folder: Path, repeats: int) -> list[Rate]:
    """In this process, in turns: Pillow, decode and resize, bare calls, a task that stores raw or JPEG."""
    data, out = [file.read_bytes() for file in files], folder / "task"
    ways: dict[str, Callable[[], int]] = {
        PILLOW: lambda: _each(_with_pillow, data),
        OURS: lambda: _each(_ours, data),
        BARE: lambda: _each(_bare, data),
        BARE_FILE: lambda: _bare_to_file(data, out),
    }
    for encoding in ENCODINGS:
        ways[f"a task: read to shard, {encoding}"] = partial(_task, prepare(_config(copied, out / encoding, encoding)))
    rates: dict[str, list[float]] = {what: [] for what in ways}
    for i in range(repeats + 1):
        for what, run in ways.items():
            start = time.process_time()
            images = run()
            if i > 0:  # the first warms up
                rates[what].append(images / (time.process_time() - start))
            shutil.rmtree(out, ignore_errors=True)
    return [Rate(what, statistics.median(each)) for what, each in rates.items()]


def _each(function: Callable[[bytes], object], data: Sequence[bytes]) -> int:
    for one in data:
        function(one)
    return len(data)


def _beside(further: Further) -> float:
    """Images a CPU second of our decoding and resizing, where all CPUs do it."""
    speed = ray.remote(num_cpus=1)(_speed)
    return statistics.mean(ray.get([speed.remote(further.files) for _ in range(further.cpus)]))


def _speed(files: Sequence[Path]) -> float:
    use_one_thread()
    data = [file.read_bytes() for file in files]
    _each(_ours, data)  # warms up
    start, images = time.process_time(), 0
    while time.process_time() < start + BESIDE_SECONDS:
        images += _each(_ours, data)
    return images / (time.process_time() - start)


def _size(image: Any) -> tuple[int, int]:
    return resized_size(*image.shape[:2], shorter_side=SHORTER, longer_side=LONGER)


def _with_pillow(data: bytes) -> object:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = resized_size(image.height, image.width, shorter_side=SHORTER, longer_side=LONGER)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _ours(data: bytes) -> object:
    image = decode(data)
    return resize_image(image, *_size(image))


def _bare(data: bytes) -> Any:
    image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    height, width = _size(image)
    if height < image.shape[0] or width < image.shape[1]:
        return resize_image(image, height, width)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def _bare_to_file(data: Sequence[bytes], out: Path) -> int:
    """As plain files are written; what the cache has yet to write to the disk afterwards is not counted."""
    out.mkdir()
    with open(out / "file", "wb", buffering=0) as file:
        for one in data:
            file.write(_bare(one))
    return len(data)


def _config(images: Path, out: Path, encoding: Encoding) -> BuildConfig:
    return BuildConfig(
        images=str(images),
        out=str(out),
        format="images",
        shorter_side=SHORTER,
        longer_side=LONGER,
        encoding=encoding,
        rows_per_shard=ROWS,
    )


def _task(prepared: PreparedBuild) -> int:
    """The first shard of a build. Returns its images."""
    name, records = next(iter(prepared.shards.items()))
    content = json.dumps([record.to_dict() for record in records])
    row = make_shard({"name": name, "records": content, "scales": "[0]", "stated": "[null]"}, prepared.settings)
    assert not row["failure"], row["message"]
    return len(records)


@dataclass(frozen=True)
class Further:
    """What is between two runs of a pipeline."""

    cpus: int
    images: int
    repeats: int
    files: Sequence[Path]
    """Images for what is measured beside it"""


def _pipeline(
    what: str, run: Callable[[Path, Path], object], sources: tuple[Path, Path], out: Path, further: Further
) -> Rate:
    with _peak_of_workers() as peak:  # not while it is timed: to look into all processes takes a third of a CPU
        _seconds(run, sources[1], out)
    turns, beside = [], [_beside(further)]
    for _ in range(further.repeats):
        for images in sources:
            turns.append(_seconds(run, images, out))
            beside.append(_beside(further))
    shutil.rmtree(out)
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    seconds, cpu_seconds = (statistics.median(more[i] - less[i] for less, more in pairs) for i in range(2))
    rate = further.images / further.cpus / seconds
    return Rate(what, rate, further.images / cpu_seconds, peak[0] / 1e6, statistics.median(beside))


def _build_raw(images: Path, out: Path) -> None:
    build(_config(images, out, "raw"))


def _stored(images: Path, out: Path, encoding: Encoding) -> float:
    summary = build(_config(images, out, encoding))
    return summary.bytes / summary.totals.rows


def _seconds(run: Callable[[Path, Path], object], images: Path, out: Path) -> tuple[float, float]:
    """Of the clock, and of the CPUs in all processes of ours."""
    shutil.rmtree(out, ignore_errors=True)
    start, before = time.perf_counter(), _cpu_seconds()
    run(images, out)
    return time.perf_counter() - start, _cpu_seconds_since(before)


def _ray_data_with_pillow(images: Path, out: Path) -> None:
    """What Ray's documentation shows, and raw pixels in files at its end, as in our shards."""
    ray.data.read_images(str(images), mode="RGB").map(_resize_row).write_parquet(str(out), compression="none")


def _resize_row(row: dict[str, Any]) -> dict[str, Any]:
    height, width = _size(row["image"])
    resized = Image.fromarray(row["image"]).resize((width, height), Image.Resampling.BILINEAR)
    return {"height": height, "width": width, "image": resized.tobytes()}


@contextmanager
def _peak_of_workers() -> Iterator[list[float]]:
    """A list of one number, which rises to the most bytes that Ray's workers have had for themselves."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], _memory_of_workers())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _memory_of_workers() -> float:
    """Bytes of this process's Ray workers, without what processes share, such as Ray's object store."""
    return sum(_of_each(lambda worker: float(worker.memory_full_info().uss), name="ray::").values())


def _cpu_seconds() -> dict[psutil.Process, float]:
    """CPU time of this process and of those below it, so far."""
    return _of_each(lambda process: sum(process.cpu_times()[:2]))


def _cpu_seconds_since(before: dict[psutil.Process, float]) -> float:
    """CPU time of all that live now. What one had that has ended since is not taken from it: Ray ends actors of an
    earlier run late, and their seconds are not this run's."""
    return sum(seconds - before.get(process, 0.0) for process, seconds in _cpu_seconds().items())


def _of_each(read: Callable[[psutil.Process], float], name: str = "") -> dict[psutil.Process, float]:
    """A number of this process and of each below it, of those whose names begin so."""
    own, found = psutil.Process(), {}
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if process.name().startswith(name):
                found[process] = read(process)
    return found
