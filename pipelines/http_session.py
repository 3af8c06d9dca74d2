"""An HTTP session for S3 that gives up answers which come too slowly.

aiohttp bounds the time without a byte, for reading alone: an answer of one byte a second would take for ever, and so
would an upload that the server stops taking.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ReadTimeoutError

SLOWEST = 10_000  # bytes a second
SILENCES = 3  # of the longest that is borne, that a request may take besides: for a connection, the answer, its body

SIZES = ("Content-Length", "X-Amz-Decoded-Content-Length")  # the latter over TLS, where checksums come after the bytes


class BoundedSession(AIOHTTPSession):
    """Raises, or has the reader of a body raise, what is tried again as after a silence or a broken connection."""

    async def send(self, request: Any) -> Any:
        """As aiobotocore's, within a time that depends on the bytes to send; the answer's body likewise."""
        try:
            async with asyncio.timeout(self._seconds(request.headers)):
                answer = await super().send(request)
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url=request.url, error=error) from None
        if request.stream_output:
            # a weak reference: what is read in time is not to be held until then
            seconds = self._seconds(answer.raw.headers)
            asyncio.get_running_loop().call_later(seconds, _give_up, weakref.ref(answer.raw))
        return answer

    def _seconds(self, headers: Any) -> float:
        size = max(int(headers.get(name) or 0) for name in SIZES)
        return SILENCES * float(self._timeout.sock_read) + size / SLOWEST


def _give_up(reference: weakref.ref[aiohttp.ClientResponse]) -> None:
    response = reference()
    if response is not None and not response.closed:
        response.close()
