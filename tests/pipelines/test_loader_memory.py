"""Nothing that a loader keeps grows with the images it has read: epoch after epoch the same memory."""

from __future__ import annotations

import gc
import os
import tracemalloc
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
from made_shards import instance, make_shards, row

from mrcnn.config import InputConfig
from pipelines.augment import Augmentation
from pipelines.dataset import ShardDataset
from pipelines.loader import batches
from pipelines.storage import open_store

IMAGES, EPOCHS = 48, 14


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    objects = [instance([4, 6, 30, 30]), instance([20, 2, 30, 25])]
    rows = [row(i, (32, 32 + i), objects) for i in range(IMAGES)]
    return make_shards(tmp_path_factory.mktemp("made"), rows, rows_per_shard=6)


def anonymous_bytes() -> int:
    """What the process has for itself: without the pages of mapped files, which the kernel takes back as it likes."""
    pages = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in pages.splitlines() if line.startswith("Anonymous:"))


def growth(uri: str, epochs: int) -> tuple[int, int]:
    """Bytes of Python objects, and of the process, from the end of the second epoch to that of the last."""
    how = Augmentation(0.5, jitter_sides=(24, 28, 32), max_objects=1)
    # few batches ahead: those that happen to be there at the end of an epoch are no growth
    stream = batches(
        ShardDataset(uri), seed=0, global_batch=4, augmentation=how,
        network_input=InputConfig(shorter_side=32, longer_side=64), threads=1, prefetch=1,
    )  # fmt: skip
    with closing(stream):  # type: ignore[type-var]
        at_end: list[tuple[int, int]] = []
        for _ in range(epochs):
            for _ in islice(stream, IMAGES // 4):
                pass
            gc.collect()
            at_end.append((tracemalloc.get_traced_memory()[0], anonymous_bytes()))
    return at_end[-1][0] - at_end[1][0], at_end[-1][1] - at_end[1][1]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_epochs_do_not_add_up(uri: str, where: str, request: pytest.FixtureRequest) -> None:
    """An epoch has 200 kB of pixels and 70 kB of annotations: twelve epochs of either, kept, would show."""
    if where == "s3":
        remote = open_store(f"{request.getfixturevalue('s3')}/memory")
        for name in os.listdir(uri):
            remote.write_bytes(name, Path(uri, name).read_bytes())
        uri = remote.uri
    tracemalloc.start()
    try:
        objects, process = growth(uri, EPOCHS)
    finally:
        tracemalloc.stop()
    assert objects < 300_000
    assert process < 3_000_000


def test_open_files_are_bounded(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have some 65,000 memory maps, and ten million rows may lie in more shards than that."""
    monkeypatch.setattr("pipelines.shards.OPEN_SHARDS", 3)
    dataset = ShardDataset(uri)
    for _ in range(2):
        for i in range(len(dataset)):
            assert dataset.read(i).image_id == i
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert len([line for line in maps if uri in line]) <= 3
