"""`mrcnn submit` and `mrcnn jobs` on a real cluster: a head without CPUs and two nodes with one each."""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_process import Commands, commands
from faulty_proxy import Fault, faulty_proxy
from ray_nodes import Nodes, free_port, ray_nodes

from mrcnn.ops._library import LIBRARY
from pipelines.toy import ToySummary

pytestmark = pytest.mark.drill

SECRET = secrets.token_hex(16)
LONG = ("toy-data", "--images", "1000000", "--out")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """On these nodes there are packages of our names that cannot be imported, before those that are installed: what
    runs is what was sent. Only the compiled operators are good."""
    decoy = tmp_path_factory.mktemp("decoy")
    for package in ("mrcnn", "pipelines", "jobs"):
        (decoy / package).mkdir()
        (decoy / package / "__init__.py").write_text("raise RuntimeError('not the code that was sent')")
    (decoy / "mrcnn/ops").mkdir()
    (decoy / "mrcnn/ops" / LIBRARY.name).symlink_to(LIBRARY)
    with ray_nodes([{"first": 1}, {"second": 1}], {"PYTHONPATH": str(decoy)}, one_folder=True) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def mrcnn(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs commands of a client that has secrets in its environment."""
    environment = {
        "PATH": nodes.environment["PATH"], "HOME": nodes.environment["HOME"], "RAY_API_SERVER_ADDRESS": nodes.url,
        "AWS_SECRET_ACCESS_KEY": SECRET, "MLFLOW_TRACKING_URI": f"https://ada:{SECRET}@mlflow.example.org",
        "AWS_ENDPOINT_URL": "https://s3.example.org", "AWS_ENDPOINT_URL_S3": "http://localhost:8333",
        **nodes.client_environment,
    }  # fmt: skip
    with commands(tmp_path_factory.mktemp("client"), environment) as mrcnn:
        yield mrcnn


def wait_until(condition: Callable[[], object], seconds: float = 180.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


# ---- jobs that run


def test_a_job_on_all_nodes_is_followed_through_broken_connections(
    nodes: Nodes, mrcnn: Commands, toy_data: ToySummary, tmp_path: Path
) -> None:
    """The driver is on a worker node, the tasks need both; every request that a job needs is disturbed once."""

    def decide(method: str, path: str, count: int) -> Fault | None:
        faults: dict[str, list[Fault | None]] = {
            "POST /api/jobs/": ["lose"],
            "GET /api/jobs/build": [None, "drop", "503"],
            "GET /api/jobs/build/logs": ["cut", None, "drop", "500"],
        }
        return dict(enumerate(faults.get(f"{method} {path}", []))).get(count)

    with faulty_proxy(nodes.url, decide) as proxy:
        done = mrcnn.run(
            "submit", "--address", proxy.url, "--name", "build", "--driver-resources", "first", "0.5", "--",
            "build-data", "--images", toy_data.images_uri, "--annotations", toy_data.annotations_uri,
            "--out", str(tmp_path / "shards"), "--shorter-side", "96", "--longer-side", "160", "--rows-per-shard", "4",
        )  # fmt: skip
    assert done.code == 0, done
    assert {"lose", "drop", "503", "cut"} <= set(proxy.made)
    assert "trying again" in done.err
    assert "job build: succeeded" in done.err
    assert done.out.count("Running entrypoint for job build: python -m jobs.cli build-data") == 1
    assert done.out.count("16 of 16 images") == 1
    assert json.loads((tmp_path / "shards/manifest.json").read_text())["shards"]
    assert len([job for job in nodes.ask("/api/jobs/") if job["submission_id"] == "build"]) == 1
    job = nodes.ask("/api/jobs/build")
    assert job["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "https://s3.example.org"
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3"):
        assert name not in job["runtime_env"]["env_vars"]
        assert f"{name} is not sent" in done.err


def test_a_failed_command_gives_its_exit_code_and_last_line(mrcnn: Commands, tmp_path: Path) -> None:
    done = mrcnn.run("submit", "--ship", "code", "--", "inspect-data", f"{tmp_path}/none", "--out", str(tmp_path))
    assert done.code == 2, done  # and not 1, as when the operators of the node were not found
    assert done.out.splitlines()[-1].startswith(f"mrcnn: error: {tmp_path}/none holds no finished shards")
    assert "failed with exit code 2" in done.err


def test_a_job_that_is_not_waited_for(mrcnn: Commands, tmp_path: Path) -> None:
    sent = mrcnn.run("submit", "--no-wait", "--", *LONG, str(tmp_path))
    job = sent.out.strip()
    assert (sent.code, re.fullmatch(r"toy-data-[0-9a-f]{8}", job) is not None) == (0, True), sent
    assert f"mrcnn jobs logs {job} --follow" in sent.err

    following = mrcnn.start("jobs", "logs", job, "--follow")
    wait_until(lambda: (tmp_path / "images").exists() and "Running entrypoint" in following.out)
    listed = mrcnn.run("jobs", "list")
    assert len(re.findall(rf"^{job} +RUNNING .* mrcnn toy-data --images 1000000 ", listed.out, re.MULTILINE)) == 1, (
        listed
    )
    again = mrcnn.run("submit", "--name", job, "--", "toy-data", "--out", str(tmp_path))
    assert (again.code, f"has a job {job} already" in again.err) == (2, True), again

    following.interrupt()
    left = following.wait()
    assert (left.code, f"job {job} goes on" in left.err, f"mrcnn jobs stop {job}" in left.err) == (130, True, True)

    following = mrcnn.start("jobs", "logs", job, "--follow")
    stopped = mrcnn.run("jobs", "stop", job)
    assert (stopped.code, f"job {job}: stopped" in stopped.out) == (0, True), stopped
    assert following.wait().code == 1
    assert "Running entrypoint" in mrcnn.run("jobs", "logs", job).out
    assert "had ended: stopped" in mrcnn.run("jobs", "stop", job).out


def test_no_secret_is_anywhere(nodes: Nodes, mrcnn: Commands, tmp_path: Path) -> None:
    """After all that the tests above did: not in what the API tells, in a file of the cluster, in what was printed."""
    assert mrcnn.run("submit", "--", "toy-data", "--images", "1", "--out", str(tmp_path)).code == 0
    told = json.dumps([nodes.ask("/api/jobs/"), nodes.ask("/api/v0/jobs?detail=1"), nodes.ask("/api/v0/runtime_envs")])
    assert "toy-data" in told
    files = [path for path in nodes.folder.rglob("*") if path.is_file()]
    assert any("job-driver" in path.name for path in files)
    texts = [told, *(path.read_text(errors="replace") for path in files), *(run.out + run.err for run in mrcnn.started)]
    assert not any(SECRET in text for text in texts)


# ---- what is refused at once


TRAIN = ("train", "toy", "--data", "/d", "--val-data", "/v", "--storage", "/s", "--run", "r")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--", *TRAIN, "--workers", "3"), "has 2 CPUs and 0 GPUs on 3 nodes, but --workers 3 needs 3 CPUs"),
        (("--", "verify-data", "/d", "--cpus", "5"), "--cpus 5 needs 5 CPUs"),
        (("--driver-cpus", "2", "--", "toy-data", "--out", "/o"), "no node has 2 CPU for the driver"),
        (("--driver-resources", "first", "1", "second", "1", "--", "toy-data", "--out", "/o"), "1 first, 1 second"),
    ],
)
def test_what_the_cluster_cannot_give(nodes: Nodes, mrcnn: Commands, words: tuple[str, ...], message: str) -> None:
    wait_until(nodes.is_known_as_fixed)
    jobs = len(nodes.ask("/api/jobs/"))
    done = mrcnn.run("submit", *words)
    assert (done.code, message in done.err, done.seconds < 30) == (2, True, True), done
    assert len(nodes.ask("/api/jobs/")) == jobs


def test_addresses(nodes: Nodes, mrcnn: Commands) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = {
            "closed": mrcnn.start("jobs", "list", "--address", f"http://127.0.0.1:{free_port()}"),
            "silent": mrcnn.start("jobs", "list", "--address", f"http://127.0.0.1:{silent.getsockname()[1]}"),
            "token": mrcnn.start("jobs", "list", RAY_AUTH_TOKEN="0" * 64),
            "cluster": mrcnn.start("jobs", "list", RAY_API_SERVER_ADDRESS="", RAY_ADDRESS=f"127.0.0.1:{nodes.port}"),
            "job": mrcnn.start("jobs", "logs", "none"),
        }
        done = {name: running.wait() for name, running in started.items()}
    codes = {name: result.code for name, result in done.items()}
    assert codes == {"closed": 2, "silent": 2, "token": 2, "cluster": 0, "job": 2}, done
    assert max(result.seconds for result in done.values()) < 30
    for name in ("closed", "silent"):
        assert "no Ray cluster at http://127.0.0.1" in done[name].err
    assert "refuses this client's token" in done["token"].err
    assert done["cluster"].out.startswith("JOB ")
    assert "knows no job none" in done["job"].err
