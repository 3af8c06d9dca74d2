"""How many workers a training may have, and what is refused at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import pytest

from jobs import cluster
from jobs import train as driver
from jobs.cluster import ClusterSize, may_grow
from jobs.config import TrainConfig, TrainJob, WorkerRange


def job(workers: str, device: Literal["auto", "gpu", "cpu"] = "auto") -> TrainJob:
    return TrainJob(data="d", val_data="v", storage="s", run="r", workers=workers, device=device)


def test_a_number_or_a_range() -> None:
    assert job("2").worker_range == WorkerRange(2, 2)
    assert job("1:4").worker_range == WorkerRange(1, 4)
    assert job("1:4").worker_range.is_elastic
    assert not job("4:4").worker_range.is_elastic


@pytest.mark.parametrize("workers", ["0", "0:2", "3:2", "-1", "1:", ":4", "1:2:3", "2.0", "two", "", "1: 4"])
def test_what_is_no_number_of_workers(workers: str) -> None:
    with pytest.raises(ValueError, match=r"workers is '.*', but must be a number of at least 1, or FEWEST:MOST"):
        job(workers)


def test_every_number_of_workers_must_be_able_to_share_a_step() -> None:
    config = TrainConfig(global_batch=4, images_at_once=1)
    driver._check_shares(config, WorkerRange(1, 2))
    with pytest.raises(ValueError, match="of which the 3 workers get 2 or 1 images"):
        driver._check_shares(config, WorkerRange(1, 4))
    with pytest.raises(ValueError, match="must be at least 1 for each of the 5 workers"):
        driver._check_shares(TrainConfig(global_batch=4), WorkerRange(1, 8))


@pytest.mark.parametrize(
    ("workers", "nodes", "grows", "expected"),
    [
        ("2", [{"CPU": 1}, {"CPU": 1}], False, False),
        ("3", [{"CPU": 1}, {"CPU": 1}], False, "workers is 3, but the Ray cluster has 2 CPUs: ask for at most 2"),
        ("1:8", [{"CPU": 1}], False, False),
        ("2:8", [{"CPU": 1}], False, "workers is 2:8, but the Ray cluster has 1 CPUs: ask for at most 1"),
        ("8", [{"CPU": 1}], True, False),
        ("2", [{"CPU": 8, "GPU": 1}], False, "workers is 2, but the Ray cluster has 1 GPUs: ask for at most 1"),
        ("1:2", [{"CPU": 8, "GPU": 1}], False, True),
    ],
)
def test_what_the_cluster_never_has(
    monkeypatch: pytest.MonkeyPatch, workers: str, nodes: list[Mapping[str, float]], grows: bool, expected: bool | str
) -> None:
    monkeypatch.setattr(driver, "cluster_size", lambda: ClusterSize(tuple(nodes), grows))
    if isinstance(expected, bool):
        assert driver._check_cluster(job(workers)) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            driver._check_cluster(job(workers))


def test_a_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def has(nodes: Mapping[str, float], *, may_grow: bool) -> None:
        monkeypatch.setattr(driver, "cluster_size", lambda: ClusterSize((nodes,), may_grow))

    has({"CPU": 4}, may_grow=True)
    assert not driver._check_cluster(job("2"))
    assert driver._check_cluster(job("2", "gpu"))
    assert "workers is 2, but the Ray cluster has 0 GPUs: waiting for nodes" in capsys.readouterr().out
    has({"CPU": 4}, may_grow=False)
    with pytest.raises(ValueError, match="has 0 GPUs: add nodes that have some, or drop --device gpu"):
        driver._check_cluster(job("2", "gpu"))
    has({"CPU": 4, "GPU": 1}, may_grow=False)
    assert not driver._check_cluster(job("4", "cpu"))


def test_whether_a_cluster_may_grow() -> None:
    assert not may_grow({"nodeTypeMapping": {"abc": "node_abc"}})  # as the dashboard tells it
    assert not may_grow({"node_type_mapping": {"abc": "node_abc"}})  # as it is kept
    assert may_grow({"node_type_mapping": {"10.0.0.1": "gpu-workers"}})
    assert may_grow(None)
    assert may_grow(json.loads("{}"))


def test_a_ray_that_was_started_here_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bytes] = {}
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2}}, {"Alive": False}])
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", kept.get)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.cluster_size() == ClusterSize(({"CPU": 2},), may_grow=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster.cluster_size().may_grow
    kept["__autoscaling_status"] = b'{"autoscaler_report": {"node_type_mapping": {"abc": "node_abc"}}}'
    assert not cluster.cluster_size().may_grow
