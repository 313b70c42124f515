"""
The exchange of several pods over a `torch.distributed` TCPStore: a prefix of the job's own, or one hosted here.

Called from: the executor, at the opening of a session. The only place of the default path that imports torch.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch.distributed as dist

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor.exchange import protocol

CONNECT_TIMEOUT_S: Final = 60.0
"""Bound for the connection to the job's store: it is there before the trainers' process group is."""
SHORTEST_S: Final = 0.001
"""Of a wait in the store: torch counts in milliseconds, and none of them is for ever (`kNoTimeout`)."""
MULTI_CHUNK: Final = 1024
"""Keys of one multi_get: bounds one frame of the store."""
PLAIN_BYTES: Final = 256 * 1024
"""A longer document is compressed: a layout of 80,000 leaves is 13 MiB of JSON that shrinks twentyfold."""
PIECE_BYTES: Final = 4 * 1024**2
"""What is longer still goes in pieces: the store's server (libuv) drops a client that sets more than 8 MiB under one key."""
PIECES_MOST: Final = 256
"""Of one document: 1 GiB, compressed."""
DOCUMENT_BYTES_MOST: Final = 2**34
"""Of a document when it is whole: bounds what a damaged one unpacks to."""
PACKED: Final = "zlib:"
"""Begins a value that is not the document itself: `zlib:<names of the pieces, by comma>:<the first piece, base64>`."""


def connect(
    host: str, port: int, prefix: str, *, timeout_s: float = CONNECT_TIMEOUT_S
) -> tuple[dist.Store, dist.Store]:
    """
    A client of the job's store, and its prefixed view. No port is opened.

    Blocks: up to twice `timeout_s`, as torch tries twice (measured with torch 2.15: 10.4 s for 5 s); for ever when the store's process
    is stopped and the kernel takes the connection. The watch bounds both.

    Raises:
        torch.distributed.DistError: nobody answers there.
    """
    # No world_size: this client must not count in the job's own rendezvous. No libuv: it is the server's affair, clients of both
    # kinds talk to both kinds of servers, and some builds of torch (Debian's) have none.
    store = dist.TCPStore(
        host,
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
        use_libuv=False,
    )
    return store, dist.PrefixStore(prefix, store)


def host(address: str, prefix: str) -> tuple[dist.TCPStore, dist.Store]:
    """A store of our own on a free port, which the kernel picks (bind to 0): no window for somebody else to take it."""
    store = dist.TCPStore(
        address,
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=CONNECT_TIMEOUT_S),
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )
    return store, dist.PrefixStore(prefix, store)


class StoreExchange:
    """
    Phases as keys of a prefix store. All pods of a session have the same release of the sidecar, so that no other has to understand
    what is packed.

    Args:
        store: the prefixed view.
        keep: what has to live as long (the TCPStore behind it).
        pods: ranks of every pod.
        first_rank: this pod's.
    """

    def __init__(self, store: dist.Store, keep: object, pods: Sequence[Sequence[int]], first_rank: int) -> None:
        self._store = store
        self._keep = keep
        self._pods = {int(pod[0]): [int(rank) for rank in pod] for pod in pods}
        self._first_rank = first_rank
        self._pieces: dict[str, list[str]] = {}
        """(coordinator) Key -> its further pieces, where it has written or read some: it deletes them with the key."""

    def post(self, phase: str, document: protocol.Document) -> None:
        self._set(f"{phase}/{self._first_rank}", document)

    def _set(self, key: str, document: protocol.Document) -> None:
        first, pieces = pack(document)
        self._note(key, list(pieces))
        with _alive():
            for name, piece in pieces.items():
                self._store.set(f"{key}/{name}", piece)
            # The last one, as others wait for it.
            self._store.set(key, first)
            # `set` is not acknowledged; a round trip tells whether the store still lives.
            self._store.check([key])

    def _note(self, key: str, names: Sequence[str]) -> None:
        if names and self._first_rank == 0:
            self._pieces[key] = [f"{key}/{name}" for name in names]

    def _whole(self, key: str, value: str) -> protocol.Document:
        names = names_of_pieces(value)
        self._note(key, names)
        return unpack(value, [bytes(self._store.get(f"{key}/{name}")).decode() for name in names])

    def collect(
        self, phase: str, timeout_s: float, look: Callable[[], None] = protocol.nothing
    ) -> dict[int, protocol.Document]:
        firsts = sorted(self._pods)
        keys = [f"{phase}/{first}" for first in firsts]
        self._wait(phase, keys, firsts, timeout_s, look)
        values: list[Any] = []
        with _alive():
            for start in range(0, len(keys), MULTI_CHUNK):
                values += self._store.multi_get(keys[start : start + MULTI_CHUNK])
            return {
                first: self._whole(key, bytes(value).decode())
                for first, key, value in zip(firsts, keys, values, strict=True)
            }

    def _wait(
        self, phase: str, keys: Sequence[str], firsts: Sequence[int], timeout_s: float, look: Callable[[], None]
    ) -> None:
        started = time.monotonic()
        with _alive():
            while True:
                left_s = timeout_s - (time.monotonic() - started)
                piece_s = min(max(left_s, SHORTEST_S), protocol.PIECE_S)
                try:
                    self._store.wait(list(keys), datetime.timedelta(seconds=piece_s))
                    return
                except dist.DistStoreError as err:
                    if left_s <= protocol.PIECE_S:
                        missing = self._missing(keys, firsts)
                        waited_s = time.monotonic() - started
                        raise BarrierTimeout(phase=phase, missing=missing, waited_s=waited_s) from err
                look()

    def _missing(self, keys: Sequence[str], firsts: Sequence[int]) -> list[int]:
        """One question for each pod: not between the pieces of a wait."""
        absent = [first for first, key in zip(firsts, keys, strict=True) if not self._store.check([key])]
        return [rank for first in absent for rank in self._pods.get(first, [first])]

    def publish(self, phase: str, document: protocol.Document) -> None:
        self._set(f"{phase}/decision", document)

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = protocol.nothing) -> protocol.Document:
        self._wait(phase, [f"{phase}/decision"], [0], timeout_s, look)
        with _alive():
            return self._whole(f"{phase}/decision", bytes(self._store.get(f"{phase}/decision")).decode())

    def forget(self, phases: Sequence[str]) -> None:
        self._delete([f"{phase}/{first}" for phase in phases for first in self._pods])
        self.unpublish(phases)

    def unpublish(self, phases: Sequence[str]) -> None:
        self._delete([f"{phase}/decision" for phase in phases])

    def _delete(self, keys: Sequence[str]) -> None:
        with _alive():
            for key in keys:
                for each in (key, *self._pieces.pop(key, ())):
                    self._store.delete_key(each)


def pack(document: protocol.Document) -> tuple[str, dict[str, str]]:
    """
    The value of a document's key, and its further pieces by name. Pure.

    The names are new each time: who reads the key finds the pieces that were written with it.

    Raises:
        ValueError: it is larger than a store can be asked to hold.
    """
    plain = protocol.encode(document)
    if len(plain) <= PLAIN_BYTES:
        return plain.decode(), {}
    packed = base64.b64encode(zlib.compress(plain, level=1)).decode()
    parts = [packed[start : start + PIECE_BYTES] for start in range(0, len(packed), PIECE_BYTES)]
    if len(parts) > PIECES_MOST or len(plain) > DOCUMENT_BYTES_MOST:
        raise ValueError(
            f"a document of {len(plain)} bytes ({len(packed)} compressed) is too large for the job's store: "
            f"{PIECES_MOST * PIECE_BYTES} compressed are allowed"
        )
    token = secrets.token_hex(4)
    further = {f"{token}-{number}": part for number, part in enumerate(parts[1:], 1)}
    return f"{PACKED}{','.join(further)}:{parts[0]}", further


def names_of_pieces(value: str) -> list[str]:
    """What has to be read besides the value of a key. Pure."""
    if not value.startswith(PACKED):
        return []
    names = value[len(PACKED) :].partition(":")[0]
    return names.split(",") if names else []


def unpack(value: str, pieces: Sequence[str]) -> protocol.Document:
    """
    The document of a key's value and its further pieces. Pure.

    Raises:
        ValueError: there is none; somebody else writes into our prefix.
    """
    if not value.startswith(PACKED):
        return protocol.decode(value.encode())
    first = value[len(PACKED) :].partition(":")[2]
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(base64.b64decode("".join((first, *pieces)), validate=True), DOCUMENT_BYTES_MOST)
    except zlib.error as err:
        raise ValueError(f"a packed document of the exchange is damaged: {err}") from err
    if not unpacker.eof:
        raise ValueError("a packed document of the exchange is cut short, or too large")
    return protocol.decode(plain)


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """A broken connection is a lost store."""
    try:
        yield
    except dist.DistNetworkError as err:
        raise protocol.StoreLost(f"the job's store is gone: {str(err).splitlines()[0]}") from err
