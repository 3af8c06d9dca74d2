"""An HTTP proxy before an S3 server that fails where a test tells it to.

A client is given the proxy's address as its endpoint and signs that as Host; the proxy passes all headers on as they
are, so the signature stays valid for the server behind.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Fault = Literal["500", "503", "403", "drop", "mute", "lose", "cut", "stall", "slow", "drip", "choke", "sip"]
"""500 InternalError, 503 SlowDown or 403 AccessDenied instead of an answer; drop: close the connection before asking
the server; mute: keep it open and say nothing; lose: ask it, but close before answering; cut: close in the middle of
the body; stall: send half of the body, then nothing; slow: half of the body, a second, the other half; drip: half of
it, then a byte each DRIP_SECONDS; choke: take half of what is sent, then nothing; sip: a megabyte of it each
SIP_SECONDS, but at once its last GULP"""

Decide = Callable[[str, str, int], Fault | None]
"""Of a method, a path (/bucket/key) and how often this pair has come before, whatever the order of others"""

CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}
UNTIL_GONE = 30.0
DRIP_SECONDS = 0.2
SIP_SECONDS = 0.15
GULP = 20_000_000  # what is sent waits in buffers: the sender is done with all of it before it has left


class FaultyProxy(ThreadingHTTPServer):
    """Threads, one a connection. `seen` counts requests by method and path, `made` the faults."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, server: str, decide: Decide) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = urlsplit(server).netloc
        self.decide = decide
        self.seen: Counter[tuple[str, str]] = Counter()
        self.made: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            fault = self.decide(method, path, self.seen[method, path])
            self.seen[method, path] += 1
            self.made[fault or "none"] += 1
        return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what is being tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def _serve(self) -> None:
        fault = self.server.fault(self.command, unquote(urlsplit(self.path).path))
        body = self._taken(int(self.headers.get("Content-Length", 0)), fault)
        if fault == "mute":
            self.server.closing.wait(UNTIL_GONE)
        if fault in ("drop", "mute", "choke"):
            self.close_connection = True
        elif fault in CODES:
            self._refuse(fault)
        else:
            self._answer(*self._ask(body), None if fault == "sip" else fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815

    def _taken(self, size: int, fault: Fault | None) -> bytes:
        if fault == "choke":
            self.rfile.read(size // 2)
            self.server.closing.wait(UNTIL_GONE)
            return b""
        if fault == "sip":
            sips = []
            for _ in range(0, size - GULP, 10**6):
                time.sleep(SIP_SECONDS)
                sips.append(self.rfile.read(10**6))
            return b"".join([*sips, self.rfile.read(size - 10**6 * len(sips))])
        return self.rfile.read(size)

    def _refuse(self, status: str) -> None:
        text = f"<Error><Code>{CODES[status]}</Code><Message>of the faulty proxy</Message></Error>".encode()
        self.send_response(int(status))
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/xml")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.server.server, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def _answer(self, answer: http.client.HTTPResponse, data: bytes, fault: Fault | None) -> None:
        if fault == "lose":
            self.close_connection = True
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self._body(data, fault)

    def _body(self, data: bytes, fault: Fault | None) -> None:
        half = len(data) // 2
        self.wfile.write(data if fault is None else data[:half])
        self.wfile.flush()
        if fault == "slow":
            time.sleep(1.0)
            self.wfile.write(data[half:])
        elif fault == "drip":
            for place in range(half, len(data)):
                if self.server.closing.wait(DRIP_SECONDS):
                    break
                self.wfile.write(data[place : place + 1])
        elif fault is not None:
            if fault == "stall":
                self.server.closing.wait(UNTIL_GONE)
            self.close_connection = True


@contextmanager
def faulty_proxy(server: str, decide: Decide) -> Iterator[FaultyProxy]:
    """Run a proxy before the server at a URL."""
    proxy = FaultyProxy(server, decide)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
