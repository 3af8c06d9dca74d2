"""fsspec's files of web servers, but none of more bytes than are wanted, and none for ever."""

from __future__ import annotations

import time
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

from pipelines.http_session import SILENCES, SLOWEST
from pipelines.local_files import check_bytes
from pipelines.storage_errors import without_secrets


class WebFiles(HTTPFileSystem):
    """With a bound of a file's bytes, and of the time that it may take to come: see pipelines/http_session.py."""

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, at_most: int | None = None, **kwargs: Any
    ) -> bytes:
        if start is not None or end is not None:
            return bytes(await super()._cat_file(url, start, end, **kwargs))
        session = await self.set_session()
        async with session.get(self.encode_url(url), **self.kwargs | kwargs) as answer:
            self._raise_not_found_for_status(answer, url)
            check_bytes(without_secrets(url), answer.content_length or 0, at_most)
            return await _body(answer, url, at_most, SILENCES * float(session.timeout.sock_read))


async def _body(answer: aiohttp.ClientResponse, url: str, at_most: int | None, window: float) -> bytes:
    """Of an answer of which as much comes in each window of so many seconds as is the slowest that is borne."""
    data, since, before = bytearray(), time.monotonic(), 0
    async for block in answer.content.iter_any():
        data += block
        check_bytes(without_secrets(url), len(data), at_most)
        if (now := time.monotonic()) - since >= window:
            if len(data) - before < SLOWEST * window:
                raise aiohttp.ClientPayloadError(f"{len(data) - before} bytes in {now - since:.0f} s")
            since, before = now, len(data)
    return bytes(data)
