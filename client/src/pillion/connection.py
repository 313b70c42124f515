"""
The client's end of the control channel: requests with bounded waits, and events from the sidecar.

Called from: `pillion.checkpointer` (any trainer thread). Owns: the socket and one reader thread. Standard library only.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any, Final, TypeVar

from pillion.errors import ErrorDocument, SidecarUnavailable
from pillion.wire import control, events, messages
from pillion.wire.message import Message, Request

_log = logging.getLogger(__name__)
A = TypeVar("A")

SEND_TIMEOUT_S: Final = 30.0
"""Timeout for one send. The supervisor's loop reads at once; after this time it is stopped or gone."""
SILENCE_WARNING_S: Final = 5.0
"""Silence of the sidecar, seconds, after which a request that holds up training logs a warning. The sidecar answers in milliseconds. If the
request must wait, the sidecar sends a notice every few seconds."""
JOIN_TIMEOUT_S: Final = 5.0
"""Timeout for the reader thread's end, after its socket was shut down."""

_LOST: Final[messages.Message] = {"type": "_lost"}
"""Stands for the end of the connection in the queue of a waiting request."""

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
"""All connections of this process. Its forked children close them."""


def _close_in_child() -> None:
    for link in list(_connections):
        link.close_in_child()
    _connections.clear()


# A data loader's worker may outlive its killed trainer. If it kept the connection open, the sidecar would not notice the trainer's death.
os.register_at_fork(after_in_child=_close_in_child)


def ask(path: str, request: Request[A], timeout_s: float) -> A | control.Failed:
    """
    Send the sidecar one of the requests in `control.OBSERVED`, which need no session, and return the answer.

    Blocks: up to `timeout_s`, for the connection and the answer together.

    Raises:
        SidecarUnavailable: nobody listens at `path`, or no readable answer came.
    """
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(timeout_s)
        decoder = messages.Decoder()
        try:
            sock.connect(path)
            sock.sendall(messages.encode({**request.to_document(), "id": 1}))
            while True:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                for answer in messages.receive(sock, decoder):
                    if answer.get("id") == 1 and (read := _answer(request, answer)) is not None:
                        return read
        except (OSError, EOFError, messages.BadFrame) as err:
            raise SidecarUnavailable(f"no answer from the sidecar at {path} within {timeout_s:.1f} s: {err}") from err


def _answer(request: Request[A], answer: messages.Message) -> A | control.Failed | None:
    """Return the decoded answer. None if only a newer client knows its type."""
    if answer["type"] == control.Failed.type:
        return control.Failed.from_document(answer)
    kind: Any = request.answers().get(answer["type"])
    read: A | None = None if kind is None else kind.from_document(answer)
    return read


class Connection:
    """
    One connection to the sidecar.

    Args:
        path: the control socket.
        connect_timeout_s: timeout for the connect.
        on_event: called in the reader thread for every message of `events.EVENTS`. It must not block.
        on_lost: called once, in the reader thread, when the sidecar is gone.
        peer_uid: the user that must own the listening process. None allows any user.

    Raises:
        SidecarUnavailable: nobody listens at `path`, or a process of another user does.
    """

    def __init__(
        self,
        path: str,
        *,
        connect_timeout_s: float,
        on_event: Callable[[Message], None],
        on_lost: Callable[[str], None],
        peer_uid: int | None = None,
    ) -> None:
        self._pid = os.getpid()
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as err:
            raise SidecarUnavailable(f"no socket to reach the sidecar at {path} with: {err}") from err
        _connections.add(self)
        self._sock.settimeout(connect_timeout_s)
        try:
            self._sock.connect(path)
            _, uid, _ = struct.unpack("iII", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError as err:
            self._sock.close()
            raise SidecarUnavailable(f"no sidecar listens at {path}: {err}") from err
        if peer_uid is not None and uid != peer_uid:
            self._sock.close()
            raise SidecarUnavailable(
                f"user {uid} listens at {path}, and not user {peer_uid}: it is no sidecar of this run"
            )
        self._sock.settimeout(None)
        # The socket bounds only sends. The reader waits until the connection ends, and sees EOF then.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_TIMEOUT_S))
        self._on_event, self._on_lost = on_event, on_lost
        self._ids = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[messages.Message]] = {}
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._closing = False
        self.silent = False
        """True after a request without an answer in time, until the next message. The sidecar is stopped, or hangs."""
        self._reader = threading.Thread(target=self._read, name="pillion-control", daemon=True)
        try:
            self._reader.start()
        except RuntimeError as err:
            self._sock.close()
            raise SidecarUnavailable(f"no thread to listen to the sidecar with: {err}") from err

    @property
    def lost(self) -> bool:
        return self._lost is not None

    def send(self, message: Message) -> None:
        """
        Send without waiting for an answer.

        Raises:
            SidecarUnavailable: the connection is gone.
        """
        self._send(message.to_document())

    def _send(self, document: messages.Message) -> None:
        frame = messages.encode(document)
        with self._lock:
            if self._lost is not None:
                raise SidecarUnavailable(self._lost)
            try:
                self._sock.sendall(frame)
            except OSError as err:
                # The socket may have sent half a frame, so the connection is useless. Later requests fail at once, without the reader's help.
                self._lost = f"the sidecar does not take messages: {err}"
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                raise SidecarUnavailable(self._lost) from err

    def request(self, request: Request[A], timeout_s: float) -> A:
        """
        Send a request, and wait for its one answer.

        Raises:
            SidecarUnavailable: the connection broke, or no answer came within `timeout_s`.
            PillionError: the sidecar answered with this error.
        """
        with contextlib.closing(self.stream(request, timeout_s)) as answers:
            return next(answers)

    def stream(self, request: Request[A], timeout_s: float, *, warns: bool = False) -> Generator[A]:
        """
        Send a request whose answer has several messages, and yield them. The caller closes the generator.

        Args:
            request: the request.
            timeout_s: timeout for each message.
            warns: whether a silence of SILENCE_WARNING_S is logged once, because the request holds up training.

        Raises: as `request`.
        """
        request_id = next(self._ids)
        answers: queue.SimpleQueue[messages.Message] = queue.SimpleQueue()
        self._waiting[request_id] = answers
        started = time.monotonic()
        try:
            self._send({**request.to_document(), "id": request_id})
            while True:
                try:
                    answer = self._next(answers, timeout_s, warn_about=request.type if warns else None)
                except queue.Empty:
                    waited = time.monotonic() - started
                    self.silent = True
                    raise SidecarUnavailable(
                        f"the sidecar gave no answer to {request.type!r} in {waited:.1f} s"
                    ) from None
                if answer is _LOST:
                    raise SidecarUnavailable(self._lost or "the sidecar is gone")
                read = _answer(request, answer)
                if isinstance(read, control.Failed):
                    raise ErrorDocument.from_document(read.error).to_exception()
                if read is not None:
                    yield read
        finally:
            self._waiting.pop(request_id, None)

    @staticmethod
    def _next(
        answers: queue.SimpleQueue[messages.Message], timeout_s: float, *, warn_about: str | None
    ) -> messages.Message:
        if warn_about is not None and timeout_s > SILENCE_WARNING_S:
            try:
                return answers.get(timeout=SILENCE_WARNING_S)
            except queue.Empty:
                timeout_s -= SILENCE_WARNING_S
                _log.warning(
                    "pillion: the sidecar has not answered %r for %.0f s, and training waits for it, %.0f s more at most",
                    warn_about,
                    SILENCE_WARNING_S,
                    timeout_s,
                )
        return answers.get(timeout=timeout_s)

    def close_in_child(self) -> None:
        """
        Close the inherited descriptor in a forked child, without a shutdown, which would end the parent's connection.

        Called from: the child, which has one thread. A thread that exists only in the parent may have held the lock at the fork, so the
        child gets a new lock.
        """
        self._lock = threading.Lock()
        self._closing = True
        self._lost = "the connection belongs to this process's parent"
        self._sock.close()

    def close(self) -> None:
        """End the connection. Pending requests fail. Blocks: up to JOIN_TIMEOUT_S. Idempotent."""
        if os.getpid() != self._pid:
            self.close_in_child()
            return
        self._closing = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._reader is not threading.current_thread():
            self._reader.join(JOIN_TIMEOUT_S)
        self._sock.close()

    def _read(self) -> None:
        decoder = messages.Decoder()
        reason = "the sidecar closed the connection"
        try:
            while True:
                for message in messages.receive(self._sock, decoder):
                    self.silent = False
                    waiting = self._waiting.get(message.get("id", 0))
                    if waiting is not None:
                        waiting.put(message)
                    elif "id" not in message and message["type"] in events.EVENTS:
                        self._on_event(events.EVENTS[message["type"]].from_document(message))
        except EOFError:
            pass
        except (OSError, messages.BadFrame) as err:
            reason = f"the control channel broke: {err}"
        except BaseException as err:  # a boundary: if this thread died silently, the session would never reconnect
            reason = f"the control channel broke: {type(err).__name__}: {err}"
            _log.exception("pillion: could not handle a message from the sidecar; reconnecting")
        with self._lock:
            reason = self._lost = self._lost or reason
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        for waiting in list(self._waiting.values()):
            waiting.put(_LOST)
        if not self._closing:
            self._on_lost(reason)


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
