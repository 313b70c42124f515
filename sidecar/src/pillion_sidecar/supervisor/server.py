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
from collections.abc import Mapping
from typing import Any, Final, Protocol

from pillion.errors import ErrorDocument, InternalError, PillionError, SidecarError
from pillion.wire import messages
from pillion_sidecar.supervisor.peer import Peer

_log = logging.getLogger(__name__)

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

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue a message; a client that takes none is dropped."""
        if self._writer.is_closing():
            return
        self._writer.write(messages.encode(message))
        if self._writer.transport.get_write_buffer_size() > WRITE_LIMIT_BYTES:
            _log.error("closing the connection of rank %d: it does not read its messages", self.rank)
            self._writer.transport.abort()

    def answer(self, request: messages.Message, message: Mapping[str, Any]) -> None:
        # A number, as requests have it: whatever else a stranger puts there is not sent back.
        number = request.get("id", 0)
        self.send({**message, "id": number if isinstance(number, int) else 0})

    def refuse(self, request: messages.Message, error: PillionError | ErrorDocument) -> None:
        document = error if isinstance(error, ErrorDocument) else ErrorDocument.from_exception(error)
        self.answer(request, {"type": "failed", "error": document.to_document()})


class Handler(Protocol):
    """What the server calls; the supervisor implements it."""

    async def hello(self, client: TrainerConnection, message: messages.Message) -> None:
        """First message of a connection."""

    async def message(self, client: TrainerConnection, message: messages.Message) -> None:
        """Any later one."""

    def observed(self, client: TrainerConnection, message: messages.Message) -> None:
        """One of `messages.OBSERVER_MESSAGES`, from a connection that said no hello."""

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
                        client.refuse(message, SidecarError(text))
                        return
                    if greeted:
                        await self._dispatch(client, message)
                    elif message["type"] == "hello":
                        await self._greet(client, message)
                        greeted = True
                    elif message["type"] in messages.OBSERVER_MESSAGES:
                        self._handler.observed(client, message)
                    else:
                        raise messages.BadFrame(f"the first message must be hello, not {message['type']!r:.40}")
        except messages.BadFrame as err:
            _log.warning("invalid message from pid %d: %s", client.pid, err)
            client.send({"type": "failed", "id": 0, "error": ErrorDocument("SidecarError", str(err)).to_document()})
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

    async def _greet(self, client: TrainerConnection, message: messages.Message) -> None:
        try:
            await self._handler.hello(client, message)
        except messages.BadFrame as err:
            client.refuse(message, SidecarError(str(err)))
        except PillionError as err:
            client.refuse(message, err)
        except Exception as err:  # a boundary: a trainer that is not told why would come again at once, for a minute
            _log.exception("the hello of pid %d failed", client.pid)
            client.refuse(message, InternalError(f"{type(err).__name__}: {err}"))

    async def _dispatch(self, client: TrainerConnection, message: messages.Message) -> None:
        try:
            await self._handler.message(client, message)
        except messages.BadFrame as err:
            client.refuse(message, SidecarError(str(err)))
        except PillionError as err:
            client.refuse(message, err)
        except Exception as err:  # a boundary: one bad request must not take the connection of a training job
            _log.exception("request %s of rank %d failed", message["type"], client.rank)
            client.refuse(message, InternalError(f"{type(err).__name__}: {err}"))
