"""
The control channel: length-framed JSON over a unix socket, and its messages.

Producer and consumer: client and sidecar; the supervisor and its executor use the same framing.
A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON, an object with a `type`. A request carries an `id`
that its answers repeat; an event carries none.

What the messages are: `wire.control`, `wire.save_messages`, `wire.load_messages` (client -> sidecar, and the answers), `wire.events` (sidecar ->
client). This module knows a message as the object that JSON has; `wire.message` makes a class's instance of it.

Breaking: removing a message or a field, another meaning. Not breaking: a new message, a new optional field
(both sides ignore what they do not know).
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
"""Longest frame. A load request names every chunk (about 120 bytes each): this is room for two million of them."""
_LENGTH: Final = struct.Struct(">I")
RECV_BYTES: Final = 1 << 20

Message = dict[str, Any]


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
