"""Writing into a run through a spool, before a real MLflow server that goes away, comes back, or stays away."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow_server import Gate

from jobs import tracking, tracking_system
from jobs.replay import replay_run
from jobs.tracking import RunHandle, create_run
from jobs.tracking_log import RunLogger, Unsent, run_status, unsent
from jobs.tracking_system import gpu_memory
from jobs.train import _reopen_run

AT_ONCE = 3.0  # seconds; generous, for calls that wait for nobody
PICTURE = np.zeros((40, 30, 3), np.uint8)


@pytest.fixture(autouse=True)
def _tracking(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("jobs.tracking_log.PATIENCE", 60.0)  # a busy machine


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> RunHandle:
    """A run, with the file that training leaves in its folder."""
    handle = create_run(experiment="logged", name=request.node.name, params={})
    (tmp_path / "run.json").write_text(json.dumps({"run_id": handle.run_id, "digests": {}, "config": {}}))
    return handle


def logged(run: RunHandle, key: str = "train/loss") -> dict[int, float]:
    """Value by step; each must be there once."""
    history = tracking.client().get_metric_history(run.run_id, key)
    assert max(Counter(metric.step for metric in history).values(), default=1) == 1
    return {metric.step: metric.value for metric in history}


def artifacts(run: RunHandle, folder: str) -> list[str]:
    return sorted(each.path for each in tracking.client().list_artifacts(run.run_id, folder))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "mlflow").rglob("*") if path.is_file())


def log_all(logger: RunLogger, step: int) -> float:
    """Something of each kind; the seconds that it took."""
    started = time.monotonic()
    logger.metrics({"train/loss": 1 / step, "perf/step_seconds": 0.5}, step)
    logger.image(PICTURE, "val/image_0", step)
    logger.table({"category": ["cat"], "mask_AP": [0.5]}, "per_category_AP.json")
    logger.tags({"note": "s3://me:planted@bucket/x"})
    return time.monotonic() - started


def test_what_is_logged_is_there(run: RunHandle, tmp_path: Path) -> None:
    logger = RunLogger(run, str(tmp_path))
    log_all(logger, 1)
    logger.metrics({"val/mask_AP": math.nan, "best/mask_AP": 0.5}, 2)
    logger.table({"category": ["cat", "dog"], "mask_AP": [0.5, None]}, "per_category_AP.json")
    logger.finish("FINISHED")
    logger.close()
    assert logger.unsent() is None
    assert files(tmp_path) == []
    found = tracking.client().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert math.isnan(found.data.metrics.pop("val/mask_AP"))
    assert found.data.metrics == {"train/loss": 1.0, "perf/step_seconds": 0.5, "best/mask_AP": 0.5}
    assert found.data.tags["note"] == "s3://bucket/x"
    names = artifacts(run, "images")
    assert [name.rpartition(".")[2] for name in names] == ["webp", "png"]
    assert all(name.startswith("images/val~image_0+step+1+timestamp+") for name in names)
    table = tracking.client().load_table(found.info.experiment_id, "per_category_AP.json", run_ids=[run.run_id])
    assert table.category.to_list() == ["cat", "dog"]


@pytest.mark.parametrize("fault", ["drop", "hang"])
def test_an_outage_delays_nobody_and_loses_nothing(fault: str, run: RunHandle, gate: Gate, tmp_path: Path) -> None:
    logger = RunLogger(run, str(tmp_path))
    logger.metrics({"train/loss": 1.0}, 1)
    getattr(gate, fault)()
    seconds = sum(log_all(logger, step) for step in range(2, 12))
    started = time.monotonic()
    logger.keep()
    assert time.monotonic() - started + seconds < AT_ONCE
    while not gate.refused:  # by the thread, which has met the fault and not the caller
        time.sleep(0.01)
    gate.open()
    logger.metrics({"train/loss": 1 / 12}, 12)
    logger.close(patience=30)
    assert logger.unsent() is None
    assert logged(run) == {step: 1 / step for step in range(1, 13)}
    assert len(artifacts(run, "images")) == 2 * 10
    assert files(tmp_path) == []


def test_an_mlflow_that_stays_away_is_told_and_replayed_without_duplicates(
    run: RunHandle, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.tracking_log.PATIENCE", 1.0)
    gate.drop()
    logger = RunLogger(run, str(tmp_path))
    for step in (1, 2, 3):
        log_all(logger, step)
    logger.close(patience=0)
    started = time.monotonic()
    with run_status(run, str(tmp_path)) as end:
        pass
    assert time.monotonic() - started < 15
    assert end.unsent is not None
    assert (end.unsent.metrics, end.unsent.files) == (6, 7)
    told = str(end.unsent)
    assert "MLflow lacks 6 metric values, 6 tags and states, 7 files: MLflow" in told
    assert f"mrcnn replay-mlflow {tmp_path}" in told
    assert "Caused by" in told
    assert "Max retries" not in told
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        replay_run(str(tmp_path))
    gate.open()
    monkeypatch.setattr("jobs.tracking_log.PATIENCE", 60.0)
    kept = {path: path.read_bytes() for path in files(tmp_path)}
    assert replay_run(str(tmp_path)).startswith(f"written to MLflow run {run.run_id}: 6 metric values")
    assert replay_run(str(tmp_path)) == f"MLflow has all of {tmp_path}"
    for path, data in kept.items():  # as if the process had died before it could remove them
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    replay_run(str(tmp_path))
    assert logged(run) == {1: 1.0, 2: 1 / 2, 3: 1 / 3}
    assert len(artifacts(run, "images")) == 6
    found = tracking.client().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["note"] == "s3://bucket/x"


def test_going_on_gives_mlflow_first_what_it_has_missed(run: RunHandle, gate: Gate, tmp_path: Path) -> None:
    gate.drop()
    logger = RunLogger(run, str(tmp_path))
    logger.metrics({"train/loss": 1.0}, 1)
    logger.finish("FAILED")
    logger.close(patience=0)
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):  # at once, before a training begins
        _reopen_run(run.run_id, str(tmp_path))
    gate.open()
    assert _reopen_run(run.run_id, str(tmp_path)) == run
    assert unsent(str(tmp_path), "") is None
    assert logged(run) == {1: 1.0}
    assert tracking.client().get_run(run.run_id).info.status == "RUNNING"


def test_metrics_go_on_where_artifacts_cannot_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MRCNN_ARTIFACT_ROOT", str(tmp_path / "a-file"))
    handle = create_run(experiment="no artifacts", name="no artifacts", params={})
    logger = RunLogger(handle, str(tmp_path / "run"))
    log_all(logger, 1)
    logger.finish()
    logger.close(patience=1)
    left = logger.unsent()
    assert left is not None
    assert (left.metrics, left.others, left.files) == (0, 0, 3)
    assert logged(handle) == {1: 1.0}
    with pytest.raises((ValueError, OSError), match="a-file"):  # a training does not begin like that
        tracking.describe_run(handle, {"steps": 1}, [])


def test_no_credential_is_in_the_spool(
    run: RunHandle, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/secret+1")
    gate.drop()
    handle = RunHandle(run.run_id, gate.url.replace("http://", "http://me:planted@"))
    logger = RunLogger(handle, str(tmp_path))
    log_all(logger, 1)
    logger.tags({"key": "planted/secret+1"})
    logger.table({"category": ["planted/secret+1"]}, "per_category_AP.json")
    logger.close(patience=1)
    left = logger.unsent()
    assert left is not None
    assert left.others == 4
    content = b"".join(path.read_bytes() for path in files(tmp_path))
    assert b"val~image_0" in b"".join(str(path).encode() for path in files(tmp_path))
    assert b"s3://bucket/x" in content
    assert b"planted" not in content
    out, err = capsys.readouterr()
    assert "MLflow does not answer" in out
    assert "planted" not in out + err + str(left)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_the_status_fits_how_the_block_ends(
    error: type[BaseException], status: str, run: RunHandle, tmp_path: Path
) -> None:
    with pytest.raises(error), run_status(run, str(tmp_path)):
        raise error
    assert tracking.client().get_run(run.run_id).info.status == status


def test_a_failed_training_is_told_before_what_mlflow_lacks(
    run: RunHandle, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.tracking_log.PATIENCE", 0.5)
    gate.drop()
    with pytest.raises(RuntimeError, match="the loss"), run_status(run, str(tmp_path)):
        raise RuntimeError("the loss is not finite")
    assert "MLflow lacks 1 tags and states" in capsys.readouterr().out
    assert unsent(str(tmp_path), "") == Unsent(str(tmp_path), metrics=0, others=1, files=0, reason="")


def test_metrics_have_one_of_the_agreed_rooms(run: RunHandle, tmp_path: Path) -> None:
    logger = RunLogger(run, str(tmp_path))
    with pytest.raises(AssertionError, match="loss_mask"):
        logger.metrics({"loss_mask": 1.0}, step=1)
    logger.close()


def test_the_machine_is_watched_at_the_step_of_the_metrics(
    run: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_system, "SECONDS", 0.05)
    logger = RunLogger(run, str(tmp_path), machine=True)
    time.sleep(0.3)
    logger.metrics({"train/loss": 1.0}, 7)
    time.sleep(0.5)
    logger.close()
    found = tracking.client().get_run(run.run_id).data.metrics
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert found["system/system_memory_usage_megabytes"] > 100
    history = tracking.client().get_metric_history(run.run_id, "system/disk_usage_percentage")
    assert len(history) > 1
    assert {metric.step for metric in history} == {7}


def test_a_cpu_has_no_gpu_memory() -> None:
    assert gpu_memory(torch.device("cpu")) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_most_that_a_gpu_held_since_the_last_time() -> None:
    device = torch.device("cuda")
    gpu_memory(device)
    torch.empty(10**8, dtype=torch.uint8, device=device)
    assert gpu_memory(device)["perf/gpu_memory_gb"] >= 0.1
    assert gpu_memory(device)["perf/gpu_memory_gb"] < 0.1


def test_the_config_and_the_data_are_told(run: RunHandle) -> None:
    data = tracking.DatasetOfRun("s3://b/train", "a" * 64, 10, "training")
    val = tracking.DatasetOfRun("s3://b/val", "b" * 64, 5, "validation")
    for _ in range(2):  # resuming does it again
        tracking.describe_run(run, {"steps": 4, "data": "s3://me:word@b/x"}, [data, val])
    text = tracking.read_artifact(f"runs:/{run.run_id}/config.json")
    assert json.loads(text) == {"steps": 4, "data": "s3://b/x"}
    inputs = tracking.client().get_run(run.run_id).inputs.dataset_inputs
    found = {each.tags[0].value: (each.dataset.name, each.dataset.digest) for each in inputs}
    assert found == {"training": ("s3://b/train", "a" * 36), "validation": ("s3://b/val", "b" * 36)}
    assert len(inputs) == 2
    tags = tracking.client().get_run(run.run_id).data.tags
    assert (tags["mrcnn.data_digest"], tags["mrcnn.val_digest"]) == ("a" * 64, "b" * 64)
    assert json.loads(inputs[0].dataset.profile)["manifest_digest"] in ("a" * 64, "b" * 64)


def test_data_that_is_trained_on_and_judged_is_one_input(run: RunHandle) -> None:
    both = [tracking.DatasetOfRun("/data", "a" * 64, 10, context) for context in ("training", "validation")]
    tracking.describe_run(run, {}, both)
    (found,) = tracking.client().get_run(run.run_id).inputs.dataset_inputs
    assert found.tags[0].value == "training, validation"


def test_an_artifact_that_is_not_there(run: RunHandle) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking.read_artifact(f"runs:/{run.run_id}/config.json")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking.read_artifact(f"runs:/{'0' * 32}/config.json")
