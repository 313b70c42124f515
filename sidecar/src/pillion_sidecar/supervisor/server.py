"""
The server of the control socket: reads frames from each connection, hands messages to the supervisor, and sends the answers.

Called from: `app`. A client that sends an invalid frame gets an error and is disconnected. Other clients are not affected.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

from pillion import wire
from pillion.errors import ErrorDocument, InternalError, PillionError, ProtocolMismatch, SidecarError
from pillion.wire import control, messages
from pillion.wire.message import Message, Request
from pillion_sidecar.supervisor.peer import Peer

_log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

CLIENT_LIMIT: Final = 512
"""Maximum connections at the same time: one rank for each processor of the largest nodes. It bounds a program that opens connections in a
loop. Further connections are refused."""
HELLO_TIMEOUT_S: Final = 30.0
"""Timeout for the first message of a connection."""
WRITE_LIMIT_BYTES: Final = 64 * 1024**2
"""Maximum unsent bytes to one client, which bounds memory. A client with more is disconnected, because its reader thread hangs."""


class TrainerConnection:
    """One connected trainer, as the supervisor sees it."""

    _numbers = itertools.count(1)

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.number = next(self._numbers)
        self.rank = -1
        self.said_goodbye = False
        self._socket = writer.get_extra_info("socket")
        self._peer = Peer(self._socket)
        self.pid, self.uid = self._peer.pid, self._peer.uid
        self.ended = asyncio.Event()
        """Set when the connection has ended and the supervisor has handled that."""

    @property
    def gone(self) -> bool:
        """Whether the trainer's process has ended, even if a forked child holds its socket."""
        return self._peer.gone

    def watch(self) -> None:
        """End the connection when the trainer's process ends, even if a forked child holds its socket."""
        self._peer.watch(self._cut)

    def _cut(self) -> None:
        # The messages that the trainer sent before its death are still read. Then the reader gets EOF.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._peer.close()
        self.ended.set()

    def send(self, event: Message) -> None:
        """Queue an event. A client with more than WRITE_LIMIT_BYTES unsent is disconnected."""
        self._send(event.to_document())

    def _send(self, document: messages.Message) -> None:
        if self._writer.is_closing():
            return
        self._writer.write(messages.encode(document))
        if self._writer.transport.get_write_buffer_size() > WRITE_LIMIT_BYTES:
            _log.error("closing the connection of rank %d: it does not read its messages", self.rank)
            self._writer.transport.abort()

    def answer(self, number: int, answer: Message) -> None:
        """Answer the request whose `Request.id` is `number`."""
        self._send({**answer.to_document(), "id": number})

    def refuse(self, number: int, error: PillionError | ErrorDocument) -> None:
        """Answer the request whose `Request.id` is `number` with an error."""
        document = error if isinstance(error, ErrorDocument) else ErrorDocument.from_exception(error)
        self.answer(number, control.Failed(error=document.to_document()))


class Handler(Protocol):
    """Handles the messages that the server reads. The supervisor implements it."""

    async def hello(self, client: TrainerConnection, message: control.Hello) -> None:
        """Handle the hello of a trainer, the first message of its connection."""

    async def message(self, client: TrainerConnection, message: Message) -> None:
        """Handle a later message of a trainer (`control.TRAINERS`)."""

    def observed(self, client: TrainerConnection, request: Request[Any]) -> None:
        """Handle a request of a connection without a hello (`control.OBSERVED`)."""

    async def lost(self, client: TrainerConnection) -> None:
        """Handle the end of a trainer's connection, after a goodbye or without one."""


class ControlServer:
    """
    The listening socket.

    Owns: the socket file, until `close`.
    """

    def __init__(self, path: str, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """
        Listen. Replace the socket file of a dead sidecar. The caller holds the directory's lock.

        Raises:
            OSError: the path is too long (107 bytes), or the directory cannot be written.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        listening = socket.socket(socket.AF_UNIX)
        # Every user may connect, as trainer and sidecar may be different users. The directory's mode keeps others away. The umask sets
        # the mode, because chmod by name would follow a link that a trainer could have put there.
        umask = os.umask(0o111)
        try:
            listening.bind(self._path)
        except BaseException:
            listening.close()
            raise
        finally:
            os.umask(umask)
        self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=messages.RECV_BYTES)

    @property
    def num_connections(self) -> int:
        return len(self._clients)

    def stop_listening(self) -> None:
        """Accept no more connections. Connections that only the kernel has accepted are cut; their clients connect to the successor."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        self.stop_listening()
        for writer in list(self._clients):
            writer.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= CLIENT_LIMIT * 2:  # CLIENT_LIMIT connections already wait for their refusal
            writer.close()
            return
        too_many = len(self._clients) >= CLIENT_LIMIT
        self._clients.add(writer)
        client = TrainerConnection(writer)
        client.watch()
        greeted = False
        decoder = messages.Decoder()
        try:
            while True:
                timeout = None if greeted else HELLO_TIMEOUT_S
                data = await asyncio.wait_for(reader.read(messages.RECV_BYTES), timeout)
                if not data:
                    break
                for message in decoder.feed(data):
                    if too_many:
                        text = f"{CLIENT_LIMIT} connections are open, and more are not allowed: too many ranks on one node, or a program that opens one after another"
                        client.refuse(_number(message), SidecarError(text))
                        return
                    if greeted:
                        await self._dispatch(client, message)
                    elif message["type"] == control.Hello.type:
                        await self._greet(client, message)
                        greeted = True
                    elif message["type"] in control.OBSERVED:
                        request: Any = _read(control.OBSERVED[message["type"]], message)
                        self._handler.observed(client, request)
                    else:
                        raise messages.BadFrame(f"the first message must be hello, not {message['type']!r:.40}")
        except messages.BadFrame as err:
            _log.warning("invalid message from pid %d: %s", client.pid, err)
            client.refuse(0, SidecarError(str(err)))
        except (ConnectionError, TimeoutError):
            pass
        except asyncio.CancelledError:
            # The event loop ends. Python 3.11's streams would log a traceback if this task raised the cancellation.
            pass
        finally:
            self._clients.discard(writer)
            try:
                if greeted:
                    await self._handler.lost(client)
            finally:
                client.close()
                writer.close()

    async def _greet(self, client: TrainerConnection, document: messages.Message) -> None:
        async def greet() -> None:
            # Checked first, because the other fields may have another meaning in another version.
            version = document.get("version")
            if not isinstance(version, int):
                raise messages.BadFrame("'hello': the field 'version' must be a number")
            if version != wire.PROTOCOL_VERSION:
                raise ProtocolMismatch(own_version=wire.PROTOCOL_VERSION, peer_version=version)
            await self._handler.hello(client, _read(control.Hello, document))

        await self._or_refuse(client, document, greet)

    async def _dispatch(self, client: TrainerConnection, document: messages.Message) -> None:
        kind = control.TRAINERS.get(document["type"])
        if kind is None:
            _log.debug("rank %d sent the unknown message %s", client.rank, document["type"])
            return
        await self._or_refuse(client, document, lambda: self._handler.message(client, _read(kind, document)))

    async def _or_refuse(
        self, client: TrainerConnection, document: messages.Message, take: Callable[[], Awaitable[None]]
    ) -> None:
        """Call `take`, which handles the message. Answer its error to the sender."""
        number = _number(document)
        try:
            await take()
        except messages.BadFrame as err:
            client.refuse(number, SidecarError(str(err)))
        except PillionError as err:
            client.refuse(number, err)
        except Exception as err:  # a boundary: one bad request must not take the connection of a training job
            _log.exception("request %s of rank %d, process %d, failed", document["type"], client.rank, client.pid)
            client.refuse(number, InternalError(f"{type(err).__name__}: {err}"))


def _number(document: messages.Message) -> int:
    """Return the id of a request. 0 if it is not a number, so that nothing else is repeated in the answer."""
    number = document.get("id", 0)
    return number if isinstance(number, int) else 0


def _read(kind: type[M], document: messages.Message) -> M:
    numbered = {**document, "id": _number(document)} if issubclass(kind, Request) else document
    return kind.from_document(numbered)
