"""
The whole of: bounds on the bodies of requests: the time and the length of one, and the bytes of all at one time.

Called from: the servers of reviews and of reports, which parse and answer while they hold a body.
Must never: let slow senders displace fast ones: where there is no room, the body that has been arriving for the
longest time is given up.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from aiohttp import web


class Unread(Exception):
    """A body was not read to its end; the text is the cause."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        """The HTTP status for it: 400, 408, 413 or 503."""


@dataclass(slots=True, eq=False)
class _Body:
    """A body from its first byte until its request is answered."""

    request: web.Request
    bound: asyncio.Timeout
    """Until when it has to be whole."""
    num_bytes: int = 0
    is_given_up: bool = False


class Bodies:
    """
    All bodies of one server.

    Owns: the count of bytes and of requests.
    """

    def __init__(self, *, longest: int, most_bytes: int, most: int, within_s: float) -> None:
        """
        Args:
            longest: bytes of one body.
            most_bytes: bytes of all at one time, at least `longest`.
            most: requests at one time.
            within_s: for one body to come whole, in seconds.
        """
        self._longest = longest
        self._most_bytes = most_bytes
        self._most = most
        self._within_s = within_s
        self._held: set[_Body] = set()
        self._coming: dict[_Body, None] = {}
        """The incomplete bodies, in the order in which they began."""
        self._num_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: web.Request) -> AsyncGenerator[bytes]:
        """
        The whole body, which counts as held while in ``async with``. Blocks: up to `within_s`.

        Raises:
            Unread: it is too long or too slow, breaks off, or had to make room.
        """
        if (request.content_length or 0) > self._longest:
            raise self._too_long()
        while len(self._held) >= self._most:
            self._make_room()
        body = _Body(request, asyncio.timeout(self._within_s))
        self._held.add(body)
        self._coming[body] = None
        try:
            content = await self._whole(body)
            del self._coming[body]
            yield content
        finally:
            self._release(body)

    async def _whole(self, body: _Body) -> bytes:
        content = bytearray()
        try:
            async with body.bound:
                while chunk := await body.request.content.readany():
                    if len(content) + len(chunk) > self._longest:
                        raise self._too_long()
                    while self._num_bytes + len(chunk) > self._most_bytes:
                        self._make_room(body)
                    body.num_bytes += len(chunk)
                    self._num_bytes += len(chunk)
                    content += chunk
        except TimeoutError:
            if body.is_given_up:
                raise _crowded() from None
            raise Unread(408, f"the body was not complete within {self._within_s:.0f} s") from None
        except (OSError, web.RequestPayloadError):
            raise Unread(400, "the connection broke before the body was complete") from None
        return bytes(content)

    def _make_room(self, asking: _Body | None = None) -> None:
        """
        Give up the body that has been coming for the longest time.

        Raises:
            Unread: that body is the one that needs room, or there is none to give up.
        """
        oldest = next(iter(self._coming), asking)
        if oldest is None or oldest is asking:
            raise _crowded()
        self._release(oldest)
        oldest.is_given_up = True
        if not oldest.bound.expired():
            oldest.bound.reschedule(0.0)

    def _release(self, body: _Body) -> None:
        if body in self._held:
            self._held.remove(body)
            self._coming.pop(body, None)
            self._num_bytes -= body.num_bytes

    def _too_long(self) -> Unread:
        return Unread(413, f"the body is longer than {self._longest} bytes")


def _crowded() -> Unread:
    return Unread(503, "too many requests at one time; try again")
