"""A large local file that goes to its disk past the page cache.

A shard is not read again soon: in the cache it would only drive out what is, and to copy its pixels there costs a
build as much as to decode them.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

from pipelines.local_files import open_to_write

ALIGNED = 4096  # bytes: disks demand that their places in the file and in memory, and their number, are multiples of it
BLOCK = 8 * 1024 * 1024  # a multiple of that, and of the pages that a processor finds fastest
BLOCKS = 4  # of a file in memory, at most
SPARE_BLOCKS = 4  # that a process keeps for its next file, at most: the system fills new memory with zeros
ROOM = BLOCK - ALIGNED  # bytes that fit a block behind what is left of the one before
NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)  # what file systems say that have a cache only
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux alone has it

_spare_blocks: deque[mmap.mmap] = deque(maxlen=SPARE_BLOCKS)


class DirectFile:
    """A new or empty file that is written from its start to its end. A context manager. What a write raises may be
    raised by a later one, or by `close`.

    Where the file system knows nothing but its cache, or with `direct=False`, writes go there. A thread writes the
    blocks that are full.
    """

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        # an object, which its thread's work holds: a number could be another file's where this one was never closed
        self._file = os.fdopen(_open(path) if direct else open_to_write(path), "wb", buffering=0)
        self._block = _block()
        self._offset = 0  # of the block in the file: aligned
        self._filled = 0  # bytes of the block
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="direct-file")
        self._writing: deque[Future[mmap.mmap]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            some = view[done : done + BLOCK - self._filled]
            self._block[self._filled : self._filled + len(some)] = some
            done += len(some)
            self._filled += len(some)
            if self._filled == BLOCK:
                self._hand_over()
        return done

    def room(self, size: int) -> memoryview:
        """The memory of the file's next `size` bytes, at most ROOM, to be filled before anything else is written."""
        assert size <= ROOM, f"{size} bytes, a block has room for {ROOM}"
        if self._filled + size > BLOCK:
            self._hand_over()
        start, self._filled = self._filled, self._filled + size
        return memoryview(self._block)[start : self._filled]

    def close(self) -> None:
        """Wait for the disk to have it all."""
        if self.closed:
            return
        size = self._offset + self._filled
        try:
            if self._filled:
                self._write(-(-self._filled // ALIGNED) * ALIGNED)  # what is too much is cut off again
            while self._writing:
                _spare_blocks.append(self._writing.popleft().result())
            self._file.truncate(size)
        finally:
            self._writer.shutdown()
            self._file.close()

    def _hand_over(self) -> None:
        """What is aligned of the block goes to the disk, the rest to the start of the next block."""
        aligned = self._filled // ALIGNED * ALIGNED
        rest = self._block[aligned : self._filled]
        self._write(aligned)
        written = self._writing and (len(self._writing) == BLOCKS or self._writing[0].done())
        self._block = self._writing.popleft().result() if written else _block()
        self._offset, self._filled = self._offset + aligned, len(rest)
        self._block[: len(rest)] = rest

    def _write(self, length: int) -> None:
        self._writing.append(
            self._writer.submit(_write_all, self._file, self._block, length=length, offset=self._offset)
        )


def _block() -> mmap.mmap:
    """A map begins where disks demand it, at a page; of large pages it takes few, each of which is to be made first."""
    with suppress(IndexError):
        return _spare_blocks.pop()
    if sys.platform != "linux":
        return mmap.mmap(-1, BLOCK)
    block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _open(path: Path) -> int:
    try:
        return open_to_write(path, O_DIRECT)
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
        return open_to_write(path)


def _write_all(file: FileIO, block: mmap.mmap, *, length: int, offset: int) -> mmap.mmap:
    done = 0
    while done < length:
        try:
            done += os.pwrite(file.fileno(), memoryview(block)[done:length], offset + done)
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno not in NOT_DIRECT or not flags & O_DIRECT:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~O_DIRECT)  # some say so only when they are written to
    return block
