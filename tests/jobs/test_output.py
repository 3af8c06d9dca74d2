"""What others' files are named never reaches a terminal as a command to it."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_shards import instance, make_shards, row

from jobs.cli import main
from mrcnn.structures import Category
from pipelines.accounts import REJECTED_ANNOTATIONS_FILE, REJECTS_FILE
from pipelines.manifest import Manifest
from pipelines.records import REJECTED_ANNOTATIONS, REJECTS, to_parquet
from pipelines.storage import open_store
from pipelines.text import shown, shown_name

RED, TITLE = "\x1b[31m", "\x9b2;0;0t"


def test_a_class_is_named_without_its_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = make_shards(tmp_path / "data", [row(1, (60, 80), [instance((10, 10, 40, 40))])])
    store = open_store(uri)
    for name, schema in ((REJECTS_FILE, REJECTS), (REJECTED_ANNOTATIONS_FILE, REJECTED_ANNOTATIONS)):
        store.write_bytes(name, to_parquet([], schema))
    manifest = Manifest.read(store)
    replace(manifest, categories=(Category(1, f"cat{RED}"), *manifest.categories[1:])).write(store)
    assert main(["inspect-data", uri, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert r"cat\x1b[31m" in out
    assert "\x1b" not in out
    assert out.count("\n") > 10  # which are no control characters


def test_an_error_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-data", f"{tmp_path}/{RED}{TITLE}", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert r"\x1b[31m\x9b2;0;0t" in err
    assert "\x1b" not in err
    assert "\x9b" not in err


def test_other_text_is_shown_as_it_is() -> None:
    text = "Grüße, 猫 \N{FAMILY}\N{ZERO WIDTH JOINER}\N{BOY}\ttab\nline\\x1b"
    assert shown(text) == text
    assert shown_name("a\nb\tc") == r"a\nb\tc"
    assert shown("a\rb\u202ec\ud800") == r"a\rb\u202ec\ud800"
