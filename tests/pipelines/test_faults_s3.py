"""An S3 that fails: what passes is tried again and the shards are the same; what stays is a reject, or ends the build
in one line within seconds, and the build goes on later."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_proxy import Decide, Fault, FaultyProxy, faulty_proxy
from inline import run_inline

from jobs import cli
from pipelines import build as build_module
from pipelines.build import BuildConfig, build
from pipelines.storage import open_store
from pipelines.toy import ToySummary

PASSING: tuple[Fault, ...] = ("500", "503", "drop", "lose", "cut", "stall", "slow", "drip")
READ_SECONDS = "0.7"


@pytest.fixture
def config(toy_config: BuildConfig, toy_data: ToySummary, s3: str, tmp_path: Path) -> BuildConfig:
    """From S3 to S3, to a folder of its own."""
    store = open_store(f"{s3}/faults/source")
    if not store.exists("annotations.json"):
        for name in open_store(toy_data.out).list():
            store.write_bytes(name, (Path(toy_data.out) / name).read_bytes())
    return replace(
        toy_config, images=f"{store.uri}/images", annotations=f"{store.uri}/annotations.json",
        out=f"{s3}/faults/{tmp_path.name}",
    )  # fmt: skip


def checksums(out: str) -> dict[str, str]:
    store = open_store(out)
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name, _ in store.entries(hidden=True)}


@contextmanager
def faults(decide: Decide) -> Iterator[FaultyProxy]:
    """All requests go through a proxy. The tasks run in this process."""
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], decide) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("MRCNN_S3_READ_SECONDS", READ_SECONDS)
        patch.setattr(build_module, "run_tasks", run_inline)
        yield proxy


def never(method: str, path: str, nth: int) -> Fault | None:
    return None


def test_what_passes_is_tried_again(config: BuildConfig) -> None:
    def decide(method: str, path: str, nth: int) -> Fault | None:
        chance = random.Random(f"{method} {path} {nth}")
        return chance.choice(PASSING) if nth < 2 and chance.random() < 0.4 else None

    undisturbed = replace(config, out=f"{config.out}-undisturbed")
    with faults(never) as proxy:
        build(undisturbed)
        assert proxy.made.keys() == {"none"}
        asked = [(method, times) for (method, path), times in proxy.seen.items() if path.endswith(".jpg")]
        assert asked == [("GET", 1)] * 16, "one request an image"
    with faults(decide) as proxy:
        summary = build(config)
        assert proxy.made.keys() == {"none", *PASSING}, "each was tried"
    assert summary.totals.rejects == 0
    assert checksums(config.out) == checksums(undisturbed.out)


def test_one_forbidden_image_is_a_reject(config: BuildConfig) -> None:
    with faults(lambda method, path, nth: "403" if path.endswith("/000000000007.jpg") else None):
        summary = build(config)
    assert summary.rejects_by_reason == {"read: no permission": 1}
    assert summary.totals.rows == 15


def test_what_is_refused_everywhere_ends_the_build(config: BuildConfig) -> None:
    """As with credentials that expire while it runs."""
    expired = False

    def decide(method: str, path: str, nth: int) -> Fault | None:
        nonlocal expired
        expired |= path.endswith("/000000000007.jpg")
        return "403" if expired else None

    with faults(decide), pytest.raises(PermissionError, match=r"was refused .*check AWS_ACCESS_KEY_ID"):
        build(config)
    summary = build_inline(config)
    assert (summary.shards_made, summary.totals.rejects) == (3, 0)


def build_inline(config: BuildConfig) -> build_module.BuildSummary:
    with faults(never):
        return build(config)


@pytest.mark.parametrize("fault", ["500", "stall", "cut", "drip"])
def test_an_image_that_never_comes_ends_the_build_which_goes_on_later(config: BuildConfig, fault: Fault) -> None:
    """Its server is to blame, not the image: it is not lost."""
    start = time.monotonic()
    with (
        faults(lambda method, path, nth: fault if path.endswith("/000000000007.jpg") else None),
        pytest.raises(ValueError, match=r"images/000000000007\.jpg cannot be reached at") as told,
    ):
        build(config)
    assert time.monotonic() - start < 30
    assert "\n" not in str(told.value)
    assert "manifest.json" not in checksums(config.out)
    summary = build_inline(config)
    assert (summary.shards_made, summary.totals.rows, summary.totals.rejects) == (3, 16, 0)


def test_an_upload_that_fails_leaves_nothing_under_its_name(config: BuildConfig) -> None:
    with (
        faults(lambda method, path, nth: "500" if method == "PUT" and path.endswith("00001.arrow") else None),
        pytest.raises(ValueError, match=r"shard-00001\.arrow cannot be reached"),
    ):
        build(config)
    assert "shard-00001.arrow" not in checksums(config.out)
    assert build_inline(config).shards_made == 3


def test_a_lost_answer_to_the_last_write_is_no_failure(config: BuildConfig) -> None:
    """The first answers to all that writes are lost, though it was written."""
    with faults(lambda method, path, nth: "lose" if method == "PUT" and nth == 0 else None) as proxy:
        assert build(config).totals.rows == 16
        assert proxy.made["lose"] >= 4 + 4 + 1 + 3


@contextmanager
def silent_endpoint() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def command(config: BuildConfig) -> list[str]:
    return ["build-data", "--images", config.images, "--annotations", str(config.annotations), "--out", config.out]


@pytest.mark.parametrize("broken", ["secret", "key", "down", "bucket", "out bucket"])
def test_what_is_wrong_is_told_within_seconds_and_before_ray(
    config: BuildConfig, broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"secret": "AWS_SECRET_ACCESS_KEY", "key": "AWS_ACCESS_KEY_ID", "down": "cannot be reached at"}
    if broken == "bucket":
        config = replace(config, images="s3://no-such-bucket/images")
    elif broken == "out bucket":
        config = replace(config, out="s3://no-such-bucket/out")
    elif broken == "down":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY" if broken == "secret" else "AWS_ACCESS_KEY_ID", "wrong")
    monkeypatch.setattr("jobs.cluster.ray_session", None)  # would fail
    start = time.monotonic()
    assert cli.main(command(config)) == 2
    assert time.monotonic() - start < 15
    # the session's Ray may say something, too, such as that the disk is nearly full
    (error,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("(raylet)")]
    assert told.get(broken, "no-such-bucket") in error


def test_a_silent_endpoint_is_told_within_seconds_of_the_command(config: BuildConfig) -> None:
    with silent_endpoint() as url:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *command(config)], env={**os.environ, "AWS_ENDPOINT_URL": url},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        seconds = time.monotonic() - start
    assert done.returncode == 2
    assert f"cannot be reached at AWS_ENDPOINT_URL={url}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert seconds < 60, "13 on an idle machine: two tries of 4 seconds, the rest are imports"


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf"])
def test_nonsense_seconds(config: BuildConfig, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRCNN_S3_READ_SECONDS", value)
    with pytest.raises(ValueError, match=f"MRCNN_S3_READ_SECONDS is '{value}', but must be seconds above 0"):
        build(config)
