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
"""Bound of one send. The supervisor's loop reads at once; this long means that it is stopped or gone."""
SILENCE_TOLD_S: Final = 5.0
"""A request that holds training up says so after this long: the sidecar answers it in milliseconds, and tells every few seconds that it waits."""
JOIN_TIMEOUT_S: Final = 5.0
"""Bound for the reader thread to end once its socket is shut down."""

_LOST: Final[messages.Message] = {"type": "_lost"}

_made: weakref.WeakSet[Connection] = weakref.WeakSet()
"""All of this process, for its forked children to close."""


def _let_go_in_child() -> None:
    for link in list(_made):
        link.let_go()
    _made.clear()


# A data loader's worker that outlives its killed trainer would keep the connection open: the sidecar would not see the death.
os.register_at_fork(after_in_child=_let_go_in_child)


def ask(path: str, request: Request[A], timeout_s: float) -> A | control.Failed:
    """
    Ask the sidecar one of `control.OBSERVED`, without a session; the answer.

    Blocks: up to `timeout_s`, for the connection and the answer together.

    Raises:
        SidecarUnavailable: nobody listens at `path`, or no answer came that can be read.
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
    """What an answer says; None: it is of a type that only a newer client knows."""
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
        connect_timeout_s: bound for the connect.
        on_event: called in the reader thread for every message of `events.EVENTS`. It must not block.
        on_lost: called once, in the reader thread, when the sidecar is gone.
        peer_uid: the user that must listen there; None: anyone.

    Raises:
        SidecarUnavailable: nobody listens at `path`, or another user.
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
        _made.add(self)
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
        # Only sends are bounded by the socket: the reader waits for as long as the connection lives, and EOF ends it.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_TIMEOUT_S))
        self._on_event, self._on_lost = on_event, on_lost
        self._ids = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[messages.Message]] = {}
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._closing = False
        self.silent = False
        """A request had no answer within its bound, and nothing has come since: the sidecar is stopped, or hangs."""
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
                # Half a frame may be out. Whoever asks from here on is answered at once, also before the reader has seen the end.
                self._lost = f"the sidecar does not take messages: {err}"
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                raise SidecarUnavailable(self._lost) from err

    def request(self, request: Request[A], timeout_s: float) -> A:
        """
        Send, and wait for the one answer.

        Raises:
            SidecarUnavailable: the connection broke, or no answer came within `timeout_s`.
            PillionError: the sidecar's answer is an error; raised as what it is.
        """
        with contextlib.closing(self.stream(request, timeout_s)) as answers:
            return next(answers)

    def stream(self, request: Request[A], timeout_s: float, *, tells_silence: bool = False) -> Generator[A]:
        """
        Like `request`, for an answer of several messages; `timeout_s` bounds the wait for each. Close it when done.

        Args:
            tells_silence: warn once, after SILENCE_TOLD_S without a message, that training is held up.
        """
        request_id = next(self._ids)
        answers: queue.SimpleQueue[messages.Message] = queue.SimpleQueue()
        self._waiting[request_id] = answers
        started = time.monotonic()
        try:
            self._send({**request.to_document(), "id": request_id})
            while True:
                try:
                    answer = self._next(answers, timeout_s, warn_of=request.type if tells_silence else None)
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
        answers: queue.SimpleQueue[messages.Message], timeout_s: float, *, warn_of: str | None
    ) -> messages.Message:
        if warn_of is not None and timeout_s > SILENCE_TOLD_S:
            try:
                return answers.get(timeout=SILENCE_TOLD_S)
            except queue.Empty:
                timeout_s -= SILENCE_TOLD_S
                _log.warning(
                    "pillion: the sidecar has not answered %r for %.0f s, and training waits for it, %.0f s more at most",
                    warn_of,
                    SILENCE_TOLD_S,
                    timeout_s,
                )
        return answers.get(timeout=timeout_s)

    def let_go(self) -> None:
        """
        Close what a forked child has inherited, and nothing more: a shutdown would end the connection of its parent.

        Called from: the child, which has no thread but its own; the lock may be held by one that exists in the parent alone.
        """
        self._lock = threading.Lock()
        self._closing = True
        self._lost = "the connection is that of this process's parent"
        self._sock.close()

    def close(self) -> None:
        """Shut the connection; pending requests fail. Blocks: up to JOIN_TIMEOUT_S. Idempotent."""
        if os.getpid() != self._pid:
            self.let_go()
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
        except (
            BaseException
        ) as err:  # a boundary: a session that nobody listens to would never look for another sidecar
            reason = f"the control channel broke: {type(err).__name__}: {err}"
            _log.exception("pillion: a message of the sidecar was not understood; the connection is made again")
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
