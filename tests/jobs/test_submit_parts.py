"""What a submission is checked for before any cluster is asked, and what is made of a cluster's answers."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from jobs import ship, submit
from jobs.cli import COMMANDS, arguments_of, main, parse
from jobs.cluster import ClusterSize
from jobs.job_client import api_server, exit_code
from jobs.job_commands import Submission

TRAIN = ("train", "toy", "--data", "s3://b/d", "--val-data", "s3://b/v", "--storage", "s3://b/r", "--run", "r")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toy-dat", "--out", "s3://b/o"), "toy-dat"),
        (("toy-data", "--out", "s3://b/o", "--imags", "3"), "--imags"),
        ((*TRAIN, "--workers", "0"), "workers is '0'"),
        ((*TRAIN, "--workers", "4:1"), "workers is '4:1', but must be a number of at least 1, or FEWEST:MOST"),
        (("train", "r50"), "'r50' is no preset"),
        (("train", "toy"), "say what to train on"),
        (("jobs", "list"), "is for this machine"),
        (("submit", "--", "toy-data", "--out", "s3://b/o"), "is for this machine"),
        ((), "toy-data"),
        (("toy-data", "--out", "toy"), "--out is 'toy', a path relative to this folder"),
        (("inspect-data", "s3://b/shards"), "--out is '.'"),
        (("verify-data", "shards"), "--uri is 'shards'"),
        ((*TRAIN, "--weights", "r50.pth"), "--weights is 'r50.pth'"),
        (("toy-data", "--out", "s3://b/o"), "say which cluster: --address"),
    ],
)
def test_what_is_wrong_is_told_without_a_cluster(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["submit", "--", *words])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    assert (code, message in out + err) == (2, True), out + err


def test_submit_alone_asks_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--no-wait"]) == 2
    assert "say what to run: mrcnn submit -- COMMAND" in capsys.readouterr().err


# ---- credentials


@pytest.mark.parametrize(
    "word",
    [
        "s3://ada:{}@bucket/x", "s3://ada:{}/with/slashes@bucket/x", "https://{}@host/x", "--data=s3://ada:{}@b",
        "https://b.s3.amazonaws.com/x?X-Amz-Signature={}", "https://host/x?a=b&token={}", "prefix-{}",
    ],
)  # fmt: skip
def test_a_credential_in_a_word_is_refused_and_not_repeated(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    with pytest.raises(ValueError, match="--data after -- holds") as refused:
        ship.check_no_secrets(
            ["build-data", *(["--data"] if "=" not in word[:7] else []), word.format(os.environ["SOME_API_KEY"])]
        )
    assert "correct-horse" not in str(refused.value)


def test_addresses_are_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "1")
    ship.check_no_secrets(
        ["models:/shapes@champion", "s3://bucket/key@2x.png", "http://host:9000/path@2x", "--lr", "1", "s3://b/a:b@c"]
    )


def test_only_addresses_that_others_can_use_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "AWS_REGION": "eu-west-1", "AWS_ENDPOINT_URL": "https://s3.example.org",
        "AWS_SECRET_ACCESS_KEY": "not-for-others",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:8333", "MLFLOW_TRACKING_URI": "sqlite:////home/ada/mlflow.db",
        "MLFLOW_S3_ENDPOINT_URL": "https://ada:password@host", "AWS_DEFAULT_REGION": "",
    }  # fmt: skip
    for name in ship.SHIPPED:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    sent, kept = ship.job_environment()
    assert {name: sent[name] for name in sent if name in ship.SHIPPED} == {
        "AWS_REGION": "eu-west-1", "AWS_ENDPOINT_URL": "https://s3.example.org",
    }  # fmt: skip
    assert sorted(kept) == ["AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL", "MLFLOW_TRACKING_URI"]
    assert "not-for-others" not in str(sent)


# ---- paths and code

OTHER_TEXTS = {"alias", "device", "encoding", "experiment", "format", "from_", "name", "preset", "run", "split", "to",
               "classes", "rpn", "precision", "workers", "evaluate_beside", "keypoints", "tile",
               "score_threshold", "max_detections", "actors"}  # fmt: skip


def test_every_text_argument_is_known_to_be_a_location_or_not() -> None:
    """A new argument that holds a path has to be added to LOCATIONS."""
    words = {
        "build-data": ("--images", "s3://b/i", "--annotations", "s3://b/a.json", "--out", "s3://b/o"),
        "train": TRAIN[1:],
        "predict": ("--model", "m", "--images", "s3://b/i", "--out", "s3://b/o"),
    }
    names = {
        name for command in words for name, value in settings(command, *words[command]).items() if _may_be_text(value)
    }
    for name, function in COMMANDS.items():
        if name not in (*words, "submit", "jobs"):
            names |= {argument for argument, kind in function.__annotations__.items() if "str" in str(kind)}
    assert {"images", "data", "weights", "in_"} <= names
    assert names - {"cpus"} <= ship.LOCATIONS | OTHER_TEXTS


def _may_be_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def settings(*words: str) -> dict[str, Any]:
    return submit.flat_settings(arguments_of(parse(words)))


def test_absolute_paths_are_said_and_uris_pass() -> None:
    found = settings("predict", "--model", "models:/m@champion", "--images", "/shared/i", "--out", "s3://b/o")
    assert ship.check_locations(found) == ["/shared/i"]
    assert all(not is_dataclass(value) for value in settings(*TRAIN).values() if _may_be_text(value))
    assert {"data", "workers", "steps", "cpus"} <= settings(*TRAIN).keys()


@pytest.mark.parametrize("operators", [True, False])
def test_the_code_is_sent_and_nothing_else(operators: bool) -> None:
    with ship.staged_code(operators=operators) as folder:
        files = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    assert {"jobs/cli.py", "mrcnn/model.py", "mrcnn/ops/nms.py", "pipelines/report.html.jinja"} <= files
    assert ("mrcnn/ops/_C.abi3.so" in files) == operators
    assert {Path(file).suffix for file in files} <= {".py", ".so", ".jinja"}


def test_the_commit_travels_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv(ship.GIT_COMMIT, "abc")
    assert ship.git_commit() == "abc"


# ---- what a cluster has


def size(*nodes: Mapping[str, float], may_grow: bool = False) -> ClusterSize:
    return ClusterSize(nodes, may_grow)


@pytest.mark.parametrize(
    ("cluster", "words", "missing"),
    [
        (size({"CPU": 1.5}, {"CPU": 1.5}), (*TRAIN, "--workers", "3"), ["--workers 3 needs 3 CPUs"]),
        (size({"CPU": 4}), (*TRAIN, "--workers", "3"), []),
        (size({"CPU": 2}), (*TRAIN, "--workers", "1:8"), []),
        (size({"CPU": 2}), (*TRAIN, "--workers", "3:8"), ["--workers 3:8 needs 3 CPUs"]),
        (size({"CPU": 8, "GPU": 2}), (*TRAIN, "--workers", "3"), ["--workers 3 needs 3 GPUs"]),
        (size({"CPU": 8, "GPU": 2}), (*TRAIN, "--workers", "2"), []),
        (size({"CPU": 2, "GPU": 8}), (*TRAIN, "--workers", "8"), []),
        (size({"CPU": 2, "GPU": 8}), (*TRAIN, "--workers", "4", "--device", "cpu"), ["--workers 4 needs 4 CPUs"]),
        (size({"CPU": 8}), (*TRAIN, "--workers", "4", "--device", "gpu"), ["--workers 4 needs 4 GPUs"]),
        (size({"memory": 1}), ("verify-data", "s3://b/d"), ["the command needs CPUs"]),
        (size({"memory": 1}), ("toy-data", "--out", "s3://b/d"), []),
        (size({"CPU": 2}), ("verify-data", "s3://b/d", "--cpus", "3"), ["--cpus 3 needs 3 CPUs"]),
    ],
)
def test_what_is_missing(cluster: ClusterSize, words: tuple[str, ...], missing: list[str]) -> None:
    assert submit._missing(cluster, Submission(), settings(*words)) == missing


def test_one_node_must_have_all_that_the_driver_needs() -> None:
    asked = Submission(driver_cpus=2, driver_resources={"disk": 1})
    assert submit._missing(size({"CPU": 2}, {"disk": 1}), asked, {}) == ["no node has 2 CPU, 1 disk for the driver"]
    assert submit._missing(size({"CPU": 2, "disk": 1}), asked, {}) == []


class Sized:
    """Of a client, what the check of the size needs."""

    url = "http://head:8265"


def test_a_cluster_that_may_grow_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings(*TRAIN, "--workers", "8")
    submit._check_size(Sized(), size({"CPU": 2}, may_grow=True), Submission(), asked)  # type: ignore[arg-type]
    assert "--workers 8 needs 8 CPUs: waiting for nodes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has 2 CPUs and 0 GPUs on 1 nodes, but --workers 8 needs 8 CPUs"):
        submit._check_size(Sized(), size({"CPU": 2}), Submission(), asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"name": "a b"}, {"driver_cpus": -1.0}, {"driver_resources": {"x": 0.0}}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"name is|must be positive"):
        Submission(**options)


# ---- addresses and ends


@pytest.mark.parametrize(
    ("address", "environment", "url"),
    [
        ("http://a:1/", {}, "http://a:1"),
        ("http://a:1", {"RAY_API_SERVER_ADDRESS": "http://b:2", "RAY_ADDRESS": "http://c:3"}, "http://a:1"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://b:2", "RAY_ADDRESS": "http://c:3"}, "https://b:2"),
        (None, {"RAY_ADDRESS": "http://c:3"}, "http://c:3"),
    ],
)
def test_which_address_counts(
    address: str | None, environment: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert api_server(address) == url


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "say which cluster"),
        ("ray://head:10001", "give the address of the cluster's Jobs API"),
        ("head", "HOST:PORT"),
        ("http://ada:pw@head:8265", "holds a credential"),
        ("127.0.0.1:1", "no Ray cluster at --address 127.0.0.1:1"),
    ],
)
def test_addresses_of_another_kind(address: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api_server(address)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -signal.SIGKILL, 137),
        (JobStatus.FAILED, None, 1),  # the node died, or the code did not arrive
        (JobStatus.STOPPED, None, 1),
    ],
)
def test_exit_codes(status: JobStatus, code: int | None, expected: int) -> None:
    job = JobDetails(type=JobType.SUBMISSION, status=status, entrypoint="x", driver_exit_code=code)
    assert exit_code(job) == expected


class Cluster:
    """Of a client, what following a job needs: a job of these states, the last one for good, and its log."""

    url = "http://head:8265"

    def __init__(self, *states: JobStatus | Exception, logs: Sequence[str | Exception] = ("a log\n",)) -> None:
        self.states, self.logs = list(states), list(logs)

    def job(self, job_id: str) -> JobDetails:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return JobDetails(type=JobType.SUBMISSION, status=state, entrypoint="x", message="no node\nhas a GPU")

    def get_job_logs(self, job_id: str) -> str:
        log = self.logs.pop(0) if len(self.logs) > 1 else self.logs[0]
        if isinstance(log, Exception):
            raise log
        return log


def follow(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = submit.follow(cluster, "j", None)  # type: ignore[arg-type]
    return code, *capsys.readouterr()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_SECONDS", "MAX_POLL_SECONDS", "PENDING_SECONDS"):
        monkeypatch.setattr(f"jobs.job_client.{name}", 0.0)


def test_only_what_is_new_in_a_log_is_printed(no_waiting: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [
        "",
        "one\ntw",
        RuntimeError("status 500"),
        "one\n",
        "one\ntwo\n",
        RuntimeError("status 500"),
        "one\ntwo\n3\n",
    ]
    states = [JobStatus.PENDING, *[JobStatus.RUNNING] * 4, JobStatus.SUCCEEDED]
    code, out, err = follow(Cluster(*states, logs=logs), capsys)
    assert (code, out) == (0, "one\ntwo\n3\n")
    assert err.splitlines()[0] == "mrcnn: job j has not begun: no node has a GPU"
    assert "cannot be read" not in err


def test_a_lost_log_is_said(no_waiting: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = follow(Cluster(JobStatus.FAILED, logs=[RuntimeError("Traceback\nno such node.")]), capsys)
    assert (code, out) == (1, "")
    assert "the end of the log cannot be read (no such node)" in err
    assert "failed after 0 s: no node" in err


@pytest.mark.parametrize(
    ("lost", "kind", "message"),
    [
        (ConnectionError("no answer"), ConnectionError, "no answer, and job j may go on; follow it: mrcnn jobs logs j"),
        (ValueError("unknown"), RuntimeError, "unknown; it did before"),
    ],
)
def test_a_cluster_that_is_gone(lost: Exception, kind: type[Exception], message: str, no_waiting: None) -> None:
    with pytest.raises(kind, match=message):
        submit.follow(Cluster(JobStatus.RUNNING, lost), "j", None)  # type: ignore[arg-type]
