"""The bar of a training as a terminal gets it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from models import SMALL

from jobs.config import OptimizerConfig, TrainConfig
from jobs.engine import Losses
from jobs.meter import Meter
from jobs.progress import Bar

CONFIG = TrainConfig(
    model=SMALL, optimizer=OptimizerConfig(base_lr=0.02, warmup_steps=4), steps=40, global_batch=2, log_every=4,
    checkpoint_every=100, pictures=0,
)  # fmt: skip


def shown_on_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    """What a command writes to a terminal, control characters and all."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # Linux tells in this way that nobody has the terminal any more
        pass
    finally:
        os.close(ours)
    text = shown.decode(errors="replace")
    assert process.wait() == 0, text
    return text


@pytest.mark.drill
def test_a_terminal_shows_bars_and_no_lines(toy_shards: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG.to_dict()))
    shown = shown_on_a_terminal(
        [sys.executable, "-m", "jobs.cli", "train", "--config", str(config), "--data", toy_shards, "--val-data",
         toy_shards, "--storage", str(tmp_path), "--run", "shown", "--cpus", "1"],
        {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"},
    )  # fmt: skip
    (tmp_path / "shown.txt").write_text(shown)
    note = r"training loss \d+\.\d+, \d+\.\d images/s, data-wait \d+%"
    bar = rf"{note}: +\d+%\|.*?\| \d+\.?\d*/40\.0 \[\d\d:\d\d<\d\d:\d\d, +\d+\.\d+ ?s?t?e?p?/"
    assert re.search(bar, shown), shown
    assert re.search(r"evaluation: +\d+%\|.*?/16\.0 \[", shown), shown
    assert "objectness" not in shown  # a line of losses
    assert "__ray_tqdm_magic_token__" not in shown
    assert "val/mask_AP" in shown


def test_a_bar_that_is_not_shown_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("training", 10, "step", shown=False) as bar:
        bar.move(3, "loss 1")
    assert capsys.readouterr() == ("", "")


def test_the_note_has_the_speed_since_the_last_report_and_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("jobs.meter.time.monotonic", lambda: float(next(clock)))
    meter, losses = Meter(CONFIG), Losses()
    assert meter.note() == ""
    with meter.waiting_for_data():
        pass
    meter.add(losses, [1, 2])
    assert meter.note() == "0.7 images/s, data-wait 33%"  # 2 images in 3 s, of which 1 s waiting
    meter.last_loss = 1.5
    assert meter.note() == "loss 1.500, 0.7 images/s, data-wait 33%"
