"""
The whole of: as much of HTTP/1.1 as an object store's client speaks, read and written by hand, so that a fault can strike between two bytes.

Called from: `fault_proxy`, `fake_gcs`.
Must never: be a server for anything but loopback, or keep a connection longer than its test.
"""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Final, Self

from support.background import Background

MAX_HEAD_BYTES: Final = 1 << 16
"""Maximum size of the head of a request or an answer."""
CHUNK_BYTES: Final = 1 << 16
"""Maximum size of one write."""
_NO_BODY: Final = (204, 304)

Headers = list[tuple[str, str]]


def header(headers: Headers, name: str) -> str | None:
    """The first value of that name, whatever its case."""
    return next((value for each, value in headers if each.lower() == name), None)


def without(headers: Headers, *names: str) -> Headers:
    """The headers but those of these names."""
    return [(name, value) for name, value in headers if name.lower() not in names]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A request; its body is read apart."""

    method: str
    target: str
    headers: Headers
    body: bytes = b""

    @property
    def num_body_bytes(self) -> int:
        """Bytes of the body, as the client said; 0 for a chunked one."""
        return int(header(self.headers, "content-length") or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer, whole."""

    status: int
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    def head(self, num_body_bytes: int) -> bytes:
        """
        What goes before the body.

        Args:
            num_body_bytes: what Content-Length says, where the answer has none of its own.
        """
        headers = without(self.headers, "connection", "transfer-encoding")
        if header(headers, "content-length") is None and self.status not in _NO_BODY:
            headers = [*headers, ("Content-Length", str(num_body_bytes))]
        return _head(f"HTTP/1.1 {self.status} -", headers)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """
    The head of the next request on a connection; None: the client has closed it. Blocks: until there is one.

    Raises:
        OSError: the connection broke.
    """
    read = await _read_head(reader)
    if read is None:
        return None
    (method, target, _), headers = read[0].split(" ", 2), read[1]
    return Request(method=method, target=target, headers=headers)


async def read_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> Request:
    """
    The request with its body; a chunked one becomes one of known length. Blocks: until the client has sent it.

    Raises:
        OSError: the connection broke.
    """
    headers = request.headers
    if (header(headers, "expect") or "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        headers = without(headers, "expect")
    if (header(headers, "transfer-encoding") or "").lower() == "chunked":
        body = await _read_chunked(reader)
        headers = [*without(headers, "transfer-encoding"), ("Content-Length", str(len(body)))]
    else:
        body = await reader.readexactly(request.num_body_bytes)
    return replace(request, headers=headers, body=body)


async def ask(host: str, port: int, request: Request) -> Answer:
    """
    A server's answer to a request, on a connection of its own. Blocks: until it is there.

    Raises:
        OSError: the server is not there, or broke the connection.
    """
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_HEAD_BYTES)
    try:
        headers = [*without(request.headers, "connection"), ("Connection", "close")]
        writer.write(_head(f"{request.method} {request.target} HTTP/1.1", headers))
        writer.write(request.body)
        await writer.drain()
        read = await _read_head(reader)
        if read is None:
            raise ConnectionResetError("the server closed the connection and answered nothing")
        status, headers = int(read[0].split(" ")[1]), read[1]
        if request.method == "HEAD" or status in _NO_BODY:
            return Answer(status=status, headers=headers)
        if (header(headers, "transfer-encoding") or "").lower() == "chunked":
            return Answer(status=status, headers=headers, body=await _read_chunked(reader))
        length = header(headers, "content-length")
        body = await (reader.read() if length is None else reader.readexactly(int(length)))
        return Answer(status=status, headers=headers, body=body)
    finally:
        writer.transport.abort()


async def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """
    Write what the client takes. Blocks: until it has taken most of it.
    """
    for start in range(0, len(data), CHUNK_BYTES):
        writer.write(data[start : start + CHUNK_BYTES])
        await writer.drain()


class Server:
    """
    A server on a free port of the loopback, while in ``with``; in a thread of its own. Each connection has one request after another.
    """

    def __init__(self) -> None:
        self.port = 0
        self._background = Background()
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._background.__enter__()
        self._server = self._background.run(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._background.call(self._server.close)
        # It cancels every connection, each of which closes its socket.
        self._background.__exit__()

    async def serve(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """
        Answer one request, of which the head is read. False: the connection is over.

        Raises:
            OSError: the connection broke; nothing is left to do for it.
        """
        raise NotImplementedError

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=MAX_HEAD_BYTES)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        # A task that is cancelled before its first step runs no `finally` of its own.
        connection.add_done_callback(lambda _: writer.transport.abort())

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Draining waits until the kernel has all of it: a fault that breaks the connection next must not take back what was sent.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            while (request := await read_request(reader)) is not None:
                if not await self.serve(request, reader, writer):
                    return
        except (OSError, EOFError):
            # The client has gone, as clients do; or a fault ended it in the middle of a body.
            pass


def _head(first: str, headers: Headers) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, Headers] | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as err:
        if err.partial:
            raise ConnectionResetError("the connection ended within a head") from err
        return None
    first, *lines = text[:-4].split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return first, [(name, value.strip()) for name, _, value in pairs]


async def _read_chunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    # Trailers, of which we have no use, end with an empty line.
    while (await reader.readline()).strip():
        pass
    return body
