"""Stores: the same on disk and on S3, never outside their root, errors in words."""

from __future__ import annotations

import fcntl
import inspect
import os
import socket
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientConnectorDNSError
from aiohttp.client_reqrep import ConnectionKey
from faulty_proxy import Fault, faulty_proxy

from pipelines import local_files
from pipelines.filesystems import ATTEMPTS, BODY_ATTEMPTS, filesystem
from pipelines.storage import Store, open_store, read_uri
from pipelines.storage_errors import FileRefusedError, UnfitFileError, UnreachableError

NAMES = ["a/deep/one.jpg", "a/two.JPG", "b.txt", "with space/ünicode.png"]


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_write_read_list_remove(root: str) -> None:
    store = open_store(root + "/")
    assert list(store.list()) == []
    for name in NAMES:
        store.write_bytes(name, name.encode())
    store.write_bytes(".hidden/file", b"")
    assert list(store.list()) == NAMES
    assert list(store.list((".jpg", ".png"))) == [NAMES[0], NAMES[1], NAMES[3]]
    assert store.read_bytes(NAMES[3]) == NAMES[3].encode()
    assert store.read_range(NAMES[0], 2, 4) == b"deep"
    assert store.size(NAMES[0]) == len(NAMES[0])
    assert read_uri(f"{root}/{NAMES[2]}") == b"b.txt"
    assert list(store.join("a").list()) == ["deep/one.jpg", "two.JPG"]
    assert store.exists("a/two.JPG")
    assert store.exists("a")
    assert not store.exists("c")
    store.remove("b.txt")
    store.remove_folder("a")
    store.remove_folder("never there")
    assert list(store.list()) == [NAMES[3]]


def test_a_removed_folders_name_is_no_pattern(root: str) -> None:
    store = open_store(root)
    for name in ("out1/file", "out[1]/file", "out[1]/.hidden/file", "outer/file", "out*/file"):
        store.write_bytes(name, b"")
    store.remove_folder("out[1]")
    store.remove_folder("out*")
    store.remove_folder("out?")
    assert [name for name, _ in store.entries(hidden=True)] == ["out1/file", "outer/file"]


def test_a_part_that_is_removed_before_its_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another build that takes it for a leftover."""
    store, lock = open_store(str(tmp_path)), local_files.lock
    parts: list[str] = []

    def late(file: Any, kind: int) -> bool:
        if kind == fcntl.LOCK_SH and not parts:
            parts.append(file.name)
            store.remove_leftovers()
            assert not Path(file.name).exists()
        return lock(file, kind)

    monkeypatch.setattr(local_files, "lock", late)
    with store.new_file("name") as part:
        part.write_bytes(b"whole")
        store.remove_leftovers()
    assert parts
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("name", b"whole")]


class CloudError(Exception):
    """As the libraries of other clouds raise them."""


def test_errors_of_any_cloud_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://folder")
    raised: list[Exception] = [CloudError("no token at https://cloud.example/a?sig=SECRET")]

    def fail(self: Any, path: str, **kwargs: Any) -> bytes:
        raise raised[0]

    monkeypatch.setattr(type(store._fs), "cat_file", fail)
    with pytest.raises(ValueError, match=r"^memory://folder/a cannot be used: CloudError: no token at .*/a$"):
        store.read_bytes("a")
    raised[0] = TypeError("a mistake")
    with pytest.raises(TypeError):
        store.read_bytes("a")


def test_new_file_appears_only_when_complete(root: str) -> None:
    store = open_store(root)

    def write_half() -> None:
        with store.new_file("large") as part:
            part.write_bytes(b"half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert not store.exists("large")
    with store.new_file("large") as part:
        part.write_bytes(b"whole")
        assert not store.exists("large")
    assert store.read_bytes("large") == b"whole"
    if store.is_local:
        assert [path.name for path in store.path.iterdir()] == ["large"], "nothing half-written stays behind"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../secret", "a/../../secret", "s3://other/file", "nul\0"])
def test_names_never_lead_out(root: str, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of its folder"):
        open_store(root).read_bytes(name)


def test_missing_file_and_folder(root: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no file {root}/nothing"):
        open_store(root).read_bytes("nothing")
    with pytest.raises(FileNotFoundError, match="no file"):
        open_store(root).read_bytes("x" * 300)
    with pytest.raises(FileNotFoundError, match=f"no folder {root}/nothing"):
        open_store(f"{root}/nothing").check_folder()


@pytest.mark.parametrize("scheme", ["s3a", "s3n"])
def test_s3_by_the_names_that_hadoop_has_for_it(scheme: str) -> None:
    assert open_store(f"{scheme}://bucket/x/") == open_store("s3://bucket/x")
    with pytest.raises(ValueError, match="'s3://' names no bucket"):
        open_store(f"{scheme}://")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftq://host/x", "unknown scheme 'ftq'"),
        ("data://x/y", "there are no files at data:// itself"),
        ("simplecache://x/y", "there are no files at simplecache:// itself"),
        ("s3://", "names no bucket"),
        ("s3://key:secret@bucket/x", "must not hold credentials"),
        ("s3://key:secret/more@bucket/x", "must not hold credentials"),
    ],
)
def test_bad_uris(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_store(uri)
    assert "key:secret" not in str(error.value)


def test_missing_bucket(s3: str) -> None:
    store = open_store("s3://no-such-bucket/x")
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        store.check_folder()
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        store.write_bytes("file", b"")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_fail_within_seconds(s3: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"{s3}/folder")
    monkeypatch.setenv(name, "wrong-value")
    start = time.monotonic()
    with pytest.raises(PermissionError, match="AWS_ACCESS_KEY_ID") as error:
        store.check_folder()
    with pytest.raises(PermissionError, match="refused"):
        store.read_bytes("file")
    assert time.monotonic() - start < 10
    assert "wrong-value" not in str(error.value)


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PermissionError, match="no credentials"):
        open_store(s3).read_bytes("file")


def test_unreachable_endpoint_fails_within_seconds(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be reached at AWS_ENDPOINT_URL=http://127.0.0.1:9"):
        open_store(f"{s3}/folder").check_folder()
    assert time.monotonic() - start < 20


def test_the_first_of_two_creates_a_file(root: str) -> None:
    store = open_store(root)
    assert store.create_bytes("plan", b"first")
    assert not store.create_bytes("plan", b"second")
    assert store.read_bytes("plan") == b"first"
    assert [name for name, _ in store.entries(hidden=True)] == ["plan"]


def test_entries_with_sizes_and_hidden_ones(root: str) -> None:
    store = open_store(root)
    store.write_bytes("a/b", b"123")
    store.write_bytes(".c", b"12")
    assert list(store.entries()) == [("a/b", 3)]
    assert sorted(store.entries(hidden=True)) == [(".c", 2), ("a/b", 3)]


def test_hidden_folders_are_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may hold a cache of millions, or be closed to us."""
    (tmp_path / "a/.cache/deep").mkdir(parents=True)
    (tmp_path / "a/.cache/deep/b.jpg").touch()
    store, listed = open_store(str(tmp_path)), list[str]()
    kind = type(store._fs)
    ls = kind.ls
    monkeypatch.setattr(kind, "ls", lambda self, path, **how: (listed.append(path), ls(self, path, **how))[1])
    assert list(store.entries()) == []
    assert [os.path.relpath(path, tmp_path) for path in listed] == [".", "a"]
    assert list(store.entries(hidden=True)) == [("a/.cache/deep/b.jpg", 0)]


def test_a_local_copy_to_read(root: str) -> None:
    store = open_store(root)
    data = bytes(range(256)) * 50_000
    store.write_bytes("large", data)
    with store.local_copy("large") as path:
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("fault", "requests"),
    [("500", ATTEMPTS), ("drop", 2 * ATTEMPTS), ("mute", ATTEMPTS), ("cut", BODY_ATTEMPTS), ("stall", BODY_ATTEMPTS)],
)
def test_what_is_tried_again_is_not_tried_again_by_others(
    s3: str, monkeypatch: pytest.MonkeyPatch, fault: Fault, requests: int
) -> None:
    """botocore, s3fs and this program have loops of their own; aiohttp, too, once, for connections that are closed."""
    monkeypatch.setenv("MRCNN_S3_READ_SECONDS", "0.3")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    store = open_store(f"{s3}/tried")
    store.write_bytes("file", bytes(1000))
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], lambda *request: fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for read in (partial(store.read_bytes, "file"), partial(store.read_range, "file", 3, 500)):
            with pytest.raises(ValueError, match=r"tried/file cannot be reached"):
                read()
            assert list(proxy.seen.values()) == [requests]
            proxy.seen.clear()
        if fault not in ("cut", "stall"):
            for ask in (partial(store.write_bytes, "file", b""), partial(store.size, "file"), store.check_folder):
                with pytest.raises(ValueError, match=r"tried.* cannot be reached"):
                    ask()
                assert set(proxy.seen.values()) == {requests}
                proxy.seen.clear()


def test_links_are_found_in_folders_of_any_depth_and_among_links_to_themselves(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    elsewhere.mkdir()
    images.mkdir()
    deepest = images
    for _ in range(400):  # not deeper than pytest, which calls itself for each, can remove again
        deepest = deepest / "d"
        deepest.mkdir()
    for folder in (images, deepest):
        (folder / "away").symlink_to(elsewhere)
        (folder / "itself").symlink_to(folder / "itself")
        (folder / ".hidden").symlink_to(elsewhere)
        (folder / "zz").mkdir()
        (folder / "zz/away").symlink_to(elsewhere)
        (folder / "zz/back").symlink_to(images)
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)  # deeper than Python may call by half
    try:
        names = sorted(open_store(str(images)).linked_folders())
    finally:
        sys.setrecursionlimit(usual)
    below = f"{deepest.relative_to(images)}/"
    assert names == sorted(["away", f"{below}away", f"{below}zz/away", "zz/away"])
    assert list(open_store(str(tmp_path / "none")).linked_folders()) == []


def test_a_link_to_a_folder_elsewhere_is_no_file(tmp_path: Path) -> None:
    """`linked_folders` tells of it: it would be counted twice. A link within is a file, which cannot be read."""
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images / "in", elsewhere):
        folder.mkdir(parents=True)
        (folder / "b.jpg").touch()
    (images / "a.jpg").touch()
    (images / "photos.jpg").symlink_to(elsewhere)
    (images / "other").symlink_to(elsewhere)
    (images / "file.jpg").symlink_to(elsewhere / "b.jpg")
    (images / "within.jpg").symlink_to(images / "in")
    store = open_store(str(images))
    assert list(store.list()) == ["a.jpg", "file.jpg", "in/b.jpg", "within.jpg"]
    assert sorted(store.linked_folders()) == ["other", "photos.jpg"]
    followed = [name for name, _ in store.versions(follow_links=True)]
    assert followed == ["a.jpg", "file.jpg", "in/b.jpg", "other/b.jpg", "within.jpg"]  # each folder once


def test_the_root_folder_has_one_slash() -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file /no-such-file$"):
        read_uri("/no-such-file")


@pytest.mark.parametrize(
    ("number", "told"), [(socket.EAI_NONAME, "no such host"), (socket.EAI_AGAIN, "cannot be used")]
)
def test_a_host_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, number: int, told: str) -> None:
    """Is the fault of one line of a list; that nobody knows of any host now is not."""
    key = ConnectionKey("host.invalid", 80, False, False, None, None, None)

    def asked(*_: Any, **__: Any) -> None:
        raise ClientConnectorDNSError(key, OSError(number, "of the test"))

    monkeypatch.setattr(time, "sleep", lambda _: None)
    # not of its class: one that is made meanwhile would lack it for ever, see fsspec.asyn.mirror_sync_methods
    monkeypatch.setattr(filesystem("http"), "cat_file", asked)
    with pytest.raises(ValueError, match=told) as error:
        read_uri("http://host.invalid/a.jpg")
    assert isinstance(error.value, UnfitFileError) == (number == socket.EAI_NONAME)
    assert isinstance(error.value, UnreachableError) == (number == socket.EAI_AGAIN)


def test_sizes_that_a_web_server_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "_call", lambda *_: {"name": "file", "size": None})
    assert open_store("https://example.org/folder").size_and_etag("file") == (0, "")


def test_a_range(root: str) -> None:
    store = open_store(root)
    store.write_bytes("file", bytes(range(200)))
    assert store.read_range("file", 3, 5) == bytes(range(3, 8))
    assert store.read_range("file", 199, 1) == bytes([199])
    assert [list(block) for block in store.read_blocks("file", 90)] == [
        list(range(90)), list(range(90, 180)), list(range(180, 200)),
    ]  # fmt: skip


def test_a_large_file_is_one_upload(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one would stay on the server when the writer is killed."""
    store = open_store(f"{s3}/large")
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], lambda *request: None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with store.new_file("file") as part, part.open("wb") as file:
            file.truncate(120 * 2**20)
        assert [(method, times) for (method, _), times in proxy.seen.items()] == [("PUT", 1)]
        assert store.size("file") == 120 * 2**20


def test_a_large_file_is_sent_from_the_disk(s3: str) -> None:
    store = open_store(f"{s3}/streamed")
    with store.new_file("first") as part:  # makes the client, which takes memory, too
        part.write_bytes(b"")
    with store.new_file("file") as part:
        with part.open("wb") as file:
            file.truncate(120 * 2**20)
        tracemalloc.start()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert store.size("file") == 120 * 2**20


@pytest.mark.parametrize(("fault", "puts"), [("choke", 2), ("sip", 1)])
def test_an_upload_may_be_slow_but_not_stand_still(
    s3: str, monkeypatch: pytest.MonkeyPatch, fault: Fault, puts: int
) -> None:
    """The time allowed, of 3 seconds here, begins anew with each part that is taken."""
    monkeypatch.setenv("MRCNN_S3_READ_SECONDS", "2")
    monkeypatch.setattr("pipelines.http_session.SILENCES", 1)
    monkeypatch.setattr("pipelines.http_session.SLOWEST", 4_000_000)
    store, size = open_store(f"{s3}/{fault}"), 50 * 2**20
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], lambda method, path, nth: None if nth else fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        start = time.monotonic()
        with store.new_file("file") as part, part.open("wb") as file:
            file.truncate(size)
        assert [(method, times) for (method, _), times in proxy.seen.items()] == [("PUT", puts)]
        assert time.monotonic() - start < 13, "by its size alone it would have 15 seconds for each"
        assert store.size("file") == size


def test_a_file_that_is_too_large_for_one_upload_is_told(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.s3_objects.SINGLE_PUT", 10)
    store = open_store(f"{s3}/too-large")
    told = pytest.raises(ValueError, match=r"too-large/file has 11 bytes, .*: give fewer --rows-per-shard")
    with told, store.new_file("file") as part:
        part.write_bytes(b"x" * 11)
    assert not store.exists("file")


def test_a_page_on_s3_is_for_a_browser_to_show(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the store itself does not guess it of the name."""
    store, types = open_store(f"{s3}/types"), []
    call_s3 = type(store._fs)._call_s3

    async def watched(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        types.append(kwargs.get("ContentType"))
        return await call_s3(self, method, *args, **kwargs)

    monkeypatch.setattr(type(store._fs), "_call_s3", watched)
    for name in ("report.html", "a.png", "part.parquet"):
        store.write_bytes(name, b"")
    assert types == ["text/html; charset=utf-8", "image/png", None]


def test_a_file_that_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))

    def refuse(path: str, at_most: int | None) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr("pipelines.storage.read_whole", refuse)
    with pytest.raises(FileRefusedError, match=r"no permission for .*/a: check its owner and mode"):
        store.read_bytes("a")


def test_versions_change_with_the_file(root: str) -> None:
    store = open_store(root)
    for name in ("a/b.png", "c.png", ".d.png", "e.txt"):
        store.write_bytes(name, b"123")
    before = dict(store.versions((".png",)))
    assert list(before) == ["a/b.png", "c.png"]
    store.write_bytes("c.png", b"321")
    changed = {name for name, version in store.versions((".png",)) if version != before[name]}
    assert changed == {"c.png"}, "though as long"
