"""
A client of the job's TCPStore that speaks its protocol itself, so that a pod of several need not import torch for it (3 s, 300 MB).

Called from: `executor.exchange.tcpstore`. The protocol has no version. It is the same in torch 2.6 and 2.15, with and without libuv, for what this module asks; newer
releases have added to its end. `StoreClient.connect` tries every request before it is believed; where one is answered otherwise, `executor.exchange.torch_store` takes torch's own client.
Source: PyTorch, torch/csrc/distributed/c10d/TCPStore.cpp and TCPStoreBackend.hpp. Numbers are little-endian, as on all machines that have torch for Linux.

    request   a byte (`Query`), then its arguments; a text: its length in 8 bytes, then UTF-8; a list: its length in 8 bytes, then texts
    answer    see the methods; SET has none
"""

from __future__ import annotations

import contextlib
import enum
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

ANSWER_TIMEOUT_S: Final = 120.0
"""Timeout for an answer of the store. Longer than the watchdog's, which says what is waited for and takes the exchange to storage."""
PIECE_S: Final = 1.0
"""Length of the slices of a wait for the store. Between two of them the caller is asked whether anybody still waits."""
RETRY_PAUSE_S: Final = 0.2
"""Pause between two attempts to connect: the store of a new session may still be starting."""
SHORTEST_S: Final = 0.001
"""Minimum timeout of a wait for a key. A socket takes 0 for no wait at all, and the store is to answer."""
MAX_VALUE_BYTES: Final = 64 * 1024**2
"""Maximum bytes of a value that is read. Pillion writes no longer ones (`tcpstore.PIECE_BYTES`), so a longer one means that the stream is out of step."""
CONNECT_PIECE_S: Final = 5.0
"""Timeout of one attempt to connect, between two looks."""
RECEIVED_BYTES: Final = 1 << 16
"""Maximum bytes of one read from the connection."""
MAX_AHEAD: Final = 256
"""Maximum requests that are sent before the first of their answers is read: some 30 KiB, which the buffers of a connection hold in both directions."""
MAGIC: Final = 0x3C85F7CE
"""What a client says first. Another number, and the store closes the connection."""
KEY_PREFIX: Final = "/"
"""What every client of torch puts in front of every key."""


class Query(enum.IntEnum):
    """The requests of the protocol that are used here."""

    VALIDATE = 0
    SET = 1
    GET = 3
    ADD = 4
    CHECK = 5
    WAIT = 6
    DELETE_KEY = 8
    MULTI_GET = 10
    CANCEL_WAIT = 12
    PING = 13


READY: Final = 0
"""Answer to CHECK if all keys are there, and to WAIT as soon as they are."""
CANCELLED: Final = 1
"""Answer to CANCEL_WAIT."""


class StoreGone(RuntimeError):
    """The connection to the store is lost, or the store does not answer."""


class StoreTimeout(RuntimeError):
    """A key did not appear in time."""


class NotUnderstood(StoreGone):
    """What answers at the store's address does not speak this protocol."""


class Store(Protocol):
    """What the exchange asks of a store. Every call may raise StoreGone. Keys are below the session's prefix."""

    def set(self, key: str, value: str) -> None:
        """Write a value. It is not acknowledged."""

    def put(self, key: str, value: str) -> None:
        """Write a value. Returns when the store has answered."""

    def get(self, key: str) -> bytes:
        """Return a value. Raises StoreTimeout if there is none after ANSWER_TIMEOUT_S."""

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Return the values of keys that are all there."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which begins with 0. Return it."""

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        """Wait until all keys are there. Raises StoreTimeout. Not sliced: the exchange waits in pieces itself."""

    def delete_key(self, key: str) -> bool:
        """Delete a key. Return whether it was there."""

    def delete_keys(self, keys: Sequence[str]) -> None:
        """Delete keys, whether they are there or not."""

    def close(self) -> None:
        """Close the connection. Idempotent. Later calls raise StoreGone."""


class StoreClient:
    """
    One connection to a store. Implements `Store`. Thread-safe; one request at a time, so a wait keeps the others waiting.

    Args:
        connection: to the store.
        prefix: what is put in front of every key.
        look: called at least each PIECE_S of a wait for an answer. What it raises ends the wait, and the connection.
        timeout_s: timeout for each answer.

    Owns: the connection, until `close`.
    """

    def __init__(
        self, connection: socket.socket, prefix: str, *, look: Callable[[], None], timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        connection.settimeout(PIECE_S)
        self._connection = connection
        self._look = look
        self._timeout_s = timeout_s
        self._prefix = f"{KEY_PREFIX}{prefix}/"
        self._lock = threading.Lock()
        self._unread = bytearray()
        """What the store has sent beyond the answer that is read: the next ones."""
        self._broken = ""
        """Why the connection cannot be used any more: after a lost answer, the next one would be taken for it."""

    @classmethod
    def connect(
        cls, host: str, port: int, prefix: str, *, timeout_s: float, look: Callable[[], None] = lambda: None
    ) -> StoreClient:
        """
        Connect to a store, and try every request on a key of the prefix. Opens no port.

        Blocks: up to `timeout_s` for the connection and each of the first answers. An address that refuses is tried again within it.

        Raises:
            StoreGone: nothing answers at this address in time.
            NotUnderstood: the answers are not those of this protocol.
        """
        client = cls(_connected(host, port, timeout_s, look), prefix, look=look, timeout_s=timeout_s)
        try:
            client._try_all()
        except BaseException:  # also a request to stop: the connection is not left to the garbage collector
            client.close()
            raise
        client._timeout_s = ANSWER_TIMEOUT_S
        return client

    def _try_all(self) -> None:
        name = f"hello/{secrets.token_hex(8)}"
        nonce = secrets.randbits(32)
        try:
            self._send(
                bytes([Query.VALIDATE]) + struct.pack("<I", MAGIC) + bytes([Query.PING]) + struct.pack("<I", nonce)
            )
            answers: list[object] = [struct.unpack("<I", self._receive(4))[0]]
            self.set(name, "x")
            answers += [self.check([name]), self.get(name), self.multi_get([name]), self.delete_key(name)]
            answers += [self.check([name]), self.add(name, 2), self.delete_key(name)]
            self.put(name, "y")
            answers.append(self.get(name))
            self.delete_keys([name, name])
            with contextlib.suppress(StoreTimeout):
                self.wait([name], 0.001)
                answers.append("a key that is not there was waited for and came")
        except StoreGone as err:
            if isinstance(err.__cause__, TimeoutError):
                raise
            raise NotUnderstood(f"the store does not answer as torch's does: {err}") from err
        if answers != [nonce, True, b"x", [b"x"], True, False, 2, True, b"y"]:
            raise NotUnderstood(f"the store answers otherwise than torch's: {answers!r:.200}")

    # --- Store -------------------------------------------------------------------------------------------------------

    def set(self, key: str, value: str) -> None:
        with self._request(Query.SET, self._text(key) + _packed(value)):
            pass

    def put(self, key: str, value: str) -> None:
        # `SET` has no answer. Both requests are in one packet, and the store takes them in their order.
        text = self._text(key)
        with self._request(Query.SET, text + _packed(value) + bytes([Query.CHECK]) + struct.pack("<Q", 1) + text):
            self._receive(1)

    def get(self, key: str) -> bytes:
        # torch's client waits first as well: a store closes the connection of a client that gets what is not there.
        self.wait([key], ANSWER_TIMEOUT_S)
        with self._request(Query.GET, self._text(key)):
            return self._value()

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        with self._request(Query.MULTI_GET, self._texts(keys)):
            return [self._value() for _ in keys]

    def add(self, key: str, amount: int) -> int:
        with self._request(Query.ADD, self._text(key) + struct.pack("<q", amount)):
            return int(struct.unpack("<q", self._receive(8))[0])

    def check(self, keys: Sequence[str]) -> bool:
        with self._request(Query.CHECK, self._texts(keys)):
            return self._receive(1)[0] == READY

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        with self._request(Query.WAIT, self._texts(keys)):
            self._connection.settimeout(max(timeout_s, SHORTEST_S))
            try:
                self._connection.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                self._connection.settimeout(PIECE_S)
                self._send(bytes([Query.CANCEL_WAIT]))
                # The keys may have come between the timeout and the cancellation: then there are two answers.
                came = self._receive(1)[0] != CANCELLED
                if came:
                    self._receive(1)
                else:
                    raise StoreTimeout(
                        f"{keys[0]!r} and {len(keys) - 1} more did not come within {timeout_s:.3f} s"
                    ) from None
            else:
                self._connection.settimeout(PIECE_S)
                self._receive(1)

    def delete_key(self, key: str) -> bool:
        with self._request(Query.DELETE_KEY, self._text(key)):
            return int(struct.unpack("<q", self._receive(8))[0]) > 0

    def delete_keys(self, keys: Sequence[str]) -> None:
        # The store knows no request for many keys. One round trip for each key would take the coordinator of 500 pods 100 ms a save.
        for start in range(0, len(keys), MAX_AHEAD):
            several = keys[start : start + MAX_AHEAD]
            requests = bytes([Query.DELETE_KEY]).join(map(self._text, several))
            with self._request(Query.DELETE_KEY, requests):
                self._receive(8 * len(several))

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._broken = self._broken or "the connection was closed"
        self._connection.close()

    # --- the stream --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _request(self, query: Query, arguments: bytes) -> Iterator[None]:
        """Send a request; the block receives its answer. Every error but StoreTimeout breaks the connection."""
        with self._lock:
            if self._broken:
                raise StoreGone(f"the job's store is gone: {self._broken}")
            try:
                self._send(bytes([query]) + arguments)
                yield
            except StoreTimeout:
                raise
            except OSError as err:
                raise self._lost(f"{query.name}: {str(err) or type(err).__name__}") from err
            except BaseException as err:
                # Also a request to stop: half of an answer may be read, and the next one would begin in it.
                self._lost(f"{query.name} was interrupted: {type(err).__name__}")
                raise

    def _lost(self, why: str) -> StoreGone:
        self._broken = self._broken or why
        return StoreGone(f"the job's store is gone: {why}")

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        deadline_s = time.monotonic() + self._timeout_s
        while left:
            try:
                left = left[self._connection.send(left) :]
            except TimeoutError as err:
                if time.monotonic() >= deadline_s:
                    raise self._lost(f"it has not read for {self._timeout_s:.0f} s") from err
                self._look()
            except OSError as err:
                raise self._lost(str(err) or type(err).__name__) from err

    def _receive(self, length: int) -> bytes:
        deadline_s = time.monotonic() + self._timeout_s
        while len(self._unread) < length:
            try:
                # As much as there is: the next answers too, so that hundreds of small values take a few system calls.
                part = self._connection.recv(RECEIVED_BYTES)
            except TimeoutError as err:
                if time.monotonic() >= deadline_s:
                    raise self._lost(f"it has not answered for {self._timeout_s:.0f} s") from err
                self._look()
                continue
            except OSError as err:
                raise self._lost(str(err) or type(err).__name__) from err
            if not part:
                raise self._lost("it has closed the connection")
            self._unread += part
        answer = bytes(self._unread[:length])
        del self._unread[:length]
        return answer

    def _value(self) -> bytes:
        (length,) = struct.unpack("<Q", self._receive(8))
        if length > MAX_VALUE_BYTES:
            raise self._lost(f"it announces a value of {length} bytes, and {MAX_VALUE_BYTES} are allowed")
        return self._receive(length)

    def _text(self, key: str) -> bytes:
        return _packed(self._prefix + key)

    def _texts(self, keys: Sequence[str]) -> bytes:
        return struct.pack("<Q", len(keys)) + b"".join(map(self._text, keys))


def _packed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _connected(host: str, port: int, timeout_s: float, look: Callable[[], None]) -> socket.socket:
    """Return a connection. Raises StoreGone: nobody accepts one within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        look()
        left_s = max(SHORTEST_S, deadline_s - time.monotonic())
        try:
            # A lost packet is sent again after 1 and 3 s, so an attempt has longer than a piece.
            connection = socket.create_connection((host, port), min(left_s, CONNECT_PIECE_S))
        except OSError as err:
            if time.monotonic() + RETRY_PAUSE_S > deadline_s:
                raise StoreGone(f"no store answers at {host}:{port} within {timeout_s:.0f} s: {err}") from err
            # In a thread of the executor, which may block. The deadline above bounds the attempts.
            time.sleep(RETRY_PAUSE_S)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
