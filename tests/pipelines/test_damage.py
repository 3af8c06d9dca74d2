"""Any bit that is damaged, of any file of a data set: it is told, in words that name the file, or it is made again. No
command ends without them, or takes all memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline import build_here, run_inline

from pipelines import verify as verify_module
from pipelines.build import prepare
from pipelines.config import BuildConfig
from pipelines.inspect import summarize
from pipelines.manifest import PROGRESS, Manifest
from pipelines.records import REJECTS
from pipelines.storage import Store
from pipelines.toy import make_toy_data
from pipelines.verify import verify

INSPECT = """import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
sys.path[:0] = sys.argv[1].split(':')
from test_damage import inspect_each
inspect_each(sys.argv[2], int(sys.argv[3]))"""


class Crash(BaseException):
    """The process is gone."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    """Twelve images, of which one is no image, in three shards."""
    folder = tmp_path_factory.mktemp("damage")
    made = make_toy_data(str(folder / "source"), images=12, seed=5, size=48)
    (folder / "source/images/000000000004.jpg").write_bytes(b"no image")
    config = BuildConfig(
        images=made.images_uri, annotations=made.annotations_uri, out=str(folder / "shards"),
        shorter_side=32, longer_side=64, rows_per_shard=5,
    )  # fmt: skip
    build_here(config)
    return config


@pytest.fixture
def config(built: BuildConfig, tmp_path: Path) -> BuildConfig:
    """With a copy to be spoilt."""
    return replace(built, out=str(shutil.copytree(built.out, tmp_path / "shards")))


def damaged(file: Path, *, step: int = 1, start: int = 0) -> Iterator[int]:
    """The file with one bit other than it was, at one place after the other; in the end as it was."""
    data = file.read_bytes()
    for place in range(start, len(data), step):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        yield place
    file.write_bytes(data)


def told_by(look: Callable[[str], object], uri: str) -> str:
    """What a command says is wrong: nothing, where all it looked at seems to be well."""
    try:
        look(uri)
    except ValueError as error:
        return str(error)
    return "nothing"


def verify_all(uri: str) -> None:
    verify(uri).check()


def checksums(out: str) -> dict[str, str]:
    store = Store(out)
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name, _ in store.entries(hidden=True)}


def test_every_damaged_byte_of_a_manifest(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "run_tasks", run_inline)
    assert verify(config.out).problems == ()
    for place in damaged(Path(config.out, "manifest.json")):
        told = told_by(verify_all, config.out)
        assert told.startswith(config.out), place


@pytest.mark.parametrize("name", ["rejects.parquet", "rejected_annotations.parquet"])
def test_every_damaged_byte_of_a_list_of_rejects(config: BuildConfig, name: str) -> None:
    for place in damaged(Path(config.out, name), step=5):
        with pytest.raises(ValueError, match=rf"{name} is damaged .*: remove it and build the data again"):
            build_here(config)
        told = told_by(summarize, config.out)
        assert told == "nothing" or f"{name} is damaged" in told, place


@pytest.mark.parametrize("column", ["uri", "stage", "reason"])
def test_a_list_of_rejects_with_nulls_or_bytes(config: BuildConfig, column: str) -> None:
    file = Path(config.out, "rejects.parquet")
    row = {"uri": "a", "image_id": 1, "stage": "read", "reason": "no such file"}
    as_bytes = REJECTS.set(REJECTS.get_field_index(column), pa.field(column, pa.binary()))
    for values, schema in ((row | {column: None}, REJECTS), (row, as_bytes), ({}, pa.schema([("other", pa.int8())]))):
        pq.write_table(pa.Table.from_pylist([values], schema=schema), file)
        with pytest.raises(ValueError, match=r"rejects\.parquet is damaged"):
            summarize(config.out)


def unfinished(config: BuildConfig, out: Path) -> BuildConfig:
    """A build that was killed after its last receipt."""
    config = replace(config, out=str(out))
    crash(config, "pipelines.build._conclude")
    return config


def crash(config: BuildConfig, where: str) -> None:
    """Build until that function is called."""

    def end(*args: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, end)
        with pytest.raises(Crash):
            build_here(config)


def test_every_damaged_byte_of_a_receipt(built: BuildConfig, tmp_path: Path) -> None:
    config = unfinished(built, tmp_path / "out")
    receipt = Path(config.out, PROGRESS, "shard-00000.arrow.json")
    good = receipt.read_bytes()
    for place in damaged(receipt, step=11):
        assert list(prepare(config).missing) == ["shard-00000.arrow"], place
    receipt.write_bytes(good)
    assert not prepare(config).missing
    for place in damaged(receipt, start=len(good) // 2, step=len(good)):
        assert build_here(config).shards_made == 1, place
        break
    assert checksums(config.out) == checksums(built.out)


def test_a_receipt_of_a_shard_that_is_made_anew_is_gone_before(built: BuildConfig, tmp_path: Path) -> None:
    """For the files may become again what they were, and then it would seem to be of the new shard."""
    images = Path(shutil.copytree(built.images, tmp_path / "images"))
    image = images / "000000000002.jpg"
    before, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    listed = replace(built, format="images", annotations=None, images=str(images))
    config = unfinished(listed, tmp_path / "out")
    shutil.copy(images / "000000000001.jpg", image)
    crash(config, "pipelines.shard_task.sealed")  # the shard is there, its receipt not yet
    image.write_bytes(before)
    os.utime(image, ns=times)
    assert build_here(config).shards_made == 1
    undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
    build_here(undisturbed)
    assert checksums(config.out) == checksums(undisturbed.out)


def inspect_each(out: str, first: int) -> None:
    """Runs in a process of its own, which a damaged shard may kill; prints the places that were told as they should."""
    from pipelines.contact_sheet import write_contact_sheet

    for place in damaged(Path(out, "shard-00000.arrow"), start=first, step=101):
        looks = (summarize, lambda uri: write_contact_sheet(uri, f"{uri}/picture", 1))
        for look in looks[: 1 + (place % 4 == 0)]:  # to draw takes long
            assert told_by(look, out).startswith((out, "nothing")), place
        print(place, flush=True)


def test_every_damaged_byte_of_a_shard_that_is_inspected(config: BuildConfig) -> None:
    """One of 101 of them: flags, types, lengths, text, coordinates."""
    size = Manifest.read(Store(config.out)).shards[0].bytes
    here = Path(__file__).parent
    paths = ":".join([str(here), str(here.parent), str(here.parent.parent)])
    done = subprocess.run(
        [sys.executable, "-c", INSPECT, paths, config.out, "0"], capture_output=True, text=True, check=False
    )
    places = done.stdout.split()
    assert done.returncode == 0, f"after {places[-1:]}: {done.stderr[-2000:]}"
    assert places[-1] == str((size - 1) // 101 * 101)
