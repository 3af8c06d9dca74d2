"""Arrow IPC files in which one row is one record batch, so that any single row is one ranged read.

Bodies are uncompressed: from a memory map, raw pixels are used where they lie.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.manifest import ShardInfo
from pipelines.schema import SHARD
from pipelines.storage import Store

MAGIC = b"ARROW1"
TAIL = 64 * 1024  # read at once from the end of a remote file: the footer of some 2,000 rows

# `struct Block` of Arrow's File.fbs
BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])
RECORD_BATCHES = 3  # its place among the fields of `table Footer`


def write_shard(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema = SHARD) -> int:
    """Write rows (dicts of the schema's fields), holding one at a time in memory; the number of rows."""
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for row in rows:
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
            count += 1
    return count


class ShardedRows:
    """The rows of some shards in a folder, by number. Opens files when they are first needed; threads may share it."""

    def __init__(self, store: Store, shards: Sequence[ShardInfo], schema: pa.Schema = SHARD) -> None:
        self._first_rows = np.cumsum([0, *(shard.rows for shard in shards)])
        self._readers = [ShardReader(store, shard.name, schema) for shard in shards]

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def numbers(self, shard: int) -> range:
        """Numbers of the rows of a shard."""
        return range(int(self._first_rows[shard]), int(self._first_rows[shard + 1]))

    def read(self, index: int) -> dict[str, Any]:
        """Row by its number, as a dict of pyarrow scalars. Raises ValueError where its file is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return self._readers[shard].read(index - int(self._first_rows[shard]))


class ShardReader:
    """Random access to the rows of one shard. Threads may share it."""

    def __init__(self, store: Store, name: str, schema: pa.Schema = SHARD) -> None:
        self._store = store
        self._name = name
        self._schema = schema

    def __len__(self) -> int:
        return len(self._blocks)

    def read(self, row: int) -> dict[str, Any]:
        """Row as a dict of pyarrow scalars. Raises ValueError where the file is damaged."""
        block = self._blocks[row]
        buffer = self._fetch(int(block["offset"]), int(block["metadata"]) + int(block["body"]))
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(buffer), self._schema)
        except (pa.ArrowInvalid, OSError, EOFError) as error:
            raise self._damaged(f"row {row}: {error}") from None
        return {name: column[0] for name, column in zip(self._schema.names, batch.columns, strict=True)}

    @cached_property
    def _mapped(self) -> pa.Buffer:
        with pa.memory_map(str(self._store.path / self._name)) as file:
            return file.read_buffer()

    def _fetch(self, start: int, length: int) -> pa.Buffer:
        if self._store.is_local:
            return self._mapped.slice(start, length)
        return pa.py_buffer(self._store.read_range(self._name, start, length))

    @cached_property
    def _blocks(self) -> NDArray[Any]:
        size = self._mapped.size if self._store.is_local else self._store.size(self._name)
        tail = self._fetch(max(0, size - TAIL), min(size, TAIL)).to_pybytes()
        if size < 20 or tail[-6:] != MAGIC:
            raise self._damaged("no Arrow footer")
        (length,) = struct.unpack("<i", tail[-10:-6])
        if not 0 < length <= size - 10:
            raise self._damaged("bad Arrow footer")
        footer = tail[-10 - length : -10] if length + 10 <= len(tail) else None
        return _record_batch_blocks(footer or self._fetch(size - 10 - length, length).to_pybytes())

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._store.uri_of(self._name)} is damaged ({what}): remove its folder and make it again")


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
