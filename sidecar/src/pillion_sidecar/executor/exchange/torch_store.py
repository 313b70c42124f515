"""
What the exchange needs of torch's own TCPStore: hosting one, and a client for a store that `store_client` does not understand.

Called from: the executor, when a session opens on a store of its own, or on a store of an unknown release. It imports torch, which takes 3 s and 300 MB.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Final

import torch.distributed as dist

from pillion_sidecar.executor.exchange.store_client import StoreGone, StoreTimeout

HOST_TIMEOUT_S: Final = 60.0
"""Timeout of torch for the start of a store."""
SHORTEST_S: Final = 0.001
"""Minimum timeout of a wait in the store. torch counts milliseconds, and takes 0 as no timeout (`kNoTimeout`)."""


def host(address: str) -> dist.TCPStore:
    """Host a store on a free port, which the kernel chooses (bind to 0), so that no other process can take the port meanwhile."""
    return dist.TCPStore(
        address,
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=HOST_TIMEOUT_S),
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )


def connect(address: str, port: int, prefix: str, *, timeout_s: float) -> TorchStore:
    """
    Connect to a store by torch's own client.

    Blocks: up to twice `timeout_s`, because torch tries twice (measured with torch 2.15: 10.4 s for 5 s). Without limit if the store's process is
        stopped, as the kernel still accepts the connection. The watchdog bounds both.

    Raises:
        StoreGone: no store answers at this address.
    """
    with _own_errors():
        # Without world_size, because this client must not count in the job's own rendezvous. Without libuv, because only servers need it,
        # and some builds of torch (Debian's) lack it.
        store = dist.TCPStore(
            address,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_s),
            use_libuv=False,
        )
    return TorchStore(store, prefix)


class TorchStore:
    """The keys of a torch store below a prefix, as a `store_client.Store`."""

    def __init__(self, store: dist.Store, prefix: str) -> None:
        self._store = dist.PrefixStore(prefix, store)

    def set(self, key: str, value: str) -> None:
        with _own_errors():
            self._store.set(key, value)

    def put(self, key: str, value: str) -> None:
        self.set(key, value)
        # `set` is not acknowledged. A round trip shows whether the store still lives.
        self.check([key])

    def get(self, key: str) -> bytes:
        with _own_errors():
            return bytes(self._store.get(key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        with _own_errors():
            return [bytes(value) for value in self._store.multi_get(list(keys))]

    def add(self, key: str, amount: int) -> int:
        with _own_errors():
            return int(self._store.add(key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        with _own_errors():
            return bool(self._store.check(list(keys)))

    def wait(self, keys: Sequence[str], timeout_s: float) -> None:
        with _own_errors():
            self._store.wait(list(keys), datetime.timedelta(seconds=max(timeout_s, SHORTEST_S)))

    def delete_key(self, key: str) -> bool:
        with _own_errors():
            return bool(self._store.delete_key(key))

    def delete_keys(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.delete_key(key)

    def close(self) -> None:
        """Nothing: torch closes the connection with the last reference to it."""


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise torch's errors as those of `store_client.Store`."""
    try:
        yield
    except dist.DistStoreError as err:
        raise StoreTimeout(str(err).splitlines()[0]) from err
    except dist.DistError as err:
        raise StoreGone(str(err).splitlines()[0]) from err
