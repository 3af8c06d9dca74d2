"""Folders that hold what nobody expects: pipes, folders with the names of files, other programs' files."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from inline import build_here, run_inline

from pipelines import storage
from pipelines import verify as verify_module
from pipelines.build import prepare
from pipelines.config import BuildConfig
from pipelines.inspect import summarize
from pipelines.listing import Walk
from pipelines.storage import open_store
from pipelines.toy import make_toy_data
from pipelines.verify import verify

SHARD = "shard-00001.arrow"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildConfig:
    """Of a finished build of two shards."""
    monkeypatch.setattr(verify_module, "run_tasks", run_inline)
    made = make_toy_data(str(tmp_path / "source"), images=4, seed=5, size=48)
    config = BuildConfig(
        images=made.images_uri, annotations=made.annotations_uri, out=str(tmp_path / "shards"),
        shorter_side=32, longer_side=64, rows_per_shard=2,
    )  # fmt: skip
    build_here(config)
    return config


def test_a_pipe_in_a_shards_place_is_not_waited_for(config: BuildConfig) -> None:
    Path(config.out, SHARD).unlink()
    os.mkfifo(Path(config.out, SHARD))
    assert verify(config.out).problems == (f"{SHARD}: it is missing, or not a regular file",)
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged \(it has 0 bytes"):
        summarize(config.out)


def test_a_shard_that_the_disk_cannot_read_is_told_with_the_others(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checksum(path: Path) -> str:
        if path.name == SHARD:
            raise OSError(5, "Input/output error")
        return "of others"

    monkeypatch.setattr(verify_module, "checksum", checksum)
    assert verify(config.out).problems == (
        "shard-00000.arrow: its checksum is not the stated one",
        f"{SHARD}: it cannot be read: [Errno 5] Input/output error",
    )


@pytest.mark.parametrize("name", [SHARD, "rejects.parquet"])
def test_a_folder_in_a_files_place_is_told(config: BuildConfig, name: str) -> None:
    Path(config.out, name).unlink()
    Path(config.out, name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} cannot be written, a folder has its name: remove it, then"):
        build_here(config)


def test_a_folder_in_the_manifests_place_of_a_new_build(config: BuildConfig, tmp_path: Path) -> None:
    out = tmp_path / "other"
    (out / "manifest.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"manifest\.json is a folder: remove it, or choose another --out"):
        build_here(replace(config, out=str(out)))
    assert [path.name for path in out.iterdir()] == ["manifest.json"]


def test_a_folder_that_another_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same build, run twice at once, may end and tidy up just then: before a file is made there, or has its name"""
    store = open_store(str(tmp_path))
    for place in ("held_part", "rename"):
        times = iter(range(3))
        was = getattr(storage, place)

        def removing(*args: Any, was: Any = was, times: Any = times, **kwargs: Any) -> Any:
            if next(times, None) is not None:
                store.remove_folder("_progress")
            return was(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(storage, place, removing)
            store.write_bytes("_progress/a.json", b"a")
            assert store.create_bytes("_progress/b.json", b"b")
        assert store.read_bytes("_progress/a.json") == b"a"
        assert store.read_bytes("_progress/b.json") == b"b"
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["_progress", "a.json", "b.json"]
        store.remove_folder("_progress")


def test_a_folder_that_goes_while_it_is_listed_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    store.write_bytes("_progress/a.json", b"a")
    is_folder = LocalFileSystem.isdir

    def removing(self: LocalFileSystem, path: str) -> bool:
        found = is_folder(self, path)
        if path.endswith("_progress"):
            store.remove_folder("_progress")
        return found

    monkeypatch.setattr(LocalFileSystem, "isdir", removing)
    assert list(store.join("_progress").files()) == []


def test_others_unfinished_files_stay(config: BuildConfig) -> None:
    ours, theirs = Path(config.out, f".{SHARD}.{'0' * 32}.part"), Path(config.out, ".download.jpg.part")
    for path in (ours, theirs):
        path.write_bytes(b"half")
    build_here(config)
    assert (ours.exists(), theirs.exists()) == (False, True)


def test_another_programs_progress_is_not_removed(config: BuildConfig, tmp_path: Path) -> None:
    """As that of a prediction, which would begin anew."""
    plan = tmp_path / "other/_progress/plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text("{}")
    with pytest.raises(ValueError, match=r"holds another program's _progress/plan\.json: choose another --out"):
        build_here(replace(config, out=str(tmp_path / "other")))
    assert [path.name for path in tmp_path.glob("other/**/*") if path.is_file()] == ["plan.json"]


def test_only_the_folder_itself_is_looked_at(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder below may be another's, such as a disk's lost+found, or hold millions of files."""
    shutil.rmtree(config.out)
    Path(config.out, "lost+found").mkdir(parents=True)
    listed = Walk._list_folder

    def refusing(self: Walk, folder: str, seen: set[str]) -> object:
        if "lost+found" in folder:
            raise PermissionError(folder)
        return listed(self, folder, seen)

    monkeypatch.setattr(Walk, "_list_folder", refusing)
    assert build_here(config).shards_made == 2
    assert not prepare(config).missing


@pytest.mark.parametrize("uri", ["", " ", "file://", "s3:/bucket/folder", "s3:bucket", "file:/tmp", "~nobody-here/x"])
def test_what_is_nearly_a_uri_makes_no_folder(uri: str) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        open_store(uri)
