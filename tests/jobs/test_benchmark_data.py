"""`mrcnn benchmark build-data` on a few small images: that both sides do the same work, and what is reported. Times are
not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import benchmark_data
from jobs.benchmark_data import PEER, PILLOW, PIPELINE, DataReport, Rate, made_jpegs, run_data_benchmark
from jobs.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three JPEGs of 40 x 60."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), np.uint8)
    images = tmp_path / "images"
    images.mkdir()
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(images / f"{i}.jpg", quality=95)
    return images


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_data, "SHORTER", 64)
    monkeypatch.setattr(benchmark_data, "LONGER", 96)
    monkeypatch.setattr(benchmark_data, "ROWS", 4)


def test_all_sides_do_the_same_work(folder: Path) -> None:
    data = (folder / "0.jpg").read_bytes()
    ours, bare, theirs = (f(data) for f in (benchmark_data._ours, benchmark_data._bare, benchmark_data._with_pillow))
    assert np.shape(ours) == (64, 96, 3)
    for others in (bare, theirs):
        assert abs(np.asarray(ours, int) - np.asarray(others, int)).max() <= 3
    with Image.open(folder / "0.jpg") as image:
        pixels = np.asarray(image.convert("RGB"))
    row = benchmark_data._resize_row({"image": pixels})
    assert (row["height"], row["width"]) == (64, 96)
    assert row["image"] == np.asarray(theirs).tobytes()


def test_made_images_are_of_coco_s_kind(tmp_path: Path) -> None:
    files = made_jpegs(tmp_path / "made", 5)
    sizes = []
    for file in files:
        with Image.open(file) as image:
            sizes.append(image.size)
    assert sizes == [(640, 480), (640, 427), (480, 640), (427, 640), (375, 500)]
    assert 60_000 < np.mean([file.stat().st_size for file in files]) < 300_000
    again = made_jpegs(tmp_path / "again", 5)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


@pytest.mark.drill
def test_the_benchmark_runs_and_reports(folder: Path, ray_cluster: None) -> None:
    report = run_data_benchmark(str(folder), cpus=1, repeats=1, shards=3)
    assert (report.rates[0].what, report.rates[-2].what) == (PILLOW, PIPELINE)
    assert report.rates[-1].what == PEER
    assert len(report.ratios) == 7
    assert all(rate.peak_mb and rate.per_cpu_second and rate.beside for rate in report.rates[-2:])
    assert report.images == 3
    assert report.bytes_per_image["stored as raw"] > 64 * 96 * 3 > report.bytes_per_image["stored as jpeg"]
    assert {"Pillow", "OpenCV", "CPU"} <= report.machine.keys()


def test_the_table_and_the_file(tmp_path: Path) -> None:
    rates = (Rate(PILLOW, 50.0), Rate(PIPELINE, 200.0, 150.0, 123.4, 250.0))
    report = DataReport({"CPU": "slow"}, 7, rates, {"ours : theirs": 4.0}, {"stored as raw": 2_500_000.0})
    lines = str(report).splitlines()
    assert lines[0] == "CPU: slow"
    assert lines[3].split()[-2:] == ["50.0", "1.00"]
    assert lines[4].split()[-4:] == ["200.0", "4.00", "150.0", "123"]
    assert lines[-2:] == ["ours : theirs: 4.00", "stored as raw: 2500 kB an image"]
    report.write(str(tmp_path / "out.json"))
    data: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    expected = {"what": PIPELINE, "images_per_second": 200.0, "per_cpu_second": 150.0, "peak_mb": 123.4}
    assert data["rates"][1] == expected | {"beside": 250.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build-data", "--images", "/nowhere"), "images is /nowhere, which holds no .jpg files"),
        (("build-data", "--repeats", "0"), "repeats is 0"),
        (("build-data", "--threads", "0"), "threads is 0"),
        (("build-data", "--device", "cuda"), "device is cuda, but build-data uses CPUs only"),
        (("build-data", "--profile"), "--profile is for the model and its operators"),
        (("nms", "--images", "x"), "--images is for the benchmarks build-data, predict"),
    ],
)
def test_bad_arguments_end_with_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *words]) == 2
    assert message in capsys.readouterr().err


BURN = """
import time
while time.process_time() < 0.5: pass
print("done", flush=True)
input()
"""


def test_cpu_time_is_of_this_run_alone() -> None:
    """It counts what begins in it, and is not less by what a process had that ends meanwhile."""
    with burning():
        before = benchmark_data._cpu_seconds()
    assert 0 <= benchmark_data._cpu_seconds_since(before) < 0.4
    with burning():
        assert 0.4 < benchmark_data._cpu_seconds_since(before) < 0.9


@contextmanager
def burning() -> Iterator[None]:
    """A process that has had half a second of CPU time, until the end of the block."""
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        try:
            yield
        finally:
            process.stdin.write("\n")
            process.stdin.flush()
