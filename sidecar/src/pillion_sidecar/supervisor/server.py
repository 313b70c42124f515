"""
The control socket's server: one connection a trainer, frames in, messages to the supervisor, answers out.

Called from: `app`. A client that sends garbage is told so and disconnected; the others never notice.
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
"""Connections at once: a rank a processor on the largest nodes; this bounds what a broken loop can open. Who comes beyond it is refused."""
HELLO_TIMEOUT_S: Final = 30.0
"""Bound for the first message of a connection."""
WRITE_LIMIT_BYTES: Final = 64 * 1024**2
"""Unsent bytes to one client before it is dropped: its reader thread is stuck, and memory is bounded."""


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
        """Nothing comes from it any more, and the supervisor knows."""

    @property
    def gone(self) -> bool:
        """Whether its process has ended, whoever else holds its socket."""
        return self._peer.gone

    def watch(self) -> None:
        """Have the connection end when the trainer's process does, as if nobody else held its socket."""
        self._peer.watch(self._cut)

    def _cut(self) -> None:
        # What the trainer has said until its death is read first, then comes the end; and what forked children of it hold says nothing.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._peer.close()
        self.ended.set()

    def send(self, event: Message) -> None:
        """Queue an event; a client that takes none is dropped."""
        self._send(event.to_document())

    def _send(self, document: messages.Message) -> None:
        if self._writer.is_closing():
            return
        self._writer.write(messages.encode(document))
        if self._writer.transport.get_write_buffer_size() > WRITE_LIMIT_BYTES:
            _log.error("closing the connection of rank %d: it does not read its messages", self.rank)
            self._writer.transport.abort()

    def answer(self, number: int, answer: Message) -> None:
        """Answer the request of this number: `Request.id`."""
        self._send({**answer.to_document(), "id": number})

    def refuse(self, number: int, error: PillionError | ErrorDocument) -> None:
        document = error if isinstance(error, ErrorDocument) else ErrorDocument.from_exception(error)
        self.answer(number, control.Failed(error=document.to_document()))


class Handler(Protocol):
    """What the server calls; the supervisor implements it."""

    async def hello(self, client: TrainerConnection, message: control.Hello) -> None:
        """First message of a connection."""

    async def message(self, client: TrainerConnection, message: Message) -> None:
        """Any later one: of `control.TRAINERS`."""

    def observed(self, client: TrainerConnection, request: Request[Any]) -> None:
        """One of `control.OBSERVED`, from a connection that said no hello."""

    async def lost(self, client: TrainerConnection) -> None:
        """The connection ended, by goodbye or by death."""


class ControlServer:
    """
    The listening socket.

    Owns: the socket file; it is removed at close.
    """

    def __init__(self, path: str, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """
        Listen. A file left by a dead sidecar is replaced; the caller holds the directory's lock.

        Raises:
            OSError: the path is too long (107 bytes), or the directory cannot be written.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        listening = socket.socket(socket.AF_UNIX)
        # Trainer and sidecar may run as different users; the folder's mode guards it. By the umask, as a change of the mode by name would
        # follow what a trainer could have put there meanwhile.
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
        """Take no new connection. One that the kernel took already is cut, and its client looks for our successor."""
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
        if len(self._clients) >= CLIENT_LIMIT * 2:  # not even a refusal: those who wait for one are as many
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
            # The loop ends, and this task with it either way. Python 3.11's streams log a traceback for one that says so.
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
            # Before all else: what another protocol says besides may have another meaning.
            theirs = document.get("version")
            if not isinstance(theirs, int):
                raise messages.BadFrame("'hello': the field 'version' must be a number")
            if theirs != wire.PROTOCOL_VERSION:
                raise ProtocolMismatch(ours=wire.PROTOCOL_VERSION, theirs=theirs)
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
        """Take a message; the sender gets the reason why it is not taken."""
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
    """What the answer to a request repeats: a number, and whatever else a stranger puts there is not sent back."""
    number = document.get("id", 0)
    return number if isinstance(number, int) else 0


def _read(kind: type[M], document: messages.Message) -> M:
    numbered = {**document, "id": _number(document)} if issubclass(kind, Request) else document
    return kind.from_document(numbered)
