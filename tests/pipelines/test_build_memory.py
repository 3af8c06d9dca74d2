"""Pixels never travel through Ray, the driver holds records once, and a full disk or a dead worker is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inline import run_inline

from pipelines import build as build_module
from pipelines import tasks as tasks_module
from pipelines.attempts import TRIES, Task
from pipelines.build import BuildConfig, build, prepare
from pipelines.tasks import _together, failing_in_words, run_tasks
from pipelines.toy import make_toy_data

STORE_BYTES = 80 * 2**20

# A Ray of its own with a small object store; prints what has ever been put into it, and what was spilled.
SMALL_STORE = f"""
import json, sys
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from pipelines.build import BuildConfig, build
ray.init(address="local", num_cpus=2, object_store_memory={STORE_BYTES}, include_dashboard=False, logging_level="ERROR")
summary = build(BuildConfig(**json.loads(sys.argv[1])))
state = get_state_from_address(ray.get_runtime_context().gcs_address)
stats = get_memory_info_reply(state).store_stats
print(json.dumps([summary.bytes, stats.cumulative_created_bytes, stats.spilled_bytes_total]))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def test_a_store_smaller_than_the_data(tmp_path: Path) -> None:
    made = make_toy_data(str(tmp_path / "data"), images=40, seed=1, size=64)
    config = {
        "images": made.images_uri, "annotations": made.annotations_uri, "out": str(tmp_path / "out"),
        "shorter_side": 1300, "longer_side": 1500, "rows_per_shard": 5,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STORE, json.dumps(config)], env=environment(), capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    built, put, spilled = json.loads(done.stdout.splitlines()[-1])
    assert built > 2 * STORE_BYTES
    assert put < 2**20, "tasks and receipts, no pixels"
    assert spilled == 0


@pytest.mark.usefixtures("ray_cluster")
def test_what_travels_is_text(toy_config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, received = [], []

    def watched(function: Any, tasks: Iterator[Task]) -> Iterator[Task]:
        kept = list(tasks)
        sent.extend(json.dumps(each) for each in kept)
        for row in run_tasks(function, iter(kept)):
            received.append(json.dumps(row))
            yield row

    monkeypatch.setattr(build_module, "run_tasks", watched)
    summary = build(replace(toy_config, out=str(tmp_path)))
    assert len(sent) == len(received) == 4
    assert sum(map(len, sent + received)) < summary.bytes / 20


def test_short_memory_is_told_in_words() -> None:
    @failing_in_words
    def hungry(task: Task) -> Task:
        raise MemoryError("cannot allocate 3 GiB")

    with pytest.raises(RuntimeError, match=r"memory is short \(cannot allocate 3 GiB\): give fewer --cpus"):
        list(run_inline(hungry, [{"name": "a"}]))


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_are_made_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def endless() -> Iterator[Task]:
        while True:
            made.append(len(made))
            yield {"name": str(made[-1])}

    monkeypatch.setattr(tasks_module, "AHEAD", 2)
    rows = run_tasks(failing_in_words(lambda task: task), endless())
    names = {next(rows)["name"] for _ in range(6)}
    assert len(names) == 6
    assert len(made) <= 8, "of 2 CPUs with 2 each, two rounds"


def test_the_driver_holds_records_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it adds to the source's records is little: names of shards, references, a round of tasks."""
    count = 20_000
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(count)]
    content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": []}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    config = BuildConfig(
        images=str(tmp_path / "images"), annotations=str(tmp_path / "annotations.json"), out=str(tmp_path / "out")
    )
    read = build_module.SOURCES["coco"].read
    source = read(config)
    monkeypatch.setitem(build_module.SOURCES, "coco", replace(build_module.SOURCES["coco"], read=lambda _: source))
    peaks = []

    def nobody(function: Any, tasks: Iterator[Task]) -> Iterator[Task]:
        for _ in tasks:
            peaks.append(tracemalloc.get_traced_memory()[1])
        raise KeyboardInterrupt
        yield {}

    monkeypatch.setattr(build_module, "run_tasks", nobody)
    tracemalloc.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            build(config)
    finally:
        tracemalloc.stop()
    assert len(peaks) == -(-count // config.rows_per_shard)
    assert max(peaks) / count < 60, "bytes a record"


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_whose_process_dies_each_time_ends_the_build() -> None:
    @failing_in_words
    def work(task: Task) -> Task:
        if task["name"] == "deadly":
            os._exit(1)
        return task

    names = [*"01", "deadly", *"34567"]  # with 2 CPUs, the first three together
    came = list[str]()

    def run_all() -> None:
        for row in run_tasks(work, ({"name": name} for name in names)):
            came.append(row["name"])

    with pytest.raises(RuntimeError, match="deadly: its process died 4 times"):
        run_all()
    assert "0" in came, "it is before the deadly one"
    assert len(set(came)) == len(came)


def test_why_a_task_failed_is_what_it_says() -> None:
    @failing_in_words
    def work(task: Task) -> Task:
        return {"receipt": "", **task}

    told = {"failure": "RuntimeError", "message": "its process died 4 times"}
    assert work({}) == {"receipt": "", "failure": "", "message": ""}
    assert work(told) == {"receipt": "", **told}


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_that_have_ended_are_not_done_again_where_their_process_dies_later(tmp_path: Path) -> None:
    @failing_in_words
    def work(task: Task) -> Task:
        name = task["name"]
        with (tmp_path / name).open("a") as begun:
            begun.write(f"{os.getpid()} ")
        if name == "2" and len((tmp_path / name).read_text().split()) < TRIES:
            os._exit(1)
        return task

    numbers = [str(i) for i in range(8)]  # with 2 CPUs, the first three together
    assert sorted(int(row["name"]) for row in run_tasks(work, ({"name": each} for each in numbers))) == list(range(8))
    begun = {name: (tmp_path / name).read_text().split() for name in numbers}
    assert begun["0"] == begun["1"] == begun["2"][:1], "one process did all three"
    assert {name: len(processes) for name, processes in begun.items()} == dict.fromkeys(numbers, 1) | {"2": TRIES}


@pytest.mark.usefixtures("ray_cluster")
def test_rows_come_before_all_that_a_process_has_to_do_is_done(tmp_path: Path) -> None:
    @failing_in_words
    def work(task: Task) -> Task:
        deadline = time.monotonic() + 60
        while task["name"] not in ("0", "1") and not (tmp_path / "go").exists():
            if time.monotonic() > deadline:
                raise ValueError("nobody had the first row")
            time.sleep(0.02)
        return task

    rows = run_tasks(work, ({"name": str(i)} for i in range(8)))
    assert next(rows)["name"] == "0"
    (tmp_path / "go").touch()
    assert len(list(rows)) == 7


@pytest.mark.usefixtures("ray_cluster")
def test_what_has_begun_when_a_task_fails_ends_and_nothing_else_begins(tmp_path: Path) -> None:
    tasks = [{"name": str(i)} for i in range(40)]
    beside = [*_together(tasks, cpus=2)][1][0]["name"]  # the first of the other process

    @failing_in_words
    def work(task: Task) -> Task:
        part = tmp_path / f"{task['name']}.part"
        part.touch()
        deadline = time.monotonic() + 60
        while beside not in {path.stem for path in tmp_path.iterdir()}:
            if time.monotonic() > deadline:
                raise ValueError("nobody was at work beside this")
            time.sleep(0.02)
        if task["name"] == "0":
            raise ValueError("0 cannot be done")
        time.sleep(3)  # longer than it takes to tell the driver of the failure
        part.rename(tmp_path / task["name"])
        return task

    rows = run_tasks(work, iter(tasks))
    with pytest.raises(ValueError, match="0 cannot be done"):
        list(rows)
    assert {path.name for path in tmp_path.iterdir()} == {"0.part", beside}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_is_told_and_the_build_goes_on(toy_config: BuildConfig, small_disk: Path) -> None:
    config = replace(toy_config, out=str(small_disk / "out"), shorter_side=200, longer_side=300)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\): make room") as told:
        build(config)
    assert str(small_disk) in str(told.value)
    assert not list(small_disk.glob("**/*.part"))
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    assert build(config).totals.rows == 16


def test_a_folder_that_cannot_be_made(toy_config: BuildConfig, tmp_path: Path) -> None:
    """All before Ray is needed."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file.* cannot be a folder, a file is in its way"):
        prepare(replace(toy_config, out=str(tmp_path / "file/out")))
    with pytest.raises(PermissionError, match="no permission for /proc/nowhere"):
        prepare(replace(toy_config, out="/proc/nowhere"))
