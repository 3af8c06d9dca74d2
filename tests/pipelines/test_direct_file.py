"""A file written past the page cache has the bytes of one that was not."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import direct_file
from pipelines.direct_file import BLOCK, BLOCKS, ROOM, SPARE_BLOCKS, DirectFile
from pipelines.shards import ShardWriter

BYTES = np.random.default_rng(0).integers(0, 256, (BLOCKS + 3) * BLOCK, np.uint8)


def written(path: Path, sizes: list[int]) -> bytes:
    """The file at `path` after writes of so many bytes each, which have to be BYTES' first."""
    start = 0
    with DirectFile(path) as file:
        for size in sizes:
            assert file.write(BYTES[start : start + size]) == size
            start += size
    assert path.stat().st_size == start
    assert path.read_bytes() == BYTES[:start].tobytes()
    return path.read_bytes()


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [BLOCK - 1],
        [BLOCK],
        [BLOCK + 1],
        [3, BLOCK - 3, BLOCK],
        [7, 3 * BLOCK, 11, 5],
        [(BLOCKS + 2) * BLOCK + 17],  # more than is ever in memory
        [BLOCK // 3] * 3 * BLOCKS,
    ],
)
def test_all_bytes_in_any_pieces(tmp_path: Path, sizes: list[int]) -> None:
    written(tmp_path / "file", sizes)


def test_random_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for i in range(5):
        written(tmp_path / str(i), [int(size) for size in rng.integers(0, BLOCK // 2, 12)])


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_filled_in_its_room_comes_between_what_is_written(tmp_path: Path, direct: bool) -> None:
    rng, start, seen = np.random.default_rng(2), 0, []
    with DirectFile(tmp_path / "file", direct=direct) as file:
        for size in [1, ROOM, 1, ROOM, ROOM, 5, *(int(each) for each in rng.integers(0, ROOM // 3, 40)), BLOCK, ROOM]:
            some = BYTES[start % BLOCK :][:size]
            if rng.random() < 0.5 and size <= ROOM:
                file.room(size)[:] = some
            else:
                file.write(some)
            start += size
            seen.append(some.tobytes())
    assert (tmp_path / "file").read_bytes() == b"".join(seen)


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    import fcntl

    real_open, real_write, refusals = os.open, os.pwrite, []

    def fussy_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & direct_file.O_DIRECT:
            refusals.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def fussy_write(file: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & direct_file.O_DIRECT:
            refusals.append("pwrite")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(file, data, offset)

    monkeypatch.setattr(
        direct_file.os, "open" if refused == "open" else "pwrite", fussy_open if refused == "open" else fussy_write
    )
    written(tmp_path / "file", [2 * BLOCK + 5])
    assert refusals == [refused]


def test_the_disk_may_take_less_than_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(direct_file.os, "pwrite", lambda file, data, at: real(file, data[: BLOCK // 4], at))
    written(tmp_path / "file", [2 * BLOCK + 5])


def test_a_slow_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, waiting = os.pwrite, []

    def slow(file: int, data: memoryview, offset: int) -> int:
        time.sleep(0.02)
        return real(file, data, offset)

    monkeypatch.setattr(direct_file.os, "pwrite", slow)
    with DirectFile(tmp_path / "file") as file:
        for i in range(BLOCKS + 3):
            file.write(BYTES[i * BLOCK : (i + 1) * BLOCK])
            waiting.append(len(file._writing))
    assert max(waiting) < BLOCKS  # bounded memory
    assert (tmp_path / "file").read_bytes() == BYTES.tobytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_was_never_closed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does its thread write to a file that has got its number since."""
    real, go_on, wrote = os.pwrite, threading.Event(), threading.Event()

    def slow(file: int, data: memoryview, offset: int) -> int:
        go_on.wait(10)
        done = real(file, data, offset)
        wrote.set()
        return done

    monkeypatch.setattr(direct_file.os, "pwrite", slow)
    file = DirectFile(tmp_path / "left")
    file.write(BYTES[: BLOCK + 1])
    cycle: list[Any] = [file]
    cycle.append(cycle)  # freed by the garbage collector alone, in whatever order
    del cycle, file
    gc.collect()
    with (tmp_path / "other").open("wb") as other:
        go_on.set()
        assert wrote.wait(10)
        other.write(b"its own")
    assert (tmp_path / "other").read_bytes() == b"its own"
    assert (tmp_path / "left").read_bytes() == BYTES[:BLOCK].tobytes()


def test_a_shard_that_was_never_closed_does_not_hang(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("image", pa.binary())])
    writer = ShardWriter(tmp_path / "shard", schema, direct=True)
    writer.write([{"image": BYTES[: 3 * BLOCK].tobytes()}])
    cycle: list[Any] = [writer]
    cycle.append(cycle)
    del cycle, writer
    gc.collect()
    assert (tmp_path / "shard").exists()


def test_blocks_are_used_again_and_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[mmap.mmap] = []
    real = mmap.mmap

    def counted(*args: Any, **kwargs: Any) -> mmap.mmap:
        made.append(real(*args, **kwargs))
        return made[-1]

    direct_file._spare_blocks.clear()
    monkeypatch.setattr(direct_file.mmap, "mmap", counted)
    for i in range(6):
        written(tmp_path / str(i), [(BLOCKS + 2) * BLOCK + i])
    assert len(made) <= BLOCKS + 1  # of the first file, which is all that a file has at a time
    with ExitStack() as files:
        for i in range(SPARE_BLOCKS + 2):
            file = files.enter_context(DirectFile(tmp_path / f"together {i}"))
            file.write(BYTES[:BLOCK])
    assert len(direct_file._spare_blocks) == SPARE_BLOCKS


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file.os, "pwrite", full)
    for size in (1, BLOCK + 1, 3 * BLOCK):  # the last write sees it, or that which closes
        file = DirectFile(tmp_path / "file")
        with pytest.raises(OSError, match="No space left"), file:
            file.write(BYTES[:size])
        assert file.closed
    file.close()  # a second time does nothing
