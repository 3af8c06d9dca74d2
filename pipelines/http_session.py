"""An HTTP session for S3 that gives up uploads and answers that are too slow.

aiohttp bounds the time without a byte: an answer of one byte a second would take for ever. What is sent it does not
bound at all.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ReadTimeoutError

SLOWEST = 10_000  # bytes a second
SILENCES = 3  # of the longest that is borne, in which an answer has to come, or as much of its body
IN_FLIGHT = 4 * 2**20  # bytes that may have been read of a file and still wait here to be sent
LOOKS = 8  # at how much has been read, in the time that is allowed for this
LATER, UNAVAILABLE = (409, 429), 503  # two writers of one file at once, too many requests: not S3's words for it
SIZES = ("Content-Length", "X-Amz-Decoded-Content-Length")  # the latter over TLS, where checksums come after the bytes


class BoundedSession(AIOHTTPSession):
    """Raises, or has the reader of a body raise, what is tried again as after a silence or a broken connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # answers whose bodies are being read: since when, and with how many bytes then. A timer for each would hold
        # memory long after they are read
        self._bodies: weakref.WeakKeyDictionary[aiohttp.ClientResponse, tuple[float, int]] = weakref.WeakKeyDictionary()
        self._looking = False

    async def send(self, request: Any) -> Any:
        """As aiobotocore's, but not for ever."""
        size = max(int(request.headers.get(name) or 0) for name in SIZES)
        body = getattr(request.body, "_raw", request.body)  # over TLS it is wrapped
        watched = size > IN_FLIGHT and hasattr(body, "tell")
        seconds = self._window + (IN_FLIGHT if watched else size) / SLOWEST
        try:
            async with asyncio.timeout(seconds) as bound:
                with _prolonged(bound, seconds, body) if watched else nullcontext():
                    answer = await super().send(request)
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from None
        if answer.status_code in LATER:
            answer.status_code = UNAVAILABLE  # which botocore tries again
        if request.stream_output:
            self._bodies[answer.raw] = time.monotonic(), 0
            self._look_later()
        return answer

    @property
    def _window(self) -> float:
        return SILENCES * float(self._timeout.sock_read)

    def _look_later(self) -> None:
        if self._bodies and not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(self._window / 2, self._look)

    def _look(self) -> None:
        self._looking, now = False, time.monotonic()
        for response, (since, before) in list(self._bodies.items()):
            received = response.content.total_bytes
            if response.closed:
                del self._bodies[response]
            elif now - since >= self._window and received - before < self._window * SLOWEST:
                error = aiohttp.ClientPayloadError(f"{received - before} bytes in {now - since:.1f} s")
                response.content.set_exception(error)
                response.close()
            elif now - since >= self._window:
                self._bodies[response] = now, received
        self._look_later()


@contextmanager
def _prolonged(bound: asyncio.Timeout, seconds: float, file: Any) -> Iterator[None]:
    """Allow so many seconds more whenever IN_FLIGHT bytes more of a file have been read, for they are read as they can
    be sent."""

    async def look() -> None:
        before = file.tell()
        while True:
            await asyncio.sleep(seconds / LOOKS)
            if (now := file.tell()) - before >= IN_FLIGHT and not bound.expired():
                before = now
                bound.reschedule(asyncio.get_running_loop().time() + seconds)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
