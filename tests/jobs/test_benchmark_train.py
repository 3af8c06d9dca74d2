"""`mrcnn benchmark train-overhead` on little: that both sides train the same, and what is reported. Times are not
judged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from models import SMALL

from jobs import benchmark_train
from jobs.benchmark_train import OverheadReport, OverheadSizes, run_overhead_benchmark
from jobs.cli import main
from jobs.presets import PRESETS

SIZES = OverheadSizes(
    images=4, side=64, loader_side=96, warm_up_steps=4, steps=4, report_every=2, batch=2, loader_steps=3
)


@pytest.mark.drill
def test_the_benchmark_runs_and_reports(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "toy", replace(PRESETS["toy"], model=SMALL))
    monkeypatch.setattr(benchmark_train, "STEP_SECONDS", 0.01)
    before = dict(os.environ)
    report = run_overhead_benchmark(threads=1, repeats=1, sizes=SIZES)
    assert dict(os.environ) == before
    assert report.intervals == 2  # between the moments after steps 4, 6 and 8
    assert report.ray_train > 0
    assert report.plain_loop > 0
    assert 0 <= report.data_wait_share < 1
    assert {"CPU", "torch", "ray"} <= report.machine.keys()


def test_what_warms_up_does_not_count() -> None:
    sizes = OverheadSizes(batch=4, report_every=5, warm_up_steps=10)
    assert benchmark_train._intervals([0.0, 100.0, 102.0, 106.0], sizes) == [10.0, 5.0]


def test_the_table_and_the_file(tmp_path: Path) -> None:
    report = OverheadReport({"CPU": "slow"}, 9.8, 10.0, 0.0123, 50)
    lines = str(report).splitlines()
    assert lines[0] == "CPU: slow"
    assert [line.split()[-1] for line in lines[3:]] == ["9.80", "10.00", "0.980", "1.23%"]
    assert "150 ms a step" in lines[-1]
    report.write(str(tmp_path / "out.json"))
    assert '"ratio": 0.98' in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--profile",), "--profile is for the model and its operators, not for train-overhead"),
        (("--images", "/x"), "--images is for the benchmarks build-data, predict"),
        (("--repeats", "0"), "repeats is 0"),
        (("--device", "abacus"), "device is 'abacus', which cannot be used"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "train-overhead", *words]) == 2
    assert message in capsys.readouterr().err
