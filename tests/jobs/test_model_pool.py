"""How many actors with a model there are, and what they take."""

from __future__ import annotations

import pytest
from ray.data import ActorPoolStrategy

from jobs.cluster import ClusterSize
from jobs.predict import _check_room
from pipelines.predict import ModelPool, model_pool
from pipelines.predict_options import PredictRun


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        ({"CPU": 4.0}, {}, ModelPool(4, 0, 4)),
        ({"CPU": 4.0}, {"actors": 2}, ModelPool(2, 0, 4, in_flight=2)),  # four and more tasks for each
        ({"CPU": 16.0}, {}, ModelPool(10, 0, 16)),  # not more than tasks
        ({"CPU": 4.0, "GPU": 2.0}, {}, ModelPool(2, 1.0, 2, in_flight=2)),
        ({"CPU": 4.0, "GPU": 1.0}, {"gpus_per_actor": 0.1}, ModelPool(10, 0.1, 10)),
        ({"CPU": 4.0, "GPU": 5.0}, {"gpus_per_actor": 2.0}, ModelPool(2, 2.0, 2, in_flight=2)),
        ({"CPU": 4.0, "GPU": 2.0}, {"gpus_per_actor": 0.0}, ModelPool(4, 0, 4)),
        ({}, {}, ModelPool(1, 0, 0, in_flight=2)),  # a cluster that has yet to grow
    ],
)
def test_actors_by_resources(
    resources: dict[str, float], asked: dict[str, float], expected: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert model_pool(10, **asked) == expected  # type: ignore[arg-type]


def test_a_task_of_few_waits_for_no_actor_while_another_is_free() -> None:
    arguments = ModelPool(3, 0.5, 4).arguments
    assert arguments == {"compute": ActorPoolStrategy(size=3, max_tasks_in_flight_per_actor=1), "num_gpus": 0.5}
    assert ModelPool(3, 0, 4).arguments["num_cpus"] == 1
    assert ModelPool(3, 0, 4, in_flight=2).arguments["compute"].max_tasks_in_flight_per_actor == 2


def test_more_actors_than_room_are_refused_unless_it_may_grow() -> None:
    size = ClusterSize(({"CPU": 4.0, "GPU": 1.0},), may_grow=False)
    _check_room(PredictRun(actors=4), ModelPool(3, 0, 4), size)
    with pytest.raises(ValueError, match=r"--actors 5 of a CPU each, but Ray has 4 CPUs and 1 GPUs .* at most 4"):
        _check_room(PredictRun(actors=5), ModelPool(4, 0, 4), size)
    with pytest.raises(ValueError, match=r"--actors 1 of 2 GPUs each, .* at most 0"):
        _check_room(PredictRun(gpus_per_actor=2), ModelPool(1, 2.0, 0), size)
    _check_room(PredictRun(actors=5), ModelPool(4, 0, 4), ClusterSize(size.nodes, may_grow=True))
