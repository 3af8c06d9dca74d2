"""Every benchmark at a tiny size: what it reports, and that both sides do the same work. Times are not judged."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torchvision.models.detection import roi_heads as peer_heads

from jobs.benchmark import Case, Report, Timing, _measure, run_benchmark
from jobs.benchmark_cases import BENCHMARKS, Sizes
from jobs.benchmark_names import BenchmarkName
from jobs.cli import main
from mrcnn.roi_sampling import SampledRoIs, sample_rois

TINY = Sizes(
    image=(60, 80),
    shorter_side=64,
    longer_side=96,
    objects=2,
    rois=16,
    channels=4,
    candidates=(200,),
    detections=12,
)
CASES = {"model-eval": 1, "train-step": 2, "roi-align": 4, "nms": 1, "masks": 1}


@pytest.mark.parametrize("name", get_args(BenchmarkName))
def test_every_benchmark_reports_both_sides(name: BenchmarkName) -> None:
    threads = torch.get_num_threads()
    report = run_benchmark(name, threads=1, repeats=1, sizes=TINY, with_profile=name == "masks")
    assert torch.get_num_threads() == threads
    assert len(report.timings) == CASES[name]
    for timing in report.timings:
        assert timing.ours > 0
        assert timing.torchvision > 0
        assert timing.what in str(report)
    assert {"CPU", "cores", "threads", "torch", "torchvision"} <= report.machine.keys()
    if name == "masks":
        assert ["Self CPU" in text and "torchvision" in text for text in report.profiles] == [True]


def test_operators_are_given_the_same_work() -> None:
    """Both sides return the same numbers."""
    cpu = torch.device("cpu")
    for case in BENCHMARKS["roi-align"](TINY, cpu):
        torch.testing.assert_close(case.ours(), case.peer(), rtol=1e-4, atol=1e-4)
    for case in BENCHMARKS["masks"](TINY, cpu):
        assert case.ours() == case.peer()
    for case in BENCHMARKS["nms"](TINY, cpu):
        (idxs, valid), expected = case.ours(), case.peer()
        assert torch.equal(idxs[valid], expected)
        assert 1 < len(expected) < 200


def test_models_are_given_the_same_work() -> None:
    """Enough detections that the heads have work to do, and nearly the same masks (a near tie may fall either way)."""
    cpu = torch.device("cpu")
    (case,) = BENCHMARKS["model-eval"](TINY, cpu)
    ours, theirs = case.ours(), case.peer()[:, 0]
    assert ours.shape == theirs.shape
    assert len(ours) == TINY.detections
    assert (ours == theirs).float().mean() > 0.98


def test_a_training_step_has_its_share_of_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objects' own boxes at least, then as many as there may be; the same for both."""
    ours: list[int] = []
    theirs: list[int] = []
    sample, loss = sample_rois, peer_heads.maskrcnn_loss

    def our_spy(*words: Any) -> SampledRoIs:
        rois = sample(*words)
        ours.append(int((rois.labels > 0).sum()))
        return rois

    def their_spy(logits: torch.Tensor, *words: Any) -> torch.Tensor:
        theirs.append(len(logits))
        return loss(logits, *words)

    monkeypatch.setattr("mrcnn.roi_heads.sample_rois", our_spy)
    monkeypatch.setattr(peer_heads, "maskrcnn_loss", their_spy)
    for case in BENCHMARKS["train-step"](TINY, torch.device("cpu")):
        case.ours()
        case.peer()
    assert ours[1] == theirs[1] == TINY.rois // 4
    assert TINY.objects <= ours[0] == theirs[0]


def test_the_median_counts_and_both_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now = 0.0
    seconds = iter([100, 200, 1, 5, 2, 50, 60, 6])  # ours and the peer's in turn; the first of each warms up

    def work(who: str) -> None:
        nonlocal now
        calls.append(who)
        now += next(seconds)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    timing = _measure(Case("turns", lambda: work("ours"), lambda: work("peer")), 3, torch.device("cpu"))
    assert calls == ["ours", "peer"] * 4
    assert (timing.ours, timing.torchvision, timing.repeats) == (2000, 6000, 3)


def test_the_table_and_the_file(tmp_path: Path) -> None:
    report = Report("nms", {"CPU": "slow", "threads": 1}, (Timing("boxes", ours=2.0, torchvision=5.0, repeats=3),))
    assert str(report).splitlines()[-1].split() == ["boxes", "2.00", "5.00", "2.50"]
    report.write(str(tmp_path / "out.json"))
    data: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert data["milliseconds"] == [{"what": "boxes", "ours": 2.0, "torchvision": 5.0, "repeats": 3, "ratio": 2.5}]
    assert data["machine"]["CPU"] == "slow"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threads", "0"), "threads is 0"),
        (("--repeats", "0"), "repeats is 0"),
        (("--device", "abacus"), "device is 'abacus'"),
    ],
)
def test_bad_arguments_end_with_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "nms", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nms.json"
    assert main(["benchmark", "nms", "--repeats", "1", "--threads", "1", "--out", str(out)]) == 0
    assert "4819 boxes in 5 levels" in capsys.readouterr().out
    assert json.loads(out.read_text())["machine"]["threads"] == 1
