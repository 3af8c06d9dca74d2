"""Runs in a real SQLite store: what goes in, what never may, and how a run is found again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import tracking
from jobs.tracking import create_run, find_run, flat_params, redact, reopen_run, tracking_uri
from jobs.tracking_log import RunLogger


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an MLflow of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.delenv("MRCNN_ARTIFACT_ROOT", raising=False)
        yield folder


def test_a_run_has_its_parameters_tags_and_place(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {
        "model": {"roi": {"box_weights": (10.0, 5.0)}, "name": "r50"},
        "resume": False,
        "long": "x" * 7000,
    }
    params |= {f"p{i}": i for i in range(150)}
    handle = create_run(experiment="toy/shapes", name="first", params=params, tags={"mrcnn.version": "1"})
    monkeypatch.chdir(tmp_path)  # as Ray's workers do
    logger = RunLogger(pickle.loads(pickle.dumps(handle)), str(tmp_path))
    logger.metrics({"train/loss": 2.0, "perf/images_per_second": 3.5}, step=1)
    logger.metrics({"train/loss": 1.0, "val/mask_AP": 0.25}, step=2)
    logger.tags({"mrcnn.gpu": "none"})
    logger.finish()
    logger.close()

    run = find_run("first")
    assert run.info.status == "FINISHED"
    assert run.data.params["model.roi.box_weights"] == "[10.0, 5.0]"
    assert (run.data.params["model.name"], run.data.params["resume"]) == ("r50", "false")
    assert len(run.data.params["long"]) == 6000
    assert len(run.data.params) == 154
    assert run.data.metrics == {"train/loss": 1.0, "perf/images_per_second": 3.5, "val/mask_AP": 0.25}
    assert [m.value for m in tracking.client().get_metric_history(handle.run_id, "train/loss")] == [2.0, 1.0]
    assert run.data.tags["mrcnn.version"] == "1"
    assert run.data.tags["mrcnn.gpu"] == "none"
    assert run.info.artifact_uri == (store / "mlruns/toy-shapes" / handle.run_id / "artifacts").as_uri()
    assert list((tmp_path / "mlflow").rglob("*.*")) == []


def test_going_on_makes_no_second_run() -> None:
    handle = create_run(experiment="resumed", name="again", params={})
    tracking.client().set_terminated(handle.run_id, "FAILED")
    assert find_run("again").info.status == "FAILED"
    assert reopen_run(handle.run_id) == handle
    assert find_run("again").info.status == "RUNNING"
    assert find_run(handle.run_id).info.run_name == "again"


def test_a_name_that_is_not_one_runs_is_refused_with_the_candidates() -> None:
    ids = [create_run(experiment="twins", name="twin", params={}).run_id for _ in range(2)]
    with pytest.raises(ValueError, match="2 runs are named 'twin'") as caught:
        find_run("twin")
    assert all(run_id in str(caught.value) for run_id in ids)
    with pytest.raises(ValueError, match='no run is named "it\'s"'):
        find_run("it's")
    with pytest.raises(ValueError, match="0000 not found"):
        find_run("0" * 32)
    with pytest.raises(ValueError, match="0000 not found"):
        reopen_run("0" * 32)


def test_no_credential_reaches_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/secret+1")
    params = {
        "a": {"uri": "s3://AKIA:planted/word@bucket/x"},
        "b": ["http://me:planted@host:80/"],
        "c": "planted/secret+1",
    }
    create_run(experiment="secrets", name="secret", params=params, tags={"t": "https://planted@host/x"})
    data = find_run("secret").data
    assert "planted" not in json.dumps([data.params, data.tags])
    assert data.params["a.uri"] == "s3://bucket/x"
    assert data.params["b"] == '["http://host:80/"]'
    assert data.tags["t"] == "https://host/x"
    assert "planted" not in repr(tracking.RunHandle("1", "http://me:planted@host"))


@pytest.mark.parametrize("text", ["s3://bucket/a@b", "mail me@example.org", "http://host:80/x", "no uri at all"])
def test_redaction_leaves_other_text_alone(text: str) -> None:
    assert redact(text) == text


def test_flat_params_keeps_empty_groups() -> None:
    assert flat_params({"a": {}, "b": None, "c": {"d": {"e": 1.5}}}) == {
        "a": "{}",
        "b": "null",
        "c.d.e": "1.5",
    }


def test_the_store_is_absolute_and_must_be_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///no/such/mlflow.db")
    with pytest.raises(ValueError, match=r"there is no folder .*/no/such: make it first"):
        tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI: nonsense://x"):
        create_run(experiment="x", name="y", params={})


def test_artifacts_go_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRCNN_ARTIFACT_ROOT", "s3://bucket/artifacts/")
    handle = create_run(experiment="elsewhere", name="elsewhere", params={})
    uri = tracking.client().get_run(handle.run_id).info.artifact_uri
    assert uri == f"s3://bucket/artifacts/elsewhere/{handle.run_id}/artifacts"


def test_standard_tags_say_what_ran() -> None:
    import torch

    tags = tracking.standard_tags()
    assert tags["mrcnn.torch"] == torch.__version__
    assert ("mrcnn.gpu" in tags) == torch.cuda.is_available()
    assert all(isinstance(value, str) and value for value in tags.values())
