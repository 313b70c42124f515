"""
The exchange in a `torch.distributed` TCPStore: a prefix of the job's own store, or a store that this process hosts.

Called from: the executor, when a session opens. It imports torch only to host a store, or for a store of a release that `store_client` does not understand.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.exchange.store_client import NotUnderstood, Store, StoreClient, StoreGone, StoreTimeout

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 60.0
"""Timeout for the connection to the job's store. The store exists before the trainers' process group."""
MULTI_CHUNK: Final = 1024
"""Maximum keys of one multi_get, which bounds the size of a frame."""
PLAIN_BYTES: Final = 256 * 1024
"""Maximum bytes of an uncompressed document. The layout of 80,000 leaves is 13 MiB of JSON, which shrinks twentyfold."""
PIECE_BYTES: Final = 4 * 1024**2
"""Maximum bytes of one value. Longer documents are cut into pieces, because the store's server (libuv) drops a client that sets more than
8 MiB under one key."""
MAX_PIECES: Final = 256
"""Maximum pieces of one document: 1 GiB, compressed."""
MAX_DOCUMENT_BYTES: Final = 2**34
"""Maximum bytes of an uncompressed document. It bounds the memory for a damaged one."""
PACKED: Final = "zlib:"
"""Begin of a value that is compressed: `zlib:<names of the further pieces, separated by commas>:<first piece, base64>`."""


def connect(
    host: str,
    port: int,
    prefix: str,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    look: Callable[[], None] = protocol.nothing,
) -> Store:
    """
    Return a client of the job's store that sees only keys below the prefix. Opens no port.

    Args:
        host, port: of the store.
        prefix: what is put in front of every key.
        timeout_s: timeout for the connection and for each of the first answers.
        look: called at least each second of a wait, now and in later calls. What it raises ends the wait.

    Blocks: up to `timeout_s` until a store accepts the connection. For a store that Pillion's client does not understand, see `torch_store.connect`.

    Raises:
        StoreGone: no store answers at this address.
    """
    try:
        return StoreClient.connect(host, port, prefix, timeout_s=timeout_s, look=look)
    except NotUnderstood as err:
        _log.warning("torch's own client is used for the job's store at %s:%d, and takes 300 MB: %s", host, port, err)
        from pillion_sidecar.executor.exchange import torch_store

        return torch_store.connect(host, port, prefix, timeout_s=timeout_s)


def host(address: str, prefix: str) -> tuple[Any, Store]:
    """Host a store on a free port. Return it (a `torch.distributed.TCPStore`, with its `port`), and a client as of `connect`."""
    from pillion_sidecar.executor.exchange import torch_store

    hosted = torch_store.host(address)
    return hosted, connect(address, hosted.port, prefix)


class StoreExchange:
    """
    The exchange of one session, with a key for each document. Implements `protocol.SlicedExchange`.

    All pods of a session have the same release of the sidecar, so the form of the values needs no compatibility.

    Args:
        store: the store, with the session's prefix.
        keep: object that must live as long (the store that this process hosts). None: there is none.
        pods: the ranks of every pod.
        first_rank: the first rank of this pod.
    """

    def __init__(self, store: Store, keep: object, pods: Sequence[Sequence[int]], first_rank: int) -> None:
        self._store = store
        self._keep = keep
        self._pods = {int(pod[0]): [int(rank) for rank in pod] for pod in pods}
        self._first_rank = first_rank
        self._pieces: dict[str, list[str]] = {}
        """(coordinator) Key -> keys of its further pieces, which are deleted with it."""

    def post(self, phase: str, document: protocol.Document) -> None:
        self._set(f"{phase}/{self._first_rank}", document)

    def _set(self, key: str, document: protocol.Document) -> None:
        first, pieces = pack(document)
        self._note(key, list(pieces))
        with _alive():
            for name, piece in pieces.items():
                self._store.set(f"{key}/{name}", piece)
            # Put last, because other pods wait for this key.
            self._store.put(key, first)

    def _note(self, key: str, names: Sequence[str]) -> None:
        if names and self._first_rank == 0:
            self._pieces[key] = [f"{key}/{name}" for name in names]

    def _whole(self, key: str, value: str) -> protocol.Document:
        names = names_of_pieces(value)
        self._note(key, names)
        return unpack(value, [self._store.get(f"{key}/{name}").decode() for name in names])

    def collect(
        self, phase: str, timeout_s: float, look: Callable[[], None] = protocol.nothing
    ) -> dict[int, protocol.Document]:
        firsts = sorted(self._pods)
        keys = [f"{phase}/{first}" for first in firsts]
        self._wait(phase, keys, firsts, timeout_s, look)
        values: list[bytes] = []
        with _alive():
            for start in range(0, len(keys), MULTI_CHUNK):
                values += self._store.multi_get(keys[start : start + MULTI_CHUNK])
            return {
                first: self._whole(key, value.decode()) for first, key, value in zip(firsts, keys, values, strict=True)
            }

    def _wait(
        self, phase: str, keys: Sequence[str], firsts: Sequence[int], timeout_s: float, look: Callable[[], None]
    ) -> None:
        started = time.monotonic()
        with _alive():
            while True:
                left_s = timeout_s - (time.monotonic() - started)
                try:
                    self._store.wait(keys, min(max(left_s, 0.0), protocol.PIECE_S))
                    return
                except StoreTimeout as err:
                    if left_s <= protocol.PIECE_S:
                        missing = self._missing(keys, firsts)
                        waited_s = time.monotonic() - started
                        raise BarrierTimeout(phase=phase, missing=missing, waited_s=waited_s) from err
                look()

    def _missing(self, keys: Sequence[str], firsts: Sequence[int]) -> list[int]:
        """Return the missing ranks. It sends one request for each pod, so it is called only at the end of a wait."""
        absent = [first for first, key in zip(firsts, keys, strict=True) if not self._store.check([key])]
        return [rank for first in absent for rank in self._pods.get(first, [first])]

    def publish(self, phase: str, document: protocol.Document) -> None:
        self._set(f"{phase}/decision", document)

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = protocol.nothing) -> protocol.Document:
        self._wait(phase, [f"{phase}/decision"], [0], timeout_s, look)
        with _alive():
            # Not `get`, which waits once more.
            (value,) = self._store.multi_get([f"{phase}/decision"])
            return self._whole(f"{phase}/decision", value.decode())

    def forget(self, phases: Sequence[str]) -> None:
        self._delete([f"{phase}/{first}" for phase in phases for first in self._pods])
        self.unpublish(phases)

    def unpublish(self, phases: Sequence[str]) -> None:
        self._delete([f"{phase}/decision" for phase in phases])

    def _delete(self, keys: Sequence[str]) -> None:
        with _alive():
            self._store.delete_keys([stored for key in keys for stored in (key, *self._pieces.pop(key, ()))])


def pack(document: protocol.Document) -> tuple[str, dict[str, str]]:
    """
    Return the value of a document's key, and its further pieces by name. Pure.

    The names are random, so that a reader of the key always gets the pieces that were written with it.

    Raises:
        ValueError: the document is too large for a store.
    """
    plain = protocol.encode(document)
    if len(plain) <= PLAIN_BYTES:
        return plain.decode(), {}
    packed = base64.b64encode(zlib.compress(plain, level=1)).decode()
    parts = [packed[start : start + PIECE_BYTES] for start in range(0, len(packed), PIECE_BYTES)]
    if len(parts) > MAX_PIECES or len(plain) > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"a document of {len(plain)} bytes ({len(packed)} compressed) is too large for the job's store: "
            f"{MAX_PIECES * PIECE_BYTES} compressed are allowed"
        )
    token = secrets.token_hex(4)
    further = {f"{token}-{number}": part for number, part in enumerate(parts[1:], 1)}
    return f"{PACKED}{','.join(further)}:{parts[0]}", further


def names_of_pieces(value: str) -> list[str]:
    """Return the names of the further pieces that a value refers to. Pure."""
    if not value.startswith(PACKED):
        return []
    names = value[len(PACKED) :].partition(":")[0]
    return names.split(",") if names else []


def unpack(value: str, pieces: Sequence[str]) -> protocol.Document:
    """
    Return the document in a key's value and its further pieces. Pure.

    Raises:
        ValueError: the value is not a document, as another program writes under these keys.
    """
    if not value.startswith(PACKED):
        return protocol.decode(value)
    first = value[len(PACKED) :].partition(":")[2]
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(base64.b64decode("".join((first, *pieces)), validate=True), MAX_DOCUMENT_BYTES)
    except zlib.error as err:
        raise ValueError(f"a packed document of the exchange is damaged: {err}") from err
    if not unpacker.eof:
        raise ValueError("a packed document of the exchange is cut short, or too large")
    return protocol.decode(plain)


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """Raise StoreLost if the connection breaks within the block."""
    try:
        yield
    except StoreGone as err:
        raise protocol.StoreLost(str(err)) from err
