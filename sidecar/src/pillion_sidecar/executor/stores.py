"""
The exchange of several pods over a `torch.distributed` TCPStore: a prefix of the job's own, or one hosted here.

Called from: the executor, at the opening of a session. The only place of the default path that imports torch.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch.distributed as dist

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor import exchange

CONNECT_TIMEOUT_S: Final = 60.0
"""Bound for the connection to the job's store: it is there before the trainers' process group is."""
SHORTEST_S: Final = 0.001
"""Of a wait in the store: torch counts in milliseconds, and none of them is for ever (`kNoTimeout`)."""
MULTI_CHUNK: Final = 1024
"""Keys of one multi_get: bounds one frame of the store."""


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
    Phases as keys of a prefix store.

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

    def post(self, phase: str, document: exchange.Document) -> None:
        with _alive():
            self._store.set(f"{phase}/{self._first_rank}", exchange.encode(document).decode())
            # `set` is not acknowledged; a round trip tells whether the store still lives.
            self._store.check([f"{phase}/{self._first_rank}"])

    def collect(
        self, phase: str, timeout_s: float, look: Callable[[], None] = exchange.nothing
    ) -> dict[int, exchange.Document]:
        firsts = sorted(self._pods)
        keys = [f"{phase}/{first}" for first in firsts]
        self._wait(phase, keys, firsts, timeout_s, look)
        values: list[Any] = []
        with _alive():
            for start in range(0, len(keys), MULTI_CHUNK):
                values += self._store.multi_get(keys[start : start + MULTI_CHUNK])
        return {first: exchange.decode(bytes(value)) for first, value in zip(firsts, values, strict=True)}

    def _wait(
        self, phase: str, keys: Sequence[str], firsts: Sequence[int], timeout_s: float, look: Callable[[], None]
    ) -> None:
        started = time.monotonic()
        with _alive():
            while True:
                left_s = timeout_s - (time.monotonic() - started)
                piece_s = min(max(left_s, SHORTEST_S), exchange.PIECE_S)
                try:
                    self._store.wait(list(keys), datetime.timedelta(seconds=piece_s))
                    return
                except dist.DistStoreError as err:
                    if left_s <= exchange.PIECE_S:
                        missing = self._missing(keys, firsts)
                        waited_s = time.monotonic() - started
                        raise BarrierTimeout(phase=phase, missing=missing, waited_s=waited_s) from err
                look()

    def _missing(self, keys: Sequence[str], firsts: Sequence[int]) -> list[int]:
        """One question for each pod: not between the pieces of a wait."""
        absent = [first for first, key in zip(firsts, keys, strict=True) if not self._store.check([key])]
        return [rank for first in absent for rank in self._pods.get(first, [first])]

    def publish(self, phase: str, document: exchange.Document) -> None:
        with _alive():
            self._store.set(f"{phase}/decision", exchange.encode(document).decode())
            self._store.check([f"{phase}/decision"])

    def receive(self, phase: str, timeout_s: float, look: Callable[[], None] = exchange.nothing) -> exchange.Document:
        self._wait(phase, [f"{phase}/decision"], [0], timeout_s, look)
        with _alive():
            return exchange.decode(bytes(self._store.get(f"{phase}/decision")))

    def forget(self, phases: Sequence[str]) -> None:
        with _alive():
            for phase in phases:
                for first in self._pods:
                    self._store.delete_key(f"{phase}/{first}")
                self._store.delete_key(f"{phase}/decision")


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """A broken connection is a lost store."""
    try:
        yield
    except dist.DistNetworkError as err:
        raise exchange.StoreLost(f"the job's store is gone: {str(err).splitlines()[0]}") from err
