"""Arrow IPC files in which one row is one record batch, so that any single row is one ranged read.

Bodies are uncompressed: from a memory map, raw pixels are used where they lie.
"""

from __future__ import annotations

import io
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipelines.direct_file import ROOM, DirectFile
from pipelines.manifest import ShardInfo
from pipelines.schema import SHARD
from pipelines.storage import Store
from pipelines.storage_errors import ChangedFileError, plain_errors

UNREADABLE = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises where bytes are not what they should be
READ_BYTES = 1024 * 1024
SMALL_WRITES = 16 * 1024  # bytes of them that become one
MAGIC = b"ARROW1"
OPEN_SHARDS = 4096
TAIL = 64 * 1024  # read at once from the end of a remote file: the footer of some 2,000 rows

# `struct Block` of Arrow's File.fbs
BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])
RECORD_BATCHES = 3  # its place among the fields of `table Footer`


@dataclass(frozen=True)
class Drawn:
    """Bytes that are made where they are written: pixels need no memory of their own on the way to a file."""

    size: int
    draw: Callable[[NDArray[np.uint8]], object]
    """Fills (size,) bytes"""


class ShardWriter:
    """A new or empty file that is written row by row, from where the pixels lie, and checked as it is written. A
    context manager. `direct`: see pipelines/direct_file.py; not for a file that is read again at once."""

    def __init__(self, path: Path, schema: pa.Schema = SHARD, *, direct: bool = False) -> None:
        self._schema = schema
        self._binary = [(i, field) for i, field in enumerate(schema) if pa.types.is_binary(field.type)]
        self._plain = pa.struct([field for field in schema if not pa.types.is_binary(field.type)])
        self._file = _CheckedFile(DirectFile(path, direct=direct))
        # a row is some forty writes, all of them small but that of the pixels, which passes by the buffer
        self._sink = pa.BufferedOutputStream(pa.PythonFile(self._file, mode="w"), SMALL_WRITES)
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._tall: list[bool] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write the footer."""
        try:
            self._writer.close()
            self._sink.close()
        finally:
            self._file.close()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, dicts of the schema's fields; binary ones may be any buffer of bytes, one of a row `Drawn`."""
        converted = pa.array(rows, self._plain)  # at once: one by one takes twice as long
        nothing = converted.slice(0, 0)
        for i, row in enumerate(rows):
            # a slice would be written with bytes of its neighbours, what is joined has its own alone
            columns = pa.concat_arrays([converted.slice(i, 1), nothing]).flatten()
            for place, field in self._binary:
                columns.insert(place, self._bytes(row[field.name], field.type))
            self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
            self._tall.append(row.get("height", 0) > row.get("width", 0))
        assert not self._file.asked_for, "bytes to draw were not asked for"
        self._file.draw()

    def _bytes(self, value: Any, type_: pa.DataType) -> pa.Array:
        """An array of one value, which is referred to, not copied."""
        data = self._file.to_draw(value) if isinstance(value, Drawn) else pa.py_buffer(value)
        return pa.Array.from_buffers(type_, 1, [None, pa.py_buffer(np.array([0, data.size], np.int32)), data])

    def info(self, name: str) -> ShardInfo:
        """What a manifest says of the file, once it is closed."""
        portrait = portrait_bits(self._tall) if "height" in self._schema.names else ""
        return ShardInfo(name, len(self._tall), self._file.size, self._file.checksum.hexdigest(), portrait)


class _CheckedFile(io.RawIOBase):
    """A file whose checksum is taken of the bytes on their way.

    From the first bytes that are to be drawn on, they and the small ones wait for `draw`: so Arrow has made its small
    writes for many rows before pixels drive its code, and what it knows of the schema, out of the processor's caches.
    """

    def __init__(self, file: DirectFile) -> None:
        self._file = file
        self._stand_in = pa.py_buffer(b"")
        self.asked_for: deque[Drawn] = deque()
        """What the stand-ins that Arrow has yet to write stand for"""
        self._waiting: deque[Drawn | bytes] = deque()
        self.checksum = xxhash.xxh3_128()
        self.size = 0

    def writable(self) -> bool:
        return True

    def to_draw(self, drawn: Drawn) -> pa.Buffer:
        """What to give to Arrow's writer, as if it were these bytes: they are made by `draw`."""
        if not SMALL_WRITES <= drawn.size <= ROOM:  # several writes become one, or one several
            made = np.empty(drawn.size, np.uint8)
            drawn.draw(made)
            return pa.py_buffer(made)
        if self._stand_in.size < ROOM:
            self._stand_in = pa.py_buffer(np.empty(ROOM, np.uint8))  # never touched: it takes no memory
        self.asked_for.append(drawn)
        return self._stand_in.slice(0, drawn.size)

    def write(self, data: Any) -> int:
        size = len(data)
        if isinstance(data, pa.Buffer) and data.address == self._stand_in.address:
            drawn = self.asked_for.popleft()
            assert size == drawn.size, f"{size} bytes asked for, {drawn.size} are to be drawn"
            self._waiting.append(drawn)
        elif self._waiting and size <= SMALL_WRITES:
            self._waiting.append(bytes(data))
        else:  # large ones would take much memory
            self.draw()
            self._put(data)
        return size

    def draw(self) -> None:
        """Write all that waits; what Arrow has yet to write comes behind it."""
        try:
            while self._waiting:
                self._put(self._waiting.popleft())
        finally:
            self._waiting.clear()  # after a fault nothing more is drawn

    def _put(self, data: Any) -> None:
        if isinstance(data, Drawn):
            drawn, data = data, self._file.room(data.size)
            drawn.draw(np.frombuffer(data, np.uint8))
        else:
            self._file.write(data)
        self.checksum.update(data)
        self.size += len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._file.close()


def checksum(path: Path) -> str:
    """`ShardInfo.xxh128` of a file on disk."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def write_shard(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema = SHARD, *, name: str = "") -> ShardInfo:
    """Write rows (dicts of the schema's fields), holding one at a time in memory; what a manifest says of the file."""
    with ShardWriter(path, schema) as writer:
        for row in rows:
            writer.write([row])
    return writer.info(name or path.name)


def portrait_bits(tall: Sequence[bool]) -> str:
    """`ShardInfo.portrait` of rows that are taller than wide, or not."""
    return np.packbits(np.array(tall, bool)).tobytes().hex()


def portrait_rows(shard: ShardInfo) -> NDArray[np.bool_]:
    """(rows,) whether each is taller than wide, from `ShardInfo.portrait`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(shard.portrait), np.uint8), count=shard.rows).astype(bool)


class ShardedRows:
    """The rows of some shards in a folder, by number. Opens files when they are first needed; threads may share it."""

    def __init__(self, store: Store, shards: Sequence[ShardInfo], schema: pa.Schema = SHARD) -> None:
        self._first_rows = np.cumsum([0, *(shard.rows for shard in shards)])
        # so many stay open: a process may have some 65,000 memory maps, and footers take memory
        self._reader = lru_cache(OPEN_SHARDS)(lambda shard: ShardReader(store, shards[shard], schema))

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def numbers(self, shard: int) -> range:
        """Numbers of the rows of a shard."""
        return range(int(self._first_rows[shard]), int(self._first_rows[shard + 1]))

    def read(self, index: int) -> dict[str, Any]:
        """Row by its number, as a dict of pyarrow scalars, binary ones as buffers.

        Raises ValueError where its file is damaged or has changed, FileNotFoundError where it is gone.
        """
        reader, row = self._place(index)
        return reader.read(row)

    def damaged(self, index: int, what: str) -> ValueError:
        """The error to raise where a row turns out to be spoilt after it was read."""
        reader, row = self._place(index)
        return reader.damaged(f"row {row}: {what}")

    def _place(self, index: int) -> tuple[ShardReader, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return self._reader(shard), index - int(self._first_rows[shard])


class ShardReader:
    """Random access to the rows of one shard. Threads may share it.

    A local file is mapped into memory. To read a map beyond the end of a file that was cut short kills the process, so
    every read first looks whether the file is still the one that was opened; so does every answer of S3.
    """

    def __init__(self, store: Store, info: ShardInfo, schema: pa.Schema = SHARD) -> None:
        self._store = store
        self._info = info
        self._schema = schema
        # not cached_property's own lock, of which Python 3.11 has one for all readers: they would wait for each other
        self._lock = threading.Lock()
        self._found: NDArray[Any] | None = None
        self._etag = ""

    def __len__(self) -> int:
        return len(self._blocks)

    def read(self, row: int) -> dict[str, Any]:
        """Row as a dict of pyarrow scalars, binary ones as buffers.

        Raises ValueError where the file is damaged or has changed, FileNotFoundError where it is gone.
        """
        block = self._blocks[row]
        buffer = self._fetch(int(block["offset"]), int(block["metadata"]) + int(block["body"]))
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(buffer), self._schema)
            batch.validate(full=True)  # else offsets that point anywhere are followed
        except (*UNREADABLE, EOFError) as error:
            raise self.damaged(f"row {row}: {error}") from None
        if batch.num_rows != 1:
            raise self.damaged(f"row {row}: {batch.num_rows} rows in its record batch")
        return {name: _value(column) for name, column in zip(self._schema.names, batch.columns, strict=True)}

    def damaged(self, what: str) -> ValueError:
        """The error to raise where this shard is not as it was written."""
        alone = "remove this file, and run the same build-data again"
        remedy = alone if self._schema is SHARD else "remove its folder, and make it again"
        return ValueError(f"{self._store.uri_of(self._info.name)} is damaged ({what}): {remedy}")

    def _changed(self) -> ValueError:
        uri = self._store.uri_of(self._info.name)
        return ValueError(f"{uri} was changed while it was being read: run the same command again, which reads it anew")

    @cached_property
    def _mapped(self) -> tuple[pa.Buffer, tuple[int, ...]]:
        stamp, uri = self._stamp(), self._store.uri_of(self._info.name)
        with plain_errors(uri), pa.memory_map(uri) as file:
            return file.read_buffer(), stamp

    def _stamp(self) -> tuple[int, ...]:
        """Changes when a local file does. Raises FileNotFoundError where it is gone."""
        uri = self._store.uri_of(self._info.name)
        try:
            with plain_errors(uri):
                status = Path(uri).stat()
        except FileNotFoundError:
            raise self._gone() from None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _gone(self) -> FileNotFoundError:
        uri = self._store.uri_of(self._info.name)
        return FileNotFoundError(f"{uri} is gone, but belongs to this data set: build the data again")

    def _fetch(self, start: int, length: int) -> pa.Buffer:
        if self._store.is_local:
            mapped, stamp = self._mapped
            if self._stamp() != stamp:
                raise self._changed()
            return mapped.slice(start, length)
        try:
            data = self._store.read_range(self._info.name, start, length, self._etag)
        except ChangedFileError:
            raise self._changed() from None
        except FileNotFoundError:
            raise self._gone() from None
        if len(data) != length:
            raise self.damaged(f"it ends at byte {start + len(data)}, {start + length} are needed")
        return pa.py_buffer(data)

    def _size(self) -> int:
        if self._store.is_local:
            size = self._stamp()[1]
        else:
            size, self._etag = self._store.size_and_etag(self._info.name)
        if size != self._info.bytes:
            raise self.damaged(f"it has {size} bytes, its manifest says {self._info.bytes}")
        return size

    @property
    def _blocks(self) -> NDArray[Any]:
        """Where each row lies; looked up once."""
        with self._lock:
            if self._found is None:
                self._found = self._find_blocks()
            return self._found

    def _find_blocks(self) -> NDArray[Any]:
        size = self._size()
        tail = self._fetch(max(0, size - TAIL), min(size, TAIL)).to_pybytes()
        if size < 20 or tail[-6:] != MAGIC:
            raise self.damaged("no Arrow footer")
        (length,) = struct.unpack("<i", tail[-10:-6])
        if not 0 < length <= size - 10:
            raise self.damaged("bad Arrow footer")
        footer = tail[-10 - length : -10]
        if length + 10 > len(tail):
            footer = self._fetch(size - 10 - length, length).to_pybytes()
        try:
            blocks = _record_batch_blocks(footer)
        except (struct.error, ValueError):
            raise self.damaged("bad Arrow footer") from None
        ends = blocks["offset"] + blocks["metadata"] + blocks["body"]
        inside = (blocks["offset"] >= 0) & (blocks["metadata"] > 0) & (blocks["body"] >= 0) & (ends <= size)
        if len(blocks) != self._info.rows or not inside.all():
            raise self.damaged(f"its footer does not tell where {self._info.rows} rows are")
        return blocks


def _value(column: pa.Array) -> pa.Scalar | pa.Buffer:
    """The one value of a column: of a binary one the bytes where they lie, which pyarrow's scalar would copy."""
    if not pa.types.is_binary(column.type):
        return column[0]
    _, offsets, data = column.buffers()
    start, end = np.frombuffer(offsets, np.int32, 2)
    return data.slice(int(start), int(end - start))


def _record_batch_blocks(footer: bytes) -> NDArray[Any]:
    """Where each record batch lies. pyarrow reads by row number but does not say which bytes that takes.

    A flatbuffer's table points back to a vtable, which holds a 16-bit offset for each field (0: absent).
    """
    (table,) = struct.unpack_from("<I", footer, 0)
    (back,) = struct.unpack_from("<i", footer, table)
    (field,) = struct.unpack_from("<H", footer, table - back + 4 + 2 * RECORD_BATCHES)
    if field == 0:
        return np.zeros(0, BLOCK)
    (jump,) = struct.unpack_from("<I", footer, table + field)
    (count,) = struct.unpack_from("<I", footer, table + field + jump)
    return np.frombuffer(footer, BLOCK, count, table + field + jump + 4)
