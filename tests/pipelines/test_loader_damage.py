"""What a reader says of shards that are damaged, were changed, or are gone: the file and the remedy, at once."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_proxy import Fault, faulty_proxy
from made_shards import instance, make_shards, row
from pycocotools import mask as coco_mask

from mrcnn.structures import Category
from pipelines import loader, patience, shards
from pipelines.augment import Augmentation
from pipelines.collate import collate
from pipelines.dataset import Row, ShardDataset
from pipelines.patience import patiently
from pipelines.storage import open_store
from pipelines.storage_errors import UnreachableError

SHARD = "shard-00001.arrow"


def diagonal(size: int) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(np.eye(size, dtype=np.uint8)))
    rle = {"size": [size, size], "counts": encoded["counts"].decode()}
    return {**instance([0, 0, size, size]), "segmentation": {"polygons": None, "rle": rle}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of two images."""
    rows = [row(i, (12, 12), [instance([1, 2, 9, 10]), diagonal(12)]) for i in range(8)]
    return Path(make_shards(tmp_path / "made", rows, rows_per_shard=2))


def take(dataset: ShardDataset, steps: int = 20, flip: float = 0.0) -> list[loader.Batch]:
    stream = loader.batches(dataset, seed=0, global_batch=2, augmentation=Augmentation(flip))
    try:
        return list(islice(stream, steps))
    finally:
        stream.close()  # type: ignore[attr-defined]


def no_threads_are_left() -> bool:
    return not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_a_missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{SHARD} is gone, .* build the data again"):
        take(ShardDataset(str(folder)))
    assert no_threads_are_left()


def test_a_shard_that_goes_while_it_is_read(folder: Path) -> None:
    dataset = ShardDataset(str(folder))
    take(dataset)
    (folder / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD} is gone"):
        take(dataset)


@pytest.mark.parametrize("left", [0, 10, 1000, -1])
def test_a_truncated_shard(folder: Path, left: int) -> None:
    file = folder / SHARD
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(
        ValueError, match=rf"{SHARD} is damaged \(it has \d+ bytes, its manifest says \d+\): remove this file"
    ):
        take(ShardDataset(str(folder)))


@pytest.mark.parametrize("left", [0, 1000])
def test_a_shard_that_is_cut_short_while_it_is_mapped(folder: Path, left: int) -> None:
    """To touch the lost pages would kill the process by a bus error."""
    dataset = ShardDataset(str(folder))
    take(dataset)
    with (folder / SHARD).open("r+b") as file:
        file.truncate(left)
    with pytest.raises(ValueError, match=rf"{SHARD} was changed while it was being read"):
        take(dataset)


def test_a_shard_that_is_replaced_while_it_is_read(folder: Path) -> None:
    dataset = ShardDataset(str(folder))
    take(dataset)
    shutil.copy(folder / "shard-00002.arrow", folder / "new")
    (folder / "new").rename(folder / SHARD)
    with pytest.raises(ValueError, match="was changed while it was being read"):
        take(dataset)


def test_a_shard_with_fewer_rows_than_the_manifest_says(folder: Path) -> None:
    manifest = folder / "manifest.json"
    other = Path(make_shards(folder / "other", [row(i, (12, 12)) for i in range(3)], rows_per_shard=3))
    shutil.copy(other / "shard-00000.arrow", folder / SHARD)
    size = (folder / SHARD).stat().st_size
    dataset = ShardDataset(str(folder))
    shards = list(dataset.manifest.shards)
    shards[1] = type(shards[1])(SHARD, 2, size, "", "00")
    object.__setattr__(dataset.manifest, "shards", tuple(shards))
    assert manifest.exists()
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged \(its footer does not tell where 2 rows are\)"):
        take(dataset)


def test_bytes_changed_at_random_never_do_more_than_raise(folder: Path) -> None:
    """Some rows still read as something, which only checksums can tell: `mrcnn verify-data` does. No other error than
    ValueError, no crash and no flood of memory."""
    chance = random.Random(0)
    file = folder / SHARD
    good = file.read_bytes()
    raised = 0
    for _ in range(400):
        spoilt = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            spoilt[chance.randrange(len(spoilt))] = chance.choice([0, 128, 255, chance.randrange(256)])
        file.write_bytes(spoilt)
        dataset = ShardDataset(str(folder))
        for number in (2, 3):
            try:
                collate([dataset.read(number)], seeds=[0], flips=[True], categories=dataset.categories)
            except ValueError:
                raised += 1
    assert raised > 50


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"segmentation": diagonal(11)["segmentation"]}, "a mask has 121 pixels, its image 12 x 12"),
        ({"box": [1.0, 2.0, float("nan"), 5.0]}, "targets.boxes"),
        ({"label": 7}, r"targets.labels is \[7, 7\], but must be 0 to 1"),
        ({"segmentation": {"polygons": [[0, 0, 1e30, 0, 5, 5]], "rle": None}}, "a coordinate of a polygon"),
        ({"segmentation": {"polygons": [[]], "rle": None}}, "a polygon has fewer than three points"),
        ({"segmentation": {"polygons": [[2, 2, 5, 5]], "rle": None}}, "a polygon has fewer than three points"),
    ],
)
def test_a_row_that_no_build_writes(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    uri = make_shards(tmp_path / "made", [row(4, (12, 12), [{**instance([1, 2, 9, 10]), **change}])])
    with pytest.raises(ValueError, match=f"{uri}, among made/4.png.*: {what}.*mrcnn verify-data"):
        take(ShardDataset(uri))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"label": 7}, r"targets.labels is \[7, 7\], but must be 0 to 1"),
        ({"keypoints": [1.0, 2.0, 2.0]}, "an object has 1 keypoints, its category names 2"),
    ],
)
def test_a_row_with_keypoints_that_no_build_writes(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    uri = make_shards(tmp_path / "made", [row(4, (12, 12), [{**instance([1, 2, 9, 10]), **change}])])
    dataset = ShardDataset(uri)
    pointed = (Category(1, "thing", ("left_end", "right_end")),)
    object.__setattr__(dataset.manifest, "categories", pointed)
    with pytest.raises(ValueError, match=f"{uri}, among made/4.png.*: {what}.*mrcnn verify-data"):
        take(dataset, flip=1.0)


def test_pixels_that_do_not_fill_the_image(tmp_path: Path) -> None:
    uri = make_shards(tmp_path / "made", [{**row(4, (12, 12)), "height": 13}])
    with pytest.raises(ValueError, match=r"shard-00000.arrow is damaged \(row 0: "):
        take(ShardDataset(uri))


def test_a_disk_that_stumbles_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network's file system does, whose server starts again."""
    undisturbed, stat = take(ShardDataset(str(folder)), 8), Path.stat
    away = [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]

    def stumbling(path: Path, **how: Any) -> os.stat_result:
        if path.name == SHARD and away:
            raise OSError(away.pop(), "away", str(path))
        return stat(path, **how)

    monkeypatch.setattr(patience, "BETWEEN_TRIES", 0.01)
    monkeypatch.setattr(Path, "stat", stumbling)
    for ours, theirs in zip(take(ShardDataset(str(folder)), 8), undisturbed, strict=True):
        assert torch.equal(ours.images.pixels, theirs.images.pixels)
    assert not away


@pytest.mark.parametrize(("number", "told"), [(errno.EACCES, "check its owner and mode"), (errno.EMFILE, "be used")])
def test_a_shard_that_cannot_be_opened(folder: Path, number: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards.pa, "memory_map", refused)
    with pytest.raises((PermissionError, ValueError), match=rf"{folder}/shard-0000\d.arrow.*{told}"):
        take(ShardDataset(str(folder)))


class Remote:
    """A folder as a store elsewhere, where everybody asks for sizes at the same time, or nobody is answered."""

    is_local = False

    def __init__(self, folder: Path, readers: int) -> None:
        self.folder, self.together = folder, threading.Barrier(readers, timeout=10)

    def size_and_etag(self, name: str) -> tuple[int, str]:
        self.together.wait()
        return (self.folder / name).stat().st_size, "etag"

    def read_range(self, name: str, start: int, length: int, etag: str) -> bytes:
        return (self.folder / name).read_bytes()[start : start + length]


def test_shards_are_opened_side_by_side(folder: Path) -> None:
    """Of many that are far away, each takes some round trips at first."""
    infos = ShardDataset(str(folder)).manifest.shards
    store = Remote(folder, len(infos))
    readers = [shards.ShardReader(store, info) for info in infos]  # type: ignore[arg-type]
    with ThreadPoolExecutor(len(readers)) as pool:
        assert list(pool.map(len, readers)) == [2, 2, 2, 2]


def test_a_store_that_goes_while_a_long_footer_is_read_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a user would be told to remove."""

    class Going(Remote):
        def read_range(self, name: str, start: int, length: int, etag: str) -> bytes:
            if length != shards.TAIL:
                raise UnreachableError("the store has gone")
            return super().read_range(name, start, length, etag)

    monkeypatch.setattr(shards, "TAIL", 64)
    info = ShardDataset(str(folder)).manifest.shards[0]
    with pytest.raises(UnreachableError, match="the store has gone"):
        len(shards.ShardReader(Going(folder, 1), info))  # type: ignore[arg-type]


def faults_that_pass(method: str, path: str, before: int) -> Fault | None:
    """The first two requests for each shard fail, each shard in its own way."""
    faults: tuple[Fault, ...] = ("503", "500", "drop", "cut")
    number = path.rpartition("shard-0000")[2][:1]
    return faults[int(number) % 4] if method == "GET" and number.isdigit() and before < 2 else None


def test_s3_that_stumbles_changes_no_batch(folder: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = on_s3(folder, f"{s3}/stumbling")
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], faults_that_pass) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        stumbling = take(ShardDataset(uri), 8)
        assert {name: proxy.made[name] for name in ("503", "500", "drop", "cut")} == dict.fromkeys(
            ("503", "500", "drop", "cut"), 2
        )
    for ours, theirs in zip(stumbling, take(ShardDataset(str(folder)), 8), strict=True):
        assert ours.image_ids == theirs.image_ids
        assert torch.equal(ours.images.pixels, theirs.images.pixels)


def test_s3_that_stays_down_ends_training_with_its_name(folder: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(on_s3(folder, f"{s3}/down"))

    def down(method: str, path: str, before: int) -> Fault | None:
        return "503" if path.endswith(SHARD) else None

    monkeypatch.setattr("pipelines.loader.patiently", partial(patiently, seconds=1))  # not ten minutes
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], down) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        start = time.monotonic()
        with pytest.raises((ValueError, OSError), match=SHARD):
            take(ShardDataset(store.uri))
        assert time.monotonic() - start < 60
    assert no_threads_are_left()


def test_closing_does_not_wait_for_a_storage_that_is_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that ends, or is told to, has no use for the batches that are read ahead: no ten minutes for them."""
    reads, away, read = count(), threading.Event(), ShardDataset.read

    def read_two(self: ShardDataset, index: int) -> Row:
        if next(reads) < 2:
            return read(self, index)
        away.set()
        raise UnreachableError("s3://bucket/shard cannot be reached")

    monkeypatch.setattr(ShardDataset, "read", read_two)
    stream = loader.batches(ShardDataset(str(folder)), seed=0, global_batch=2, threads=1)
    next(stream)
    assert away.wait(10)
    start = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 1
    assert no_threads_are_left()


def on_s3(folder: Path, uri: str) -> str:
    store = open_store(uri)
    for file in folder.glob("*"):
        store.write_bytes(file.name, file.read_bytes())
    return uri


def test_damage_on_s3(folder: Path, s3: str) -> None:
    store = open_store(on_s3(folder, f"{s3}/damaged"))
    assert len(take(ShardDataset(store.uri))) == 20
    data = store.read_bytes(SHARD)
    store.write_bytes(SHARD, data[:1000])
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged \(it has 1000 bytes, its manifest says {len(data)}\)"):
        take(ShardDataset(store.uri))
    store.remove(SHARD)
    with pytest.raises(FileNotFoundError, match=f"there is no file {store.uri}/{SHARD}"):
        take(ShardDataset(store.uri))
    assert no_threads_are_left()


def test_a_shard_that_is_replaced_on_s3_while_it_is_read(folder: Path, s3: str) -> None:
    """By one of as many bytes, as another build of raw pixels makes it."""
    store = open_store(on_s3(folder, f"{s3}/replaced"))
    dataset = ShardDataset(store.uri)
    take(dataset)
    data = store.read_bytes(SHARD)
    store.write_bytes(SHARD, bytes(len(data)))
    with pytest.raises(ValueError, match=rf"{SHARD} was changed while it was being read"):
        take(dataset)
    store.write_bytes(SHARD, data)
    assert len(take(dataset)) == 20


def test_a_shard_that_is_cut_short_or_goes_on_s3_while_it_is_read(folder: Path, s3: str) -> None:
    store = open_store(on_s3(folder, f"{s3}/vanishing"))
    dataset = ShardDataset(store.uri)
    take(dataset)
    for size in (1000, 0):
        store.write_bytes(SHARD, store.read_bytes(SHARD)[:size])
        with pytest.raises(ValueError, match=rf"{SHARD} was changed while it was being read"):
            take(dataset)
    store.remove(SHARD)
    with pytest.raises(FileNotFoundError, match=f"{SHARD} is gone, but belongs to this data set: build the data again"):
        take(dataset)
