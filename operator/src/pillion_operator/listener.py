"""
The whole of: a TLS port: an application served to a bounded number of connections.

Called from: webhook and controller, for the ports that every client in the cluster can reach.
Must never: let idle connections exhaust the memory, or displace connections that were answered before.

A connection is accepted, shakes hands, and from then on speaks HTTP. Where there are too many handshakes a new one is closed; where there
are too many connections one of them goes: the oldest that never had a good answer, else the oldest that waits for nothing.
"""

import asyncio
import weakref
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from ssl import SSLContext
from types import TracebackType
from typing import Final, Self, cast

from aiohttp import web

MAX_CONNECTIONS: Final = 640
"""
Maximum number of connections that speak HTTP; an idle one takes some 60 KiB. An API server keeps 25 idle ones, and opens one for
each pod that comes at once.
"""
MAX_HANDSHAKES: Final = 384
"""Maximum number of handshakes at one time. Each takes a millisecond of the processor, so further ones would be late anyway."""
HANDSHAKE_S: Final = 5.0
"""Timeout for one handshake. The API server allows as much for a whole call."""
BACKLOG: Final = 1024
"""
Maximum number of connections that wait to be accepted while the loop is busy: a burst of pods, or all jobs after a change of the
leader.
"""
TLS_BUFFER_BYTES: Final = 32 * 1024
"""
Read buffer of each TLS connection: two records of TLS, as most reviews and reports are smaller than one. asyncio's own size is 256 KiB,
and the C library keeps all of that memory after the connections have gone.
"""
LINGER_S: Final = 1.0
"""Time to keep reading a refused body, so that its sender can read the answer."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def limit_tls_memory() -> None:
    """
    Give every TLS connection that this process opens from now on a buffer of `TLS_BUFFER_BYTES`.

    asyncio has no public setting for it. `SSLProtocol.max_size` is the size in CPython 3.11 to 3.14 (Lib/asyncio/sslproto.py); earlier
    versions have another implementation. A unit test fails where a version of Python no longer reads it.
    """
    sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES


class Listener:
    """
    One port with TLS.

    Owns: the listening socket and its connections, while in ``async with``.
    """

    def __init__(
        self,
        application: web.Application,
        *,
        address: str,
        port: int,
        context: SSLContext,
        keep_alive_s: float,
        close_s: float,
    ) -> None:
        """
        Args:
            application: what is served; a middleware is added to it.
            address: to listen on; empty: every one.
            port: 0: any that is free; see `port`.
            context: with the certificate.
            keep_alive_s: how long a connection without a request stays open.
            close_s: for requests that are being answered when the listener closes.
        """
        self.port = port
        self._address = address
        self._context = context
        self._shaking: set[asyncio.Task[None]] = set()
        """Handshakes that are not done."""
        self._busy: set[asyncio.BaseProtocol] = set()
        self._answered: weakref.WeakKeyDictionary[asyncio.BaseTransport, None] = weakref.WeakKeyDictionary()
        """Connections that got an answer with status 200."""
        application.middlewares.append(self._counted)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            # A body of a few bytes could become one of gigabytes, and no legitimate client compresses.
            auto_decompress=False,
            keepalive_timeout=keep_alive_s,
            lingering_time=LINGER_S,
            shutdown_timeout=close_s,
        )
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Guest(self._accept), self._address or None, self.port, backlog=BACKLOG
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._shaking:
            task.cancel()
        await asyncio.gather(*self._shaking, return_exceptions=True)
        await self._runner.cleanup()

    def _accept(self, guest: "_Guest", transport: asyncio.Transport) -> None:
        if len(self._shaking) >= MAX_HANDSHAKES:
            transport.abort()
            return
        # Nothing may be read before TLS reads it.
        transport.pause_reading()
        shaking = asyncio.create_task(self._shake_hands(guest, transport), name="handshake")
        self._shaking.add(shaking)
        shaking.add_done_callback(self._shaking.discard)

    async def _shake_hands(self, guest: "_Guest", transport: asyncio.Transport) -> None:
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport, guest, self._context, server_side=True, ssl_handshake_timeout=HANDSHAKE_S
            )
        except OSError:
            # This includes errors of TLS. A peer with another protocol or another authority got its answer from TLS itself.
            transport.abort()
            return
        server = self._runner.server
        if secured is None or server is None or guest.is_lost:
            transport.abort()
        elif len(server.connections) >= MAX_CONNECTIONS and not self._make_room(server.connections):
            secured.abort()
        else:
            guest.hand_over(secured, server())

    def _make_room(self, connections: list[web.RequestHandler]) -> bool:
        idle = [
            transport
            for each in connections
            if each not in self._busy and (transport := each.transport) is not None and not transport.is_closing()
        ]
        least_used = next((each for each in idle if each not in self._answered), idle[0] if idle else None)
        if least_used is None:
            return False
        least_used.abort()
        return True

    @web.middleware
    async def _counted(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        protocol, transport = request.protocol, request.transport
        self._busy.add(protocol)
        try:
            response = await handler(request)
        finally:
            self._busy.discard(protocol)
        if response.status == 200 and transport is not None:
            self._answered[transport] = None
        return response


class _Guest(asyncio.Protocol):
    """A connection until its handshake is done: HTTP costs nothing before that."""

    def __init__(self, accept: Callable[["_Guest", asyncio.Transport], None]) -> None:
        self.is_lost = False
        self._accept = accept
        self._early: list[bytes] = []
        """Data that arrived with the end of the handshake."""
        self._is_whole = False
        """Whether the other side has sent EOF."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._accept(self, cast("asyncio.Transport", transport))

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def eof_received(self) -> None:
        self._is_whole = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True

    def hand_over(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """Hand the connection to another protocol, which sees it as new."""
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        for data in self._early:
            protocol.data_received(data)
        if self._is_whole:
            protocol.eof_received()
