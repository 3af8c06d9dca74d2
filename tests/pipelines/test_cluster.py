"""Ray sessions: nested use, and clusters that are not there."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import ray

from jobs.cluster import ray_session


def test_nested_session_leaves_the_outer_one_alone(ray_cluster: None) -> None:
    with ray_session(cpus=1):
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "no.such.host.invalid:6379", "nonsense"])
def test_no_cluster_at_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"RAY_ADDRESS={address}"), ray_session():
        pass
    assert time.monotonic() - start < 15


def test_no_secret_is_sent_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray writes a runtime_env into its logs."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:planted@mlflow.example.org")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.org")
    monkeypatch.setenv("MRCNN_S3_READ_SECONDS", "71")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr("jobs.cluster._check_reachable", lambda address: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: sent.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_session():
        pass
    assert "planted" not in str(sent)
    assert "https://s3.example.org" in str(sent)
    assert "'MRCNN_S3_READ_SECONDS': '71'" in str(sent)


@pytest.mark.parametrize("named", [None, "http://head:8265"])
def test_a_ray_of_its_own_finds_its_own_dashboard(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    """Whatever cluster jobs are sent to."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    if named:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", named)
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_session(dashboard=True):
        assert started[0]["include_dashboard"] is True
        assert os.environ["RAY_API_SERVER_ADDRESS"] == f"http://127.0.0.1:{started[0]['dashboard_port']}"
    assert os.environ.get("RAY_API_SERVER_ADDRESS") == named
    with ray_session():  # what needs none is spared it
        assert started[1]["include_dashboard"] is False
        assert os.environ.get("RAY_API_SERVER_ADDRESS") == named


def test_refuses_no_cpus() -> None:
    with pytest.raises(ValueError, match="--cpus is 0"), ray_session(cpus=0):
        pass
