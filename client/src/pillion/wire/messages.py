"""
The control channel: length-framed JSON over a unix socket, and its messages.

Producer and consumer: client and sidecar; the supervisor and its executor use the same framing.
A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON, an object with a `type`. A request carries an `id`
that its answers repeat; an event carries none.

Client -> sidecar: hello, reserve, claim, sealed, abandon, load, announce, decline, announce_change, decline_change, latest,
                   goodbye.
Sidecar -> client: welcome, reserved, claimed, refused, load_progress, loaded, failed (answers);
                   committed, save_failed, save_failures, save_now, announced, declined, policy, change_announced, change_declined, notice, end
                   (events).

A `load` is answered with `load_begin` (slot, dtypes; missing: names that are left out of the layout), `load_progress` (items that may be copied),
again from `load_begin` on where a checkpoint turns out corrupt, and with `loaded`; the client ends it with `load_done`. `strict: false` lets names be
missing; `find: true` asks for the choice alone, and is answered with `loaded` at once. `path` names the directory of the one checkpoint to load; a
sidecar of before that loads from the root says so in its answer's `path`.

`policy` says what the sidecar goes by now (trigger, retention, drain, suspend). When saves are due changes at a step that rank 0
then names with `announce_change`, all ranks hear as `change_announced`, and one that is past it declines: `pillion.cadence`.

`end` says that the pod ends and the last save is on storage: a trainer that has no SIGTERM handler of its own ends (`pillion.stopping`).

A connection begins with `hello`, and is then a trainer's, or with a message of an observer, and may then send more of those
only: `ping` (answered with `pong` by the supervisor's loop), `status` (its counters and saves), `policy` (what it goes by, for
ranks that are about to agree on who they are), `notify` (the pod is terminating: the trainers are asked for a save; answered
with `notified` at once). Whoever may open the socket may send them.

A save that a rank could not stage is told at once, by `save_failed` to the others. Where that rank's `abandon` says `gathers: true`, that
event says `more: true`, and `save_failures` follows to all ranks, within seconds, with the failures of all. `welcome` says `gathers` where it does.

Breaking: removing a message or a field, another meaning. Not breaking: a new message, a new optional field
(both sides ignore what they do not know).
"""

from __future__ import annotations

import json
import reprlib
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
"""Longest frame. A load request names every chunk (about 120 bytes each): this is room for two million of them."""
_LENGTH: Final = struct.Struct(">I")
RECV_BYTES: Final = 1 << 20
OBSERVER_MESSAGES: Final = frozenset({"ping", "status", "policy", "notify"})
"""What a process that is no trainer may say, without a hello."""

Message = dict[str, Any]
T = TypeVar("T")


class BadFrame(ValueError):
    """The peer sent something that is not a frame of this protocol; the connection is closed."""


def encode(message: Mapping[str, object]) -> bytes:
    """
    One frame.

    Raises:
        BadFrame: the message is longer than MAX_FRAME_BYTES.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a byte stream into messages, however the stream was split."""

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> Iterator[Message]:
        """
        Yield every message that is whole now.

        Raises:
            BadFrame: a length over the limit, no UTF-8, no JSON, no object, no `type`.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self._max_frame_bytes:
                raise BadFrame(f"a frame of {length} bytes; at most {self._max_frame_bytes} are allowed")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield parse(body)


def parse(body: bytes) -> Message:
    """
    Read one frame's body.

    Raises:
        BadFrame: see `Decoder.feed`.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as err:  # ValueError: no UTF-8, no JSON, or a number of too many digits
        raise BadFrame(f"not JSON: {err}") from err
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise BadFrame("not a message: an object with a `type` is expected")
    return message


def field(message: Mapping[str, object], name: str, kind: type[T], default: T | None = None) -> T:
    """
    A field of a message, with its type checked; bool does not pass for int.

    Raises:
        BadFrame: it is missing (and has no default) or of another type.
    """
    value = message.get(name, default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as err:
            raise BadFrame(f"{message.get('type')!r:.80}: the field {name!r} is too large") from err
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        # reprlib: what came may be nested as deep as the reader of JSON goes.
        raise BadFrame(
            f"{message.get('type')!r:.80}: the field {name!r} must be {kind.__name__}, not {reprlib.repr(value)}"
        )
    return value


def optional_field(message: Mapping[str, object], name: str, kind: type[T]) -> T | None:
    """Like `field`, where a missing or null field is None."""
    return None if message.get(name) is None else field(message, name, kind)


def receive(sock: socket.socket, decoder: Decoder) -> list[Message]:
    """
    Read what is there.

    Blocks: until at least one byte arrives, within the socket's timeout.

    Raises:
        EOFError: the peer closed the connection.
        BadFrame: see `Decoder.feed`.
        TimeoutError: nothing arrived within the socket's timeout.
    """
    data = sock.recv(RECV_BYTES)
    if not data:
        raise EOFError("the peer closed the control channel")
    return list(decoder.feed(data))
