"""COCO files of any size and state: read as a stream, refused in words, never more than memory holds."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import built, write_image

from pipelines.config import BuildConfig
from pipelines.records import Reject, RejectedAnnotation
from pipelines.sources import json_stream, memory
from pipelines.sources.coco import coco_objects, read_coco
from pipelines.sources.json_stream import JsonObject, file_blocks
from pipelines.storage import open_store

SMALL = {
    "info": {"year": 2017, "what": 'a "quoted" ] } \\ thing'},
    "images": [{"id": i, "file_name": f"bild-ä-{i}.png", "height": 24, "width": 32} for i in range(1, 4)],
    "annotations": [
        {"id": i, "image_id": 1 + i % 3, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 6, 1, 6, 6]]}
        for i in range(10)
    ],
    "categories": [{"id": 1, "name": "größe\u2028"}],
}


def elements(data: bytes, sizes: Iterator[int] | None = None) -> list[tuple[str, object, str]]:
    """All elements of a file that arrives in blocks of the given sizes."""

    def blocks() -> Iterator[bytes]:
        place = 0
        while place < len(data):
            size = max(1, next(sizes)) if sizes else len(data)
            yield data[place : place + size]
            place += size

    return [(each.key, each.value, each.text) for each in JsonObject(blocks(), "file").elements()]


def config(tmp_path: Path, data: bytes) -> BuildConfig:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "coco.json").write_bytes(data)
    return BuildConfig(images=str(tmp_path / "images"), annotations=str(tmp_path / "coco.json"), out="unused")


def test_reasons_are_stored_whatever_they_quote(tmp_path: Path) -> None:
    """JSON's escapes may be no Unicode."""
    write_image(tmp_path / "images/bild.png")
    broken = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": {"size": "\ud800"}}
    content = {**SMALL, "images": [{"id": 1, "file_name": "bild.png"}], "annotations": [broken]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    made = built(tmp_path / "out", images=str(tmp_path / "images"), annotations=str(tmp_path / "coco.json"))
    told = "run lengths are for another size: '\\ud800', the image has [24, 32]"
    assert made.lost == [(1, f"validate: {told}")]
    for reject in (Reject("a", 1, "read", "\ud800"), RejectedAnnotation("a", 1, 1, "validate", "\ud800")):
        assert reject.reason == "\\ud800"
    for reject in (Reject("a", 1, "read", "\ud800" * 10**5), RejectedAnnotation("a", 1, 1, "validate", "a" * 10**6)):
        assert len(reject.reason) == 1003, "or a mistake would fill the list, and the terminal"
        assert replace(reject) == reject, "also read again, from a receipt"


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1), indent=st.sampled_from([None, 1]), escape=st.booleans())
def test_blocks_of_any_size_give_what_json_gives(sizes: list[int], indent: int | None, escape: bool) -> None:
    text = json.dumps(SMALL, indent=indent, ensure_ascii=escape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "BLOCK", 16)  # one block does not hold an element
        found = elements(text.encode(), iter(sizes * 10_000))
    assert [key for key, _, _ in found] == ["images"] * 3 + ["annotations"] * 10 + ["categories"]
    assert [value for _, value, _ in found] == [*SMALL["images"], *SMALL["annotations"], *SMALL["categories"]]
    assert all(json.loads(text) == value for _, value, text in found)


def test_numbers_and_words_may_be_split_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", 1)  # or the first look would take both blocks
    data = b'{"n": [123456, -7.25e3, true, NaN, "x"]}'
    for cut in range(1, len(data)):
        found = elements(data, iter([cut, len(data)]))
        assert [text for _, _, text in found] == ["123456", "-7.25e3", "true", "NaN", '"x"'], cut


def test_the_byte_is_right_where_a_block_ends_within_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", 1)
    data = '{"ä": [tru], "b": "'.encode() + b" " * 100 + "ä".encode() + b'"}'
    with pytest.raises(ValueError, match="Expecting value, at byte 8"):
        elements(data, iter([data.rindex(b"\xc3") + 1, len(data)]))


@pytest.mark.parametrize("cut", [0.01, 0.1, 0.35, 0.5, 0.65, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_truncated_file_is_refused_with_its_end(tmp_path: Path, cut: float, indent: int | None) -> None:
    data = json.dumps(SMALL, indent=indent).encode()
    data = data[: int(cut * len(data))]
    with pytest.raises(ValueError, match=r"coco\.json is not valid JSON .* at byte \d+\): is it cut off") as error:
        read_coco(config(tmp_path, data))
    byte = int(str(error.value).split("at byte ")[1].split(")")[0])
    assert 0 <= byte <= len(data)
    assert byte > len(data) - 200, "where the last element begins, or later"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe{}", "it is not UTF-8, at byte 0"),
        (b'{"images": [{"id": "\xe4"}]}', "it is not UTF-8, at byte 20"),
        (b'{"images": [1, 2,, 3]}', "Expecting value, at byte 17"),
        (b'{"images": [1 2]}', "',' is missing, at byte 14"),
        (b'{"images": {} "more": 1}', "',' is missing, at byte 14"),
        (b'{"images" []}', "':' is missing, at byte 10"),
        (b"{1: 2}", "a key is not a string"),
        (b'{"images": [], "images": []}', "the key 'images' comes twice"),
        (b'{"images": []} trailing', "there is more after the end, at byte 15"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested too deeply, at byte 7"),
        (b'{"images": [' + b"9" * 5000 + b"]}", "4300 digits"),
        ('{"ä": [tru]}'.encode(), "Expecting value, at byte 8"),
    ],
)
def test_what_is_not_json_is_refused_with_the_byte(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"coco\.json is not valid JSON") as error:
        read_coco(config(tmp_path, data))
    assert message in str(error.value)


def test_what_the_driver_can_parse_tasks_can(tmp_path: Path) -> None:
    """However deep: a task's calls lie deeper within each other than the driver's."""
    before, usual = sys.getrecursionlimit(), 1000  # Hypothesis has raised it perhaps
    image = write_image(tmp_path / "images/bild.png").name
    told: set[str] = set()
    for depth in range(usual - 300, usual, 3):
        deep = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": "DEEP"}
        content = {**SMALL, "images": [{"id": 1, "file_name": image}], "annotations": [deep]}
        text = json.dumps(content).replace('"DEEP"', "[" * depth + "]" * depth)
        given_config = config(tmp_path, text.encode())
        out = tmp_path / f"out-{depth}"
        sys.setrecursionlimit(usual)
        try:
            made = built(out, images=given_config.images, annotations=given_config.annotations)
            told.add(made.lost[0][1][:40])
        except ValueError as error:
            told.add(str(error).split("(")[1][:24])
        finally:
            sys.setrecursionlimit(before)
    assert "validate: iscrowd is neither 0 nor 1: [[" in told
    assert told <= {"validate: iscrowd is neither 0 nor 1: [[", "it is nested too deeply,"}


def test_byte_order_mark_and_any_order_of_keys(tmp_path: Path) -> None:
    turned = dict(reversed(SMALL.items()))
    source = read_coco(config(tmp_path, b"\xef\xbb\xbf" + json.dumps(turned).encode()))
    assert len(source.records) == 3
    assert sum(len(coco_objects(each, (), source.categories).usable) for each in source.records) == 10


def test_a_list_is_not_coco_however_large_it_is(tmp_path: Path) -> None:
    """Such as COCO's results: parsed whole it would take many times its size."""
    fed: list[int] = []

    def endless() -> Iterator[bytes]:
        yield b" [1"
        while True:
            fed.append(1)
            assert len(fed) < 3, "it is read on"
            yield b", 1" * json_stream.BLOCK

    parser = JsonObject(endless(), "file")
    assert list(parser.elements()) == []
    with pytest.raises(ValueError, match=r"coco\.json is not COCO: a list where an object with 'images' should be"):
        read_coco(config(tmp_path, b"[1, 2, 3"))


@pytest.mark.parametrize("begin", [b'{"coco": {"images": [1', b'{"images": {"1": [1', b'{"images": [[1', b'"a'])
def test_one_value_is_not_read_however_large_it_is(begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where COCO's object lies in another, or its images are an object by id: it would take many times its size."""
    monkeypatch.setattr(json_stream, "BLOCK", 100)
    monkeypatch.setattr(json_stream, "MOST", 5000)
    fed: list[int] = []

    def endless() -> Iterator[bytes]:
        yield begin
        while True:
            fed.append(1)
            assert len(fed) < 200, "it is read on"
            yield b", 1" * 30

    with pytest.raises(ValueError, match="a value is longer than 5000 characters, at byte"):
        list(JsonObject(endless(), "file").elements())


def test_not_a_number_spoils_its_annotation_alone(tmp_path: Path) -> None:
    """Python writes NaN into JSON, and most other parsers refuse the file for it."""
    content = json.loads(json.dumps(SMALL))
    content["annotations"][4]["bbox"][0] = float("nan")
    for image in content["images"]:
        write_image(tmp_path / "images" / image["file_name"])
    given_config = config(tmp_path, json.dumps(content).encode())
    made = built(tmp_path / "out", images=given_config.images, annotations=given_config.annotations)
    assert (made.totals.rows, made.totals.instances) == (3, 9)
    assert made.lost == [(4, "validate: box is not a list of finite numbers")]


def test_a_file_larger_than_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "coco.json").open("wb") as file:
        file.truncate(2 << 30)  # takes no space on disk
    monkeypatch.setattr(json_stream, "available_memory", lambda: 3 << 30)
    store = open_store(str(tmp_path))
    monkeypatch.setattr(type(store), "read_range", lambda *_: pytest.fail("it was read"))
    message = r"coco\.json has 2147 MB, for which 4295 MB of memory are needed, but 3221 MB are free: take a machine"
    with pytest.raises(ValueError, match=message):
        list(file_blocks(store, "coco.json"))


def test_memory_is_that_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.available_memory() > 1 << 20
    monkeypatch.setattr(memory, "PROC", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_memory() > 1 << 20, "no such files, as on other systems"
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    assert memory.available_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500\n")
    assert memory.available_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("2500\n")
    assert memory.available_memory() == 2000
    (tmp_path / "memory.stat").write_text("active_file 7\ninactive_file 300\n")
    assert memory.available_memory() == 2300, "the kernel takes back what it caches of files"


def test_memory_is_that_of_an_older_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    for name, text in (
        ("limit_in_bytes", "2500"), ("usage_in_bytes", "500"), ("stat", "inactive_file 1\ntotal_inactive_file 30\n")
    ):  # fmt: skip
        (tmp_path / f"memory/memory.{name}").write_text(text)
    assert memory.available_memory() == 2030


def test_the_driver_holds_little_more_than_the_text(tmp_path: Path) -> None:
    """Parsed into Python's objects, the annotations would take about ten times the file."""
    polygon = np.random.default_rng(0).uniform(0, 600, 80).round(2).tolist()
    annotation = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": [polygon]}
    content = {**SMALL, "annotations": [{**annotation, "id": i} for i in range(30_000)]}
    given_config = config(tmp_path, json.dumps(content).encode())
    size = (tmp_path / "coco.json").stat().st_size
    tracemalloc.start()
    try:
        source = read_coco(given_config)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert source.annotations == 30_000
    assert held < 1.3 * size
    assert peak < 3 * size + 4 * json_stream.BLOCK
