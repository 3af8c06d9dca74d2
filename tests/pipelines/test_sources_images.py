"""Images without annotations: folders and lists; and which settings belong to which format."""

from __future__ import annotations

import gc
import json
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, get_args

import pyarrow.parquet as pq
import pytest
from aiohttp import ClientConnectorCertificateError, ClientConnectorSSLError
from aiohttp.client_reqrep import ConnectionKey
from inline import build_here
from sources import built, write_image

from pipelines.config import BuildConfig, Format
from pipelines.filesystems import ATTEMPTS
from pipelines.sources import SOURCES
from pipelines.sources.image_files import ListedImages
from pipelines.sources.names import SUFFIXES, image_ids, shown_uri
from pipelines.storage import open_store, read_uri
from pipelines.storage_errors import UnfitFileError, UnreachableError, plain_errors, without_secrets


def test_a_folder_is_all_images_below_it(tmp_path: Path) -> None:
    assert {".jfif", ".jpe", ".jp2", ".ppm", ".avif"} < set(SUFFIXES)
    names = sorted([*(f"of/every/kind{suffix}" for suffix in SUFFIXES), "000000000139.png", "UPPER.PNG"])
    for name in names:
        write_image(tmp_path / "data" / name)
    for name in ("notes.txt", "of/list.json", ".hidden/a.png", "of/._a.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("no image")
    made = built(tmp_path / "out", images=str(tmp_path / "data"), format="images")
    assert [row.uri for row in made.rows] == [f"{tmp_path}/data/{name}" for name in names]
    assert [row.image_id for row in made.rows] == image_ids(names)
    assert made.rows[0].image_id == 139
    assert made.classes == []
    assert (made.totals.annotations, made.totals.rejects) == (0, 0)
    summary = build_here(BuildConfig(images=str(tmp_path / "data"), out=str(tmp_path / "again"), format="images"))
    assert summary.passed_over == ("notes.txt", "of/list.json")
    assert "passed over: 2 files that are not named as images (.json, .txt)" in str(summary)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no images .*give the folder that does"):
        built(tmp_path / "other", images=str(tmp_path / "empty"), format="images")


@pytest.mark.parametrize(("settings", "rows"), [({}, 1), ({"tile": 65_500}, 3), ({"encoding": "png"}, 2)])
def test_an_image_that_is_too_long_for_jpeg_is_a_reject(tmp_path: Path, settings: dict[str, Any], rows: int) -> None:
    write_image(tmp_path / "data/long.png", height=10, width=70_000)
    write_image(tmp_path / "data/short.png")
    as_they_are = {"format": "images", "shorter_side": 0, "encoding": "jpeg"}
    made = built(tmp_path / "out", images=str(tmp_path / "data"), **as_they_are | settings)
    assert len(made.rows) == rows
    told = "image has a side too long for jpeg: 70000 x 10 pixels to store, the bound is 65500"
    assert made.rejects == ({} if settings else {"long.png": f"validate: {told}"})


class Web(BaseHTTPRequestHandler):
    """Its files, and what else it answers by the name; the second time all is well with /later."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        data = self.files.get(self.path, b"")
        refused = {"/secret.png": 403, "/down.png": 503, "/later.png": 500 if self.asked[self.path] == 1 else 200}
        self.send_response(refused.get(self.path, 200 if data else 404))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def test_a_list_of_web_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    data = write_image(tmp_path / "a.png", value=20).read_bytes()
    Web.files |= {"/deep/a.png": data, "/later.png": data, "/signed%20%C3%A4.png?sig=SECRET%2F1": data}
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        names = ["deep/a.png", "later.png", "signed ä.png?sig=SECRET%2F1", "nowhere.png", "secret.png"]
        (tmp_path / "list.txt").write_text("".join(f"{web}/{name}\n" for name in names))
        made = built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")
        shown = ["deep/a.png", "later.png", "signed ä.png"]
        assert [row.uri for row in made.rows] == [f"{web}/{name}" for name in shown]
        rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
        assert {each["uri"]: each["reason"] for each in rejects} == {
            f"{web}/nowhere.png": "no such file", f"{web}/secret.png": "no permission",
        }  # fmt: skip
        (tmp_path / "list.txt").write_text(f"{web}/deep/a.png\n{web}/down.png\n")
        with pytest.raises(ValueError, match=rf"^{web}/down\.png cannot be read: the server answers 503$"):
            built(tmp_path / "down", images=str(tmp_path / "list.txt"), format="images")
        assert Web.asked["/down.png"] == ATTEMPTS
        server.shutdown()


@pytest.fixture
def odd_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server whose answers are none."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Odd(BaseHTTPRequestHandler):
        asked: ClassVar[Counter[str]] = Counter()

        def do_GET(self) -> None:
            self.asked[self.path] += 1
            if self.path == "/garbage" or ("garbage" in self.path and self.asked[self.path] == 1):
                self.wfile.write(b"HTTP/9.9 hello\r\n\r\n")
                return
            self.send_response(302 if self.path in ("/loop", "/away") else 200)
            self.send_header("Location", "/loop" if self.path == "/loop" else "file:///etc/passwd")
            sizes = {"/huge": 6_000_000_000, "/drip": 1_000_000}
            if self.path != "/unstated":
                self.send_header("Content-Length", str(sizes.get(self.path, 5)))
            self.end_headers()
            with suppress(OSError):  # the client goes
                if self.path == "/unstated":
                    self.wfile.write(bytes(2000))
                for _ in range(sizes["/drip"] if self.path == "/drip" else 5):
                    self.wfile.write(b"x")
                    time.sleep(0.02)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("huge", "file too large: 6000000000 bytes, the bound is 1000"),
        ("unstated", r"file too large: \d+ bytes, the bound is 1000"),
        ("loop", "the server sends from one address to the next"),
        ("away", "the server sends to what is no web address"),
        ("garbage", "the server's answer is not HTTP"),
    ],
)
def test_what_no_web_server_should_answer_is_a_reject(odd_server: str, name: str, reason: str) -> None:
    with pytest.raises(UnfitFileError) as raised:
        read_uri(f"{odd_server}/{name}", 1000)
    assert re.fullmatch(reason, raised.value.reason)


def test_a_server_that_is_not_trusted_is_a_reject() -> None:
    key = ConnectionKey("host.example", 443, True, True, None, None, None)
    error = ClientConnectorCertificateError(key, ssl.SSLCertVerificationError("self-signed"))
    with pytest.raises(UnfitFileError) as raised, plain_errors("https://host.example/a.jpg?sig=SECRET"):
        raise error
    assert raised.value.reason == "the server's certificate is none that is trusted"
    assert "SECRET" not in str(raised.value)


def test_handshakes_that_fail_may_do_better_later() -> None:
    key = ConnectionKey("host.example", 443, True, True, None, None, None)
    with pytest.raises(UnreachableError), plain_errors("https://host.example/a.jpg"):
        raise ClientConnectorSSLError(key, ssl.SSLError("tlsv1 alert internal error"))


def test_an_odd_answer_is_asked_for_again(odd_server: str) -> None:
    assert read_uri(f"{odd_server}/garbage once") == b"xxxxx"


def test_a_web_server_that_drips_is_given_up(odd_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_uri(f"{odd_server}/slow") == b"xxxxx"
    monkeypatch.setattr("pipelines.web_files.SILENCES", 0.005)  # of 20 s
    with pytest.raises(UnreachableError, match=r"/drip cannot be used: ClientPayloadError: \d+ bytes in \d+ s"):
        read_uri(f"{odd_server}/drip")


def test_schemes_that_need_more_than_a_uri_are_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is told of what fsspec would half make of them."""
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\nftp://127.0.0.1:1/b.png\nsftp://127.0.0.1:1/c.png\n")
    made = built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")
    gc.collect()
    assert set(made.rejects) == {"b.png", "c.png"}
    assert made.rejects["b.png"] == "read: such a file system needs more than a URI"
    assert "Traceback" not in capsys.readouterr().err


def test_file_uris_of_a_list(tmp_path: Path) -> None:
    """As Python, Java, browsers and people write them."""
    data = tmp_path / "with space"
    for value, name in enumerate(("a b#1?ä.png", "50%25.png", "c.png", "d.png")):
        write_image(data / name, value=10 * value)
    lines = [
        (data / "a b#1?ä.png").as_uri(), f"file://{data}/50%25.png", f"file://localhost{data.as_uri()[7:]}/c.png",
        f"file:{data}/d.png", "file://elsewhere/share/e.png", "file:f.png", f"{data.as_uri()}/none.png",
    ]  # fmt: skip
    (tmp_path / "list.txt").write_text("\n".join(lines))
    made = built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")
    assert [int(row.image[0, 0, 0]) for row in made.rows] == [0, 10, 20, 30]
    assert [row.uri.removeprefix(f"{data}/") for row in made.rows] == ["a b#1?ä.png", "50%25.png", "c.png", "d.png"]
    told = "source: not a URI that can be read: it names another machine, or no whole path: write file:///path"
    assert made.rejects == {"e.png": told, "file:f.png": told, "none.png": "read: no such file"}


def test_a_folder_may_be_called_as_a_list_is(tmp_path: Path) -> None:
    write_image(tmp_path / "photos.txt/a.png")
    write_image(tmp_path / "photos.txt/out.txt/b.png")
    for uri in (tmp_path / "photos.txt", (tmp_path / "photos.txt").as_uri()):
        assert len(built(tmp_path / "photos.txt/out.txt", images=str(uri), format="images").rows) == 2
    with pytest.raises(FileNotFoundError, match=r"photos\.txt is a folder: give a file"):
        built(tmp_path / "out", images=str(tmp_path), annotations=str(tmp_path / "photos.txt"))


def test_a_list_of_uris_from_disk_and_s3(s3: str, tmp_path: Path) -> None:
    store = open_store(f"{s3}/listed")
    store.write_bytes("deep/c.png", write_image(tmp_path / "c.png", value=30).read_bytes())
    write_image(tmp_path / "b.png", value=20)
    write_image(tmp_path / "with space ä.png", value=10)
    lines = [
        f"{tmp_path}/with space ä.png", "", "b.png\r", f"{s3}/listed/deep/c.png", f"file://{tmp_path}/c.png", "  ",
        f"{tmp_path}/nowhere.png", "b.png", "../b.png", "magic://x/a.png", f"{s3}/listed/nowhere.png", "s3://a.png",
        "cached://x/a.png", f"file://{tmp_path}/b.png", f"{tmp_path}/c.png", f"{tmp_path}//c.png",
    ]  # fmt: skip
    text = "\n".join(lines).encode()
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text)
    made = built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")
    good = [lines[0], f"{tmp_path}/b.png", lines[3], f"{tmp_path}/c.png"]
    assert [row.uri for row in made.rows] == good
    assert [int(row.image[0, 0, 0]) for row in made.rows] == [10, 20, 30, 30]
    assert [row.image_id for row in made.rows] == image_ids(good)
    assert made.totals.images == len([line for line in lines if line.strip()])
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [(each["uri"], each["reason"].split(":")[0]) for each in rejects] == [
        (f"{tmp_path}/b.png", "listed twice"),
        (f"{tmp_path}/../b.png", "file name leads out of the image folder"),
        ("magic://x/a.png", "not a URI that can be read"),
        ("s3://a.png", "not a URI that can be read"),
        ("cached://x/a.png", "not a URI that can be read"),
        (f"{tmp_path}/b.png", "listed twice"),
        (f"{tmp_path}/c.png", "listed twice"),
        (f"{tmp_path}/c.png", "listed twice"),
        (f"{tmp_path}/nowhere.png", "no such file"),
        (f"{s3}/listed/nowhere.png", "no such file"),
    ]
    store.write_bytes("list.txt", b"deep/c.png\n")
    made = built(tmp_path / "s3", images=f"{s3}/listed/list.txt", format="images")
    assert [row.uri for row in made.rows] == [good[2]]


def test_file_systems_that_a_uri_is_not_enough_for(tmp_path: Path) -> None:
    """fsspec knows them, and wants to be told more than a scheme: as a list's lines they are rejects."""
    write_image(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("b.png\nwebhdfs://host/a.png\ndir://a/b.jpg\n")
    made = built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")
    assert made.rejects == dict.fromkeys(("a.png", "b.jpg"), "read: such a file system needs more than a URI")
    with pytest.raises(ValueError, match=r"webhdfs://... cannot be read: such a file system needs more than a URI"):
        built(tmp_path / "other", images="webhdfs://host/images", format="images")


@pytest.mark.parametrize(
    "line",
    [
        "https://[cdn.example.com/x.jpg", "http://cdn.example.com:80801/x.jpg", "http://a..b/x.jpg",
        f"http://{'a' * 64}.org/x.jpg", "https://h:port/x.jpg", "s3://Bad_Bucket!/x.jpg",
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_one_is_a_reject(tmp_path: Path, line: str) -> None:
    write_image(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text(f"b.png\n{line}\n")
    made = built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")
    (reject,) = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert reject["uri"] == without_secrets(line)
    assert re.search(r"not a URI that can be read: .* names no (host|bucket) that there can be", reject["reason"])
    assert len(made.rows) == 1


SIGNED = [
    " http://h/a.jpg?X-Amz-Signature=SECRET", "HTTP://h/a.jpg?X-Amz-Signature=SECRET", "\thttp://user:SECRET@h/a.jpg",
    '"http://h/a.jpg?X-Amz-Signature=SECRET"', "url,http://h/a.jpg?X-Amz-Signature=SECRET",
    "az://account/container/a.jpg?sv=1&sig=SECRET", "url,https://user:SECRET@h/a.jpg", "s3://KEY:SECRET/b/a.jpg",
    "az://account:SECRET/a.jpg", "https:/user:SECRET@h/a.jpg", "//h/a.jpg?sig=SECRET", "https//h/a.jpg?token=SECRET",
    "h.com/a.jpg?X-Amz-Signature=SECRET",
]  # fmt: skip


def test_secrets_of_lines_that_are_no_uris_neither(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("\n".join([*SIGNED, "b.png"]))
    list_ = {"images": str(tmp_path / "list.txt"), "format": "images"}
    built(tmp_path / "out", **list_, max_reject_share=1.0)
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert len(rejects) == len(SIGNED)
    assert "SECRET" not in str(rejects)
    assert all("a.jpg" in each["uri"] for each in rejects)
    with pytest.raises(ValueError, match=r"--max-reject-share is 0\.1") as error:
        built(tmp_path / "other", **list_, max_reject_share=0.1)
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/what?.jpg", "/disk/what?.jpg", "gs://bucket/what?.jpg", "what?.jpg", "sftp://host:22/a?1.jpg",
        "http://host:8080/a:b@c.jpg", "http://[::1]:80/a.jpg", "s3://bucket/a:b.jpg", "C:/a.jpg",
        "/data/http/me@home/a.jpg", "gs://bucket/https/me@home.jpg",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(uri: str) -> None:
    assert without_secrets(uri) == uri


def test_a_line_without_end_is_no_uri() -> None:
    """Nor is it looked through letter by letter."""
    assert without_secrets("a" * 10_000_000) == "a" * 8192 + "..."
    assert without_secrets("a://b:c" * 1_000_000).startswith("a://b")


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (403, PermissionError, "was refused: the server answers 403"),
        (500, ValueError, "cannot be read: the server answers 500"),
        (503, ValueError, "cannot be read: the server answers 503"),
        (404, FileNotFoundError, "there is no file"),
    ],
)
def test_annotations_from_the_web(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception], told: str
) -> None:
    """fsspec says of all that goes wrong that there is no file. Once is not enough to give up."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    write_image(tmp_path / "a.png")
    image = {"id": 1, "file_name": "a.png", "height": 24, "width": 32}
    coco = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    asked = Counter[str]()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0]
            asked[name] += 1
            data = json.dumps(coco).encode()
            is_good = name == "/good.json" or (name == "/later.json" and asked[name] > 2)
            self.send_response(200 if is_good else 503 if name == "/later.json" else status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}"
        for name in ("good", "later"):
            made = built(tmp_path / name, images=str(tmp_path), annotations=f"{web}/{name}.json?sig=SECRET")
            assert len(made.rows) == 1
        with pytest.raises(error, match=told) as raised:
            built(tmp_path / "bad", images=str(tmp_path), annotations=f"{web}/bad.json?sig=SECRET")
        assert f"{web}/bad.json" in str(raised.value)
        assert "SECRET" not in str(raised.value)
        server.shutdown()
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:\d+/good\.json cannot be used: .*Connect"):
        built(tmp_path / "away", images=str(tmp_path), annotations=f"{web}/good.json")


def test_secrets_of_a_list_are_not_told(tmp_path: Path) -> None:
    lines = ["s3://KEY:SECRET@bucket/a.jpg", "s3://KEY:SEC/RET@bucket/a.jpg", "s3://KEY:SECRET@bucket/a.jpg"]
    write_image(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("\n".join([*lines, "b.png"]))
    built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [each["uri"] for each in rejects] == ["s3://bucket/a.jpg"] * 3
    assert all("not a URI that can be read: a URI must not hold credentials" in each["reason"] for each in rejects)
    signed = "https://host.example:8080/x/a@b.jpg?X-Amz-Signature=SECRET"
    listed = ListedImages(str(tmp_path / "list.txt"))
    assert listed.uri_of(signed) == shown_uri(listed, signed) == "https://host.example:8080/x/a@b.jpg"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", FileNotFoundError, "lists no images"),
        (b"a\xff.png", ValueError, r"not UTF-8 .at byte 1.: give a text"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, data: bytes, error: type[Exception], message: str) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(error, match=message):
        built(tmp_path / "out", images=str(tmp_path / "list.txt"), format="images")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--annotations is missing: format coco needs its JSON"),
        ({"annotations": ""}, "--annotations is missing: format coco needs its JSON"),
        ({"format": "pdf"}, "format is 'pdf', but must be one of coco, cityscapes, voc, labelme, images"),
        ({"format": "voc", "annotations": "a.json"}, "--annotations is for coco, not for voc: leave it out"),
        ({"format": "images", "split": "val"}, "--split is for cityscapes and voc, not for images"),
        ({"format": "voc", "classes": ("a",)}, "--classes is for labelme, not for voc"),
        ({"format": "labelme", "classes": ("a", "b", "a")}, "each must come once"),
        ({"format": "voc", "split": "../x"}, "split is '../x', but must be one name"),
    ],
)
def test_settings_belong_to_their_format(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildConfig(images="a", out="b", **settings)


def test_every_format_has_a_source() -> None:
    assert set(SOURCES) == set(get_args(Format))


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_finished_build_is_not_that_of_images_that_were_replaced(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path / "data") if where == "disk" else f"{request.getfixturevalue('s3')}/replaced"
    for value in (10, 20):
        open_store(root).write_bytes("a.png", write_image(tmp_path / "a.png", value=value).read_bytes())
        if value == 10:
            built(tmp_path / "out", images=root, format="images")
            built(tmp_path / "out", images=root, format="images")
    with pytest.raises(ValueError, match=r"holds another build .file_versions_sha256"):
        built(tmp_path / "out", images=root, format="images")
    assert int(built(tmp_path / "new", images=root, format="images").rows[0].image[0, 0, 0]) == 20


def test_an_unfinished_build_takes_up_images_that_were_replaced(tmp_path: Path) -> None:
    for name in "abc":
        write_image(tmp_path / f"data/{name}.png", value=10)
    (tmp_path / "data/d.png").write_bytes(b"spoilt")
    settings = {"images": str(tmp_path / "data"), "format": "images", "rows_per_shard": 1}
    with pytest.raises(ValueError, match="mend them or allow more, and run the same command again"):
        built(tmp_path / "out", **settings, max_reject_share=0.1)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.arrow")}
    for name in "bd":
        write_image(tmp_path / f"data/{name}.png", value=20)
    made = built(tmp_path / "out", **settings, max_reject_share=0.1)
    assert [int(row.image[0, 0, 0]) for row in made.rows] == [10, 20, 10, 20]
    again = [name for name in sorted(times) if (tmp_path / "out" / name).stat().st_mtime_ns != times[name]]
    assert again == ["shard-00001.arrow", "shard-00003.arrow"]
