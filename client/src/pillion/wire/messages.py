"""
The framing of the control channel: length-framed JSON over a unix socket.

Producer and consumer: client and sidecar. The supervisor and its executor use the same framing.
A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON: an object with a `type`. A request has an `id`, which its answers
repeat. An event has none.

The messages are defined in `wire.control`, `wire.save_messages`, `wire.load_messages` (client -> sidecar, and the answers) and `wire.events`
(sidecar -> client). This module reads a message as a JSON object. `wire.message` turns the object into an instance of a class.

Breaking: removing a message or a field, or changing a meaning. Not breaking: a new message or a new optional field, as both sides ignore
unknown ones.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
"""Maximum length of a frame. A load request names every chunk in about 120 bytes, so two million chunks fit."""
_LENGTH: Final = struct.Struct(">I")
RECV_BYTES: Final = 1 << 20
"""Maximum bytes of one read from the socket."""

Message = dict[str, Any]


class BadFrame(ValueError):
    """The peer sent bytes that are not a frame of this protocol. The receiver closes the connection."""


def encode(message: Mapping[str, object]) -> bytes:
    """
    Return the message as one frame.

    Raises:
        BadFrame: the message is longer than MAX_FRAME_BYTES.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a byte stream into messages. A chunk of the stream may end anywhere within a frame."""

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> Iterator[Message]:
        """
        Yield every message that is complete with these bytes.

        Raises:
            BadFrame: a length over the limit, or a body that is not a UTF-8 JSON object with a `type`.
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
    Read the bytes that have arrived, and return the complete messages.

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
