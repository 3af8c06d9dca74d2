"""Work ahead in threads, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Event
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(
    function: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int, ended: Event | None = None
) -> Generator[R, None, None]:
    """`map(function, items)`, in order, with up to `ahead` items begun before they are asked for.

    The first exception of `function` is raised where its result would have come. Closing the iterator cancels
    what has not begun and waits for what has; before that it sets `ended`, at which `function` may give up. `items` may
    be endless.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            if ended:
                ended.set()
            for future in pending:
                future.cancel()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of so many items, the last one perhaps of fewer. (In itertools from Python 3.12 on.)"""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
