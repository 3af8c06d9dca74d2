"""A shard has the bytes that pyarrow's own writer gives it, whoever makes the pixels and where."""

from __future__ import annotations

import errno
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from inline import build_here
from numpy.typing import NDArray
from PIL import Image

from pipelines import shard_task
from pipelines.config import BuildConfig
from pipelines.direct_file import ROOM
from pipelines.rows import Picture, Scale, make_row
from pipelines.schema import SHARD
from pipelines.shards import SMALL_WRITES, Drawn, ShardWriter, checksum
from pipelines.sources.reading import OpenedRecord, open_record
from pipelines.storage import open_store
from pipelines.tiling import Tiling, parts

SIZES = [0, 1, 100, SMALL_WRITES - 1, SMALL_WRITES, SMALL_WRITES + 1, 1_000_003, ROOM - 1, ROOM, ROOM + 1, 2 * ROOM]
INSTANCE = {
    "label": 1, "category_id": 3, "box": [1.0, 2.0, 3.5, 4.5], "area": 3.0, "iscrowd": False, "keypoints": None,
    "segmentation": {"polygons": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], "rle": {"size": [3, 4], "counts": "abc"}},
}  # fmt: skip


def pixels_of(number: int, size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)


def drawn(number: int, size: int) -> Drawn:
    def draw(out: NDArray[np.uint8]) -> None:
        out[:] = pixels_of(number, size)

    return Drawn(size, draw)


def row_of(number: int, image: Any) -> dict[str, Any]:
    return {
        "image_id": number, "uri": f"/images/{'x' * number}.jpg", "height": 3 + number % 2, "width": 3,
        "source_height": 4, "source_width": 5, "encoding": "raw", "image": image, "instances": [INSTANCE] * number,
        "tile": {"image_id": 7, "y": 0, "x": 1, "height": 9, "width": 9} if number % 3 else None,
    }  # fmt: skip


def by_pyarrow(path: Path, rows: list[dict[str, Any]]) -> bytes:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SHARD) as writer:
        for row in rows:
            columns = [pa.array([row[field.name]], field.type) for field in SHARD]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SHARD))
    return path.read_bytes()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("together", [1, 4, len(SIZES)])
@pytest.mark.parametrize("make", [drawn, pixels_of])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1], SIZES[:6]])
def test_the_bytes_are_pyarrow_s(tmp_path: Path, direct: bool, together: int, make: Any, sizes: list[int]) -> None:
    expected = by_pyarrow(tmp_path / "theirs", [row_of(i, pixels_of(i, n).tobytes()) for i, n in enumerate(sizes)])
    rows = [row_of(i, make(i, size)) for i, size in enumerate(sizes)]
    with ShardWriter(tmp_path / "ours", direct=direct) as writer:
        for start in range(0, len(rows), together):
            writer.write(rows[start : start + together])
    assert (tmp_path / "ours").read_bytes() == expected
    info = writer.info("ours")
    assert (info.rows, info.bytes, info.xxh128) == (len(sizes), len(expected), checksum(tmp_path / "ours"))
    assert info.portrait == np.packbits(np.arange(len(sizes)) % 2 == 1).tobytes().hex()


def test_what_fails_to_be_drawn_is_raised(tmp_path: Path) -> None:
    def fails(out: NDArray[np.uint8]) -> None:
        raise MemoryError("no room to resize")

    with pytest.raises(MemoryError, match="no room to resize"), ShardWriter(tmp_path / "shard") as writer:
        writer.write([row_of(0, Drawn(SMALL_WRITES, fails))])


def test_a_fault_of_arrow_is_raised_though_pixels_wait(tmp_path: Path) -> None:
    rows = [row_of(0, drawn(0, SMALL_WRITES)), row_of(1, drawn(1, SMALL_WRITES)), row_of(2, 5)]
    with pytest.raises(TypeError, match="bytes-like"), ShardWriter(tmp_path / "shard") as writer:
        writer.write(rows)


def test_after_a_fault_nothing_more_is_drawn(tmp_path: Path) -> None:
    """Not even before the footer, which is long here."""

    def first(out: NDArray[np.uint8]) -> None:
        raise ValueError("first")

    def second(out: NDArray[np.uint8]) -> None:
        raise KeyError("second")

    rows = [row_of(0, Drawn(SMALL_WRITES, draw)) for draw in (first, second, second)]
    writer = ShardWriter(tmp_path / "shard")
    writer.write([row_of(0, b"") for _ in range(900)])
    with pytest.raises(ValueError, match="first"), writer:
        writer.write(rows)


def test_a_file_that_cannot_be_ended_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path / "shard")
    writer.write([row_of(0, b"") for _ in range(900)])  # their footer does not fit the buffer for small writes
    monkeypatch.setattr(writer._file, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer._file.closed
    assert writer._file._file.closed


def test_large_pixels_do_not_wait_in_memory(tmp_path: Path) -> None:
    """Those that fit no block are made beside it; between some that are drawn there, too."""
    size = 2 * ROOM
    rows = [row_of(i, drawn(i, size if i % 4 else SMALL_WRITES)) for i in range(16)]
    with ShardWriter(tmp_path / "shard", direct=True) as writer:
        writer.write(rows[:1])
        tracemalloc.start()
        writer.write(rows[1:])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert size < peak < 4 * size


def images_in(folder: Path, count: int, side: int) -> str:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(pixels_of(i, side * side * 3).reshape(side, side, 3)).save(folder / f"{i:02d}.png")
    return str(folder)


@pytest.mark.parametrize(("bound", "most"), [(1, 0), (3 * 32 * 32 * 3, 2), (2**30, shard_task.TOGETHER - 1)])
def test_few_decoded_images_are_held_and_large_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int, most: int
) -> None:
    decoded: list[weakref.ref[NDArray[np.uint8]]] = []
    held: list[int] = []

    def watched(*args: Any, **kwargs: Any) -> OpenedRecord:
        held.append(sum(each() is not None for each in decoded))
        opened = open_record(*args, **kwargs)
        assert opened.pixels is not None
        decoded.append(weakref.ref(opened.pixels))
        return opened

    monkeypatch.setattr(shard_task, "open_record", watched)
    monkeypatch.setattr(shard_task, "TOGETHER_BYTES", bound)
    images = images_in(tmp_path / "images", 3 * shard_task.TOGETHER, side=32)
    summary = build_here(BuildConfig(images=images, out=str(tmp_path / "out"), format="images", shorter_side=40))
    assert summary.totals.rows == len(held) == 3 * shard_task.TOGETHER
    assert max(held) == most


def test_tiles_are_views_until_they_are_written(tmp_path: Path) -> None:
    picture = Picture(1, "a.png", np.zeros((1000, 1000, 3), np.uint8))
    scale, tiling = Scale(open_store(str(tmp_path)), 100, 200), Tiling(256, 128, 0.0)
    tracemalloc.start()
    rows = [make_row(picture, part, scale, "raw") for part in parts((1000, 1000), [], tiling)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) > 30
    assert peak < 256 * 256 * 3
