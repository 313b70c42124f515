"""
The whole of: a TCP proxy on loopback between a client and a server, with what a network does to both.

Called from: tests of what must outlive a network.
Must never: look into what it carries.
"""

import asyncio
from typing import Self

from support.background import Background


class Proxy:
    """
    The proxy, while in ``with``. Its methods may be called from any thread.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self._to = host, port
        self._background = Background()
        self._gate = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._background.__enter__()
        self.mend()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._background.__exit__()

    def mend(self) -> None:
        """
        Let everyone in. Connections that were frozen stay as they are, as with a node that never comes back.
        """
        self._background.run(self._listen())

    def freeze(self) -> None:
        """
        Carry nothing more, on old and new connections, and say nothing about it: a node that lost its network.
        """
        self._background.call(self._gate.clear)

    def cut(self) -> None:
        """
        Break every connection; new ones are let in.
        """
        self._background.run(self._cut())

    def refuse(self) -> None:
        """
        Break every connection, and let nobody in.
        """
        self._background.run(self._close())

    async def _listen(self) -> None:
        self._gate = asyncio.Event()
        self._gate.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, reuse_address=True)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> None:
        cut = list(self._connections)
        for connection in cut:
            connection.cancel()
        await asyncio.gather(*cut, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.get_running_loop().create_task(self._connect(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gate, writers = self._gate, [writer]
        try:
            there_reader, there_writer = await asyncio.open_connection(*self._to)
            writers.append(there_writer)
            await asyncio.gather(self._carry(reader, there_writer, gate), self._carry(there_reader, writer, gate))
        except OSError:
            # The server is not there, so neither is the connection.
            pass
        finally:
            for each in writers:
                each.transport.abort()

    async def _carry(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        while data := await source.read(65536):
            await gate.wait()
            to.write(data)
            await to.drain()
        to.write_eof()
