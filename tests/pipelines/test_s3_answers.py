"""Answers that an S3 server gives seldom, from a server that gives what a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from pipelines.storage import open_store
from pipelines.storage_errors import FileRefusedError, UnreachableError

Answer = tuple[int, str]
PAGE = "<ListBucketResult><Contents><Key>folder/{}</Key><Size>1</Size><ETag>e</ETag></Contents>{}</ListBucketResult>"
LAST = "<IsTruncated>false</IsTruncated>"
MORE = "<IsTruncated>true</IsTruncated><NextContinuationToken>next</NextContinuationToken>"


def error(status: int, code: str) -> Answer:
    return status, f"<Error><Code>{code}</Code><Message>of the test</Message></Error>"


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[str, dict[str, str]], Answer]], Any]]:
    """Given a function from a request's method and query to the answer: the requests so far."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[str, dict[str, str]], Answer]) -> list[dict[str, str]]:
        asked: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

            def serve(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                query = {key: each[0] for key, each in parse_qs(urlsplit(self.path).query).items()}
                asked.append(query)
                status, text = answer(self.command, query)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_PUT = do_POST = serve  # noqa: N815

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers[-1].server_address[1]}")
        return asked

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-the-test")
    monkeypatch.setattr("aiobotocore.endpoint.AioEndpoint._sleep", at_once)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


async def at_once(self: Any, seconds: float) -> None:
    """Backoff that does not wait."""


@pytest.mark.parametrize(("status", "code"), [(429, "TooManyRequests"), (409, "ConditionalRequestConflict")])
def test_later_is_tried_again(answering: Any, status: int, code: str) -> None:
    answers = iter([error(status, code), (200, "")])
    asked = answering(lambda *_: next(answers))
    assert open_store("s3://bucket/folder").create_bytes("plan", b"mine")
    assert len(asked) == 2


def test_a_listing_ends_where_the_server_says_so(answering: Any) -> None:
    """Where a proxy answers instead, with a page of its own, the files that are not listed would be lost."""
    pages = {"": PAGE.format("a", MORE), "next": PAGE.format("b", LAST)}
    answering(lambda _, query: (200, pages[query.get("continuation-token", "")]))
    store = open_store("s3://bucket/folder")
    assert list(store.list()) == ["a", "b"]
    for page in ("<html><body>log in</body></html>", "", PAGE.format("b", "<IsTruncated>true</IsTruncated>")):
        pages["next"] = page
        with pytest.raises(UnreachableError, match=r"s3://bucket/folder cannot be listed .* the answer is not S3's"):
            list(store.list())


def test_one_level_is_asked_for_where_one_is_wanted(answering: Any) -> None:
    asked = answering(lambda *_: (200, PAGE.format("a", LAST)))
    assert list(open_store("s3://bucket/folder").files()) == [("a", 1)]
    assert asked[0]["delimiter"] == "/"


def test_keys_with_dots_are_listed(answering: Any) -> None:
    """What is hidden begins with one: these parts lead somewhere, and their files are read, or rejects."""
    pages = [PAGE.format(name, LAST) for name in ("a/./b.jpg", "a/../b.jpg", ".hidden/b.jpg")]
    answering(lambda *_: (200, pages.pop(0)))
    store = open_store("s3://bucket/folder")
    assert [list(store.list()) for _ in range(3)] == [["a/./b.jpg"], ["a/../b.jpg"], []]


def test_what_is_checked_first_is_what_is_listed_later(answering: Any) -> None:
    """A policy may allow the listing of folder/ and of nothing else."""
    asked = answering(
        lambda _, query: (200, PAGE.format("a", LAST)) if query["prefix"] == "folder/" else error(403, "AccessDenied")
    )
    store = open_store("s3://bucket/folder").check_answers()
    assert list(store.list()) == ["a"]
    assert {each["prefix"] for each in asked} == {"folder/"}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(400, "ExpiredToken", PermissionError), (403, "RequestTimeTooSkewed", PermissionError),
     (403, "InvalidObjectState", FileRefusedError)],
)  # fmt: skip
def test_refused_credentials_are_not_the_files_fault(
    answering: Any, status: int, code: str, expected: type[Exception]
) -> None:
    """Even if the folder answers again by the time that it is looked at: an image would be rejected."""
    answering(lambda _, query: (200, PAGE.format("a", LAST)) if "list-type" in query else error(status, code))
    with pytest.raises(expected, match=r"s3://bucket/folder/a was refused \(of the test\)") as told:
        open_store("s3://bucket/folder").read_bytes("a")
    assert isinstance(told.value, FileRefusedError) == (expected is FileRefusedError)


def test_a_bucket_that_is_not_there_is_called_so(answering: Any) -> None:
    answering(lambda *_: error(404, "NoSuchBucket"))
    with pytest.raises(FileNotFoundError, match=r"there is no bucket s3://bucket at .*: make it, or name another"):
        open_store("s3://bucket/folder").check_answers()


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_line_break_in_a_credential_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file that was mounted has one at its end."""
    monkeypatch.setenv("AWS_KEY_OF_OTHERS", "-----BEGIN\n")
    monkeypatch.setenv(name, "SECRET\n")
    with pytest.raises(ValueError, match=rf"^{name} holds a line break, or other control characters") as told:
        open_store("s3://bucket/folder").check_answers()
    assert "SECRET\n" not in str(told.value)


def test_a_profile_or_certificates_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nope")
    with pytest.raises(PermissionError, match=r"no credentials for s3://bucket/folder: .*nope.* unset AWS_PROFILE"):
        open_store("s3://bucket/folder").check_answers()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nope.pem")
    with pytest.raises(ValueError, match=r"^AWS_CA_BUNDLE is '/nope.pem', where there is no file"):
        open_store("s3://bucket/folder").check_answers()


@pytest.mark.parametrize(
    "value",
    ["http://user:SECRET@127.0.0.1:9", "http://user:SEC/RET@127.0.0.1:9", "http://127.0.0.1:9/?token=SECRET",
     "http://SECRET@127.0.0.1:9", "127.0.0.1:9", "nonsense", "http://", "ftp://127.0.0.1"],
)  # fmt: skip
def test_an_endpoint_that_is_none_is_told_without_what_is_secret(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    with pytest.raises(ValueError, match=r"AWS_ENDPOINT_URL.* is not the address of a server: write http") as told:
        open_store("s3://bucket/folder").check_answers()
    assert "SEC" not in str(told.value).replace("AWS_SECRET_ACCESS_KEY", "")
    assert ("@" in value or "?" in value) or repr(value) in str(told.value)


@pytest.mark.parametrize(
    ("status", "code"), [(301, "PermanentRedirect"), (400, "InvalidRequest"), (501, "NotImplemented")]
)
def test_what_no_second_request_changes_names_the_remedy(answering: Any, status: int, code: str) -> None:
    asked = answering(lambda method, query: error(status, code))
    with pytest.raises(ValueError, match="check AWS_ENDPOINT_URL, AWS_REGION and the name of the bucket") as raised:
        open_store("s3://bucket/folder").read_bytes("file")
    assert not isinstance(raised.value, UnreachableError)
    assert "bucket/folder/file cannot be reached" in str(raised.value)
    assert len(asked) < 4
