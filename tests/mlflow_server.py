"""A real MLflow server in a process of its own, and a gate before it that a test can shut."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

START_SECONDS = 120.0


class Gate:
    """A TCP proxy. `drop` ends all connections and every new one at once; `hang` lets them be made, but nothing
    through; `open` lets everything through again."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._state: Literal["open", "drop", "hang"] = "open"
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.refused = 0
        """Connections that got no answer"""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def open(self) -> None:
        self._set("open")

    def drop(self) -> None:
        self._set("drop")

    def hang(self) -> None:
        self._set("hang")

    def close(self) -> None:
        self._listener.close()
        self._set("drop")

    def _set(self, state: Literal["open", "drop", "hang"]) -> None:
        self._state = state
        for each in list(self._sockets):  # whoever waits behind a shut gate learns that it is over
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            if self._state == "open":
                self._connect(client)
            else:
                self.refused += 1
                if self._state == "drop":
                    client.close()
                else:
                    self._sockets.add(client)

    def _connect(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._behind))
        self._sockets |= {client, server}
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            self._sockets.discard(each)
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextmanager
def gate_before(port: int) -> Iterator[Gate]:
    """An open gate before a port of this machine."""
    gate = Gate(port)
    try:
        yield gate
    finally:
        gate.close()


@contextmanager
def local_mlflow(folder: Path) -> Iterator[int]:
    """Run a server that keeps everything in `folder`, artifacts too; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes for jobs of its own
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        _wait_until_it_answers(process, port, folder / "server.log")
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with its own children; nothing of it is wanted any more
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return
        time.sleep(0.2)
    raise TimeoutError(f"no MLflow server after {START_SECONDS} s: {log.read_text()}")
