"""kill -9 of the real command with all its processes, at random moments: the same command finishes the rest."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from killing import checksums, kill_all, stamps

from pipelines.build import BuildConfig, build
from pipelines.manifest import PROGRESS
from pipelines.storage import open_store
from pipelines.toy import make_toy_data

pytestmark = pytest.mark.drill

SEED = 20
SHARDS = 32
PATIENCE = 300.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    """Some seconds of work in many shards."""
    made = make_toy_data(str(tmp_path_factory.mktemp("data")), images=2 * SHARDS, seed=6, size=96)
    return BuildConfig(
        images=made.images_uri, annotations=made.annotations_uri, out="/replace/this",
        shorter_side=1300, longer_side=2200, encoding="png", rows_per_shard=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(config: BuildConfig, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checksums of an undisturbed build."""
    out = str(tmp_path_factory.mktemp("undisturbed"))
    build(replace(config, out=out))
    return checksums(out)


def finished(out: str) -> set[str]:
    """The shards that have a receipt."""
    names = set(open_store(out).list())
    return {name for name in names if f"{PROGRESS}/{name}.json" in names}


def start(config: BuildConfig) -> subprocess.Popen[str]:
    options = {
        "--images": config.images, "--annotations": config.annotations, "--out": config.out, "--cpus": 2,
        "--shorter-side": config.shorter_side, "--longer-side": config.longer_side, "--encoding": config.encoding,
        "--rows-per-shard": config.rows_per_shard,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "build-data", *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def kill_when(config: BuildConfig, ready: Callable[[set[str]], bool], wait: float) -> None:
    """Run the command, kill it at work, some time after its folder is ready for that."""
    process, store = start(config), open_store(config.out)
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready(set(store.list())) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(wait)
        at_work = process.poll() is None
    finally:
        kill_all(process.pid)
        said, _ = process.communicate()
    assert at_work, f"too late: let the build take longer, or see what is wrong:\n{said}"


def receipts(names: set[str]) -> int:
    return sum(name.startswith(f"{PROGRESS}/shard-") for name in names)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_killed_builds_are_finished(
    config: BuildConfig, expected: dict[str, str], where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = str(tmp_path / "out") if where == "disk" else f"{request.getfixturevalue('s3')}/killed"
    config, chance = replace(config, out=out), random.Random(f"{SEED} {where}")
    moments: list[tuple[Callable[[set[str]], bool], float]] = [
        (lambda names: receipts(names) > 0, chance.uniform(0, 0.4)),
        (lambda names: receipts(names) > SHARDS // 2, chance.uniform(0, 0.4)),
    ]
    for ready, wait in moments:
        kill_when(config, ready, wait)
        visible = {name: sum_ for name, sum_ in checksums(out).items() if not name.startswith((".", PROGRESS))}
        assert visible.items() <= expected.items(), "what has its name is complete"
        assert "manifest.json" not in visible
    done = stamps(out, finished(out))
    assert done
    process = start(config)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    assert checksums(out) == expected, "nor is anything else left"
    assert f"made now: {SHARDS - len(done)} shards" in printed
    assert stamps(out, done) == done, "finished shards were left alone"
    if where == "s3":
        bucket = out.removeprefix("s3://").split("/")[0]
        uploads = open_store(out)._fs.call_s3("list_multipart_uploads", Bucket=bucket)
        assert not uploads.get("Uploads"), "no part of an upload stays"
