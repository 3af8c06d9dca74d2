"""`mrcnn train --config`: an earlier run's settings in the place of a preset."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import tracking
from jobs.cli import parse_train
from jobs.config import TrainConfig
from jobs.config_file import read_config, starting_point
from jobs.presets import PRESETS
from pipelines.storage import open_store

WORDS = ("--data", "d", "--val-data", "v", "--storage", "s", "--run", "r")
CONFIG = replace(PRESETS["toy"], steps=7, large_jitter=(0.5, 2.0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG.to_dict()))
    return path


@pytest.mark.parametrize("form", ["{} --config {file}", "--config {file} {}", "--config={file} {}"])
def test_the_settings_of_a_run_come_from_its_file(form: str, file: Path) -> None:
    job, config, _ = parse_train(form.format(" ".join(WORDS), file=file).split())
    assert config == CONFIG
    assert (job.data, job.run) == ("d", "r")


def test_flags_change_them(file: Path) -> None:
    _, config, _ = parse_train(["--config", str(file), *WORDS, "--steps", "9", "--optimizer.base-lr", "0.5"])
    assert config == replace(CONFIG, steps=9, optimizer=replace(CONFIG.optimizer, base_lr=0.5))


def test_the_file_of_a_run_serves_too(tmp_path: Path) -> None:
    content = {"run_id": "1", "digests": {}, "config": CONFIG.to_dict()}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_config(f"{tmp_path}/run.json") == CONFIG


def test_it_may_be_on_s3(s3: str) -> None:
    open_store(f"{s3}/run").write_bytes("config.json", json.dumps(CONFIG.to_dict()).encode())
    assert read_config(f"{s3}/run/config.json") == CONFIG


@pytest.mark.usefixtures("mlflow_store")
def test_it_may_be_mlflows_artifact() -> None:
    handle = tracking.create_run(experiment="configs", name="config", params={})
    tracking.describe_run(handle, CONFIG.to_dict(), [])
    assert read_config(f"runs:/{handle.run_id}/config.json") == CONFIG


def test_a_preset_is_one_too() -> None:
    assert starting_point(["toy", "--steps", "1"]) == ("toy", PRESETS["toy"], ["--steps", "1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not hold the settings of a training"),
        ("[1]", "does not hold the settings"),
        ('{"stepps": 3}', "stepps is not a setting of TrainConfig"),
        ('{"steps": "many"}', "does not hold the settings"),
        ('{"steps": 0}', "steps is 0"),
        ('{"run_id": "1", "config": 3}', "does not hold the settings"),
    ],
)
def test_what_is_no_such_file_is_refused_with_its_name(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(str(tmp_path / "c.json"))
    assert "c.json" in str(caught.value)


def test_what_the_words_may_not_say(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lost\.json"):
        starting_point(["--config", "lost.json"])
    with pytest.raises(ValueError, match="give one of them"):
        starting_point(["toy", "--config", str(file)])
    with pytest.raises(ValueError, match="begin with a preset"):
        starting_point(["--data", "d"])
    with pytest.raises(ValueError, match="'r50' is no preset"):
        starting_point(["r50"])


def test_every_field_comes_back(file: Path) -> None:
    for config in PRESETS.values():
        file.write_text(json.dumps(config.to_dict()))
        assert read_config(str(file)) == TrainConfig.from_dict(config.to_dict()) == config
