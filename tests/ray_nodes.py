"""A Ray cluster of several nodes on this machine, apart from any other: own ports, folder, token and processes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
END_SECONDS = 5.0


@dataclass
class Nodes:
    """A head without CPUs, and one more node for each of the resources that were asked for."""

    folder: Path
    environment: dict[str, str]
    port: int
    dashboard_port: int
    one_folder: bool
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Of the Jobs API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What a client needs, beside the address."""
        return {name: self.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}

    def ask(self, path: str) -> Any:
        """The answer of the head's HTTP server, as JSON; None as long as there is none."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=10) as answer:
                return json.load(answer)
        except (OSError, urllib.error.URLError):
            return None

    def alive(self) -> int:
        answer = self.ask("/api/v0/nodes?limit=100")
        return sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"]) if answer else 0

    def is_known_as_fixed(self) -> bool:
        """Whether the monitor has reported; before, nobody can tell whether there is an autoscaler."""
        answer = self.ask("/api/cluster_status")
        return bool(answer and (answer["data"]["clusterStatus"] or {}).get("autoscalerReport"))

    def start(self, *words: str) -> None:
        program = str(Path(sys.executable).with_name("ray"))
        common = (
            "--block", "--disable-usage-stats", "--object-store-memory=80000000", "--dashboard-agent-listen-port=0",
            "--min-worker-port=0", "--max-worker-port=0",
            f"--temp-dir={self.folder / ('ray' if self.one_folder else str(len(self.processes)))}",
        )  # fmt: skip
        with (self.folder / f"node-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [program, "start", *words, *common], env=self.environment, cwd=self.folder, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)

    def join(self, resources: Mapping[str, float]) -> None:
        """Start a node with one CPU and these resources; it has joined when this returns."""
        alive = self.alive()
        self.start(
            f"--address=127.0.0.1:{self.port}", f"--node-ip-address=127.0.0.{len(self.processes) + 1}", "--num-cpus=1",
            f"--resources={json.dumps(resources)}",
        )  # fmt: skip
        self.wait_for(alive + 1)  # in one folder, two that start at once choose the same names for their sockets

    def wait_for(self, nodes: int) -> None:
        until = time.monotonic() + START_SECONDS
        while self.alive() < nodes:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("node-*.log")))
            assert self.processes[-1].poll() is None, logs
            assert time.monotonic() < until, logs
            time.sleep(0.2)

    def end(self) -> None:
        """`ray start --block` ends its node's processes when it is told to end."""
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


@contextlib.contextmanager
def ray_nodes(
    resources: Sequence[Mapping[str, float]], environment: Mapping[str, str], *, one_folder: bool = False
) -> Iterator[Nodes]:
    """Start a head and nodes with one CPU and these resources each; end them with the block.

    The environment is added to the bare minimum that processes need, not to this one's. Each node has a folder of its
    own, because nodes remove and make again the folder of a job's code where another node has made it. With
    `one_folder` all nodes call it the same, as on machines of their own: only then the log of a job whose driver is
    not on the head is found.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # not pytest's: paths of sockets are at most 107 characters long
    bare = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder), "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_raylet_start_wait_time_s": "120",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }  # fmt: skip
    nodes = Nodes(folder, bare | dict(environment), free_port(), free_port(), one_folder)
    nodes.environment["RAY_API_SERVER_ADDRESS"] = nodes.url  # there may be other clusters on this machine
    try:
        nodes.start(
            "--head", f"--port={nodes.port}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={nodes.dashboard_port}",
        )  # fmt: skip
        nodes.wait_for(1)
        for extra in resources:
            nodes.join(extra)
        yield nodes
    finally:
        nodes.end()
        shutil.rmtree(folder, ignore_errors=True)
