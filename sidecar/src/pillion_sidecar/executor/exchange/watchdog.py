"""
The watchdog: notes what the executor waits for, since when, and with which timeout. It tells slow storage from storage that hangs.

Called from: the running operation (`begins`, `idle`) and the thread that answers pings (`report`). A write that never returns cannot time out by
itself. The supervisor sees it in the answer to its ping, reports it while it lasts, and replaces this process at the timeout.

Each block, phase and answer restarts the time. So the timeout bounds a standstill, not the whole operation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.waits import Wait, WaitKind

T = TypeVar("T")

SLOWEST_BYTES_PER_S: Final = 10e6
"""Rate by which a sync's timeout grows with its bytes: a tenth of the slowest network disk."""
LOOK_S: Final = 5.0
"""Interval at which a wait for peers checks whether they use the exchange on storage by now. A thousand pods check 200 times a second."""


class SessionLeft(BaseException):
    """
    The session of this operation is over, and another one waits.

    Not an `Exception`, like `asyncio.CancelledError`, so that no boundary on the way treats it as a failure and reports it to peers.
    """


class Watchdog:
    """
    The current waits of the executor. See the module.

    Args:
        storage_timeout_s: timeout for a standstill of the storage.
        store_timeout_s: timeout for one answer of the job's store.
        is_over: returns whether the session has ended, so that waits for its other pods end.
    """

    def __init__(
        self, *, storage_timeout_s: float, store_timeout_s: float, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self.storage_timeout_s = storage_timeout_s
        self.store_timeout_s = store_timeout_s
        self.is_over = is_over
        # By thread, because the coordinator makes `.metadata` beside its writing, and waits for its peers meanwhile.
        self._now: dict[int, tuple[WaitKind, str, float, float]] = {}

    def begins(self, kind: WaitKind, what: str, bound_s: float) -> None:
        """Note that this thread begins to wait for `what`, with a timeout of `bound_s`."""
        self._now[threading.get_ident()] = (kind, what, time.monotonic(), bound_s)

    def storage(self, what: str, size_bytes: int = 0) -> None:
        """Note that this thread begins to wait for storage, which must make `size_bytes` durable."""
        self.begins(WaitKind.STORAGE, what, self.storage_timeout_s + size_bytes / SLOWEST_BYTES_PER_S)

    def store(self, what: str, timeout_s: float = 0.0) -> None:
        """Note that this thread begins to wait for the job's store, whose request itself may wait for `timeout_s`."""
        self.begins(WaitKind.PEERS, what, timeout_s + self.store_timeout_s)

    def moved(self) -> None:
        """Restart the time of all waits for storage, because it has answered."""
        for thread, (kind, what, _, bound_s) in list(self._now.items()):
            if kind is WaitKind.STORAGE:
                self._now[thread] = (kind, what, time.monotonic(), bound_s)

    def idle(self) -> None:
        """Note that this thread no longer waits."""
        self._now.pop(threading.get_ident(), None)

    def look(self) -> None:
        """Raise SessionLeft if the session has ended."""
        if self.is_over():
            raise SessionLeft("the session is over")

    def report(self) -> Wait | None:
        """Return the wait that is nearest to its timeout. None if no thread waits."""
        now_s = time.monotonic()
        # A copy, because other threads change the dict meanwhile.
        waits = [
            Wait(kind=kind, what=what, for_s=now_s - since, bound_s=bound_s)
            for kind, what, since, bound_s in list(self._now.values())
        ]
        return max(waits, key=lambda each: each.for_s - each.bound_s, default=None)


class WatchedExchange:
    """
    An exchange whose calls the watchdog watches. Waits for peers are sliced (`protocol.PIECE_S`), and the store must answer each slice in time.

    Args:
        inner: the exchange.
        watch: the watchdog.
        moved: returns whether other pods use the exchange on storage by now. It is called while a peer is missing.

    Raises:
        SessionLeft: any wait, if the session has ended meanwhile.
    """

    def __init__(
        self, inner: protocol.SlicedExchange, watch: Watchdog, moved: Callable[[], bool] = lambda: False
    ) -> None:
        self._inner = inner
        self._watch = watch
        self._moved = moved

    def post(self, phase: str, document: protocol.Document) -> None:
        self._watched(phase, lambda: self._inner.post(phase, document))

    def collect(self, phase: str, timeout_s: float) -> dict[int, protocol.Document]:
        return self._wait(phase, lambda look: self._inner.collect(phase, timeout_s, look))

    def publish(self, phase: str, document: protocol.Document) -> None:
        self._watched(phase, lambda: self._inner.publish(phase, document))

    def receive(self, phase: str, timeout_s: float) -> protocol.Document:
        return self._wait(phase, lambda look: self._inner.receive(phase, timeout_s, look))

    def forget(self, phases: Sequence[str]) -> None:
        self._watched("forget", lambda: self._inner.forget(phases))

    def unpublish(self, phases: Sequence[str]) -> None:
        self._watched("unpublish", lambda: self._inner.unpublish(phases))

    def _wait(self, phase: str, call: Callable[[Callable[[], None]], T]) -> T:
        looked = time.monotonic()

        def look() -> None:
            nonlocal looked
            if self._watch.is_over():
                raise SessionLeft(f"nobody waits for {phase!r} any more")
            if time.monotonic() - looked >= LOOK_S:
                self._raise_if_moved(phase)
                looked = time.monotonic()
            self._watch.store(phase, protocol.PIECE_S)

        try:
            look()
            return call(look)
        except BarrierTimeout as err:
            self._raise_if_moved(phase, err)
            raise
        finally:
            self._watch.idle()

    def _raise_if_moved(self, phase: str, cause: BarrierTimeout | None = None) -> None:
        # Watched as a wait for storage, because this check may hang like a write.
        self._watch.storage("look whether other pods meet there")
        if self._moved():
            raise protocol.StoreLost(f"{cause or phase}: other pods do not meet in the job's store any more") from cause

    def _watched(self, phase: str, call: Callable[[], None]) -> None:
        self._watch.store(phase)
        try:
            call()
        finally:
            self._watch.idle()
