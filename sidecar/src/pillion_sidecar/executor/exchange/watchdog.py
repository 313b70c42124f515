"""
What the executor waits for at this moment, since when, and how long that may take: what tells a slow storage from one that hangs.

Called from: the running operation (`begins`, `idle`) and the thread that answers pings (`report`). A write that never returns cannot time
out by itself: the supervisor sees it in the answer to its ping, says so while it lasts, and replaces this process at the bound.

What is watched moves on with every block, phase and answer, so that the bound is one for standing still, not for the whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.waits import WaitKind

T = TypeVar("T")

SLOWEST_BYTES_PER_S: Final = 10e6
"""A sync may take the storage's bound, and this rate for what it has to write out: a tenth of the slowest network disk."""
LOOK_S: Final = 5.0
"""How often one who waits for others looks whether they meet elsewhere by now. A thousand pods look at storage 200 times a second."""


class SessionLeft(BaseException):
    """
    The trainers that this is done for are gone, and others wait. Like `asyncio.CancelledError` no `Exception`: no boundary on the way
    takes it for a failure, which peers were to be told.
    """


class Watchdog:
    """
    See the module.

    Args:
        storage_timeout_s: how long storage may stand still.
        store_timeout_s: how long the job's store may take for one answer.
        is_over: whether the session has ended, so that whoever waits for its other pods leaves.
    """

    def __init__(
        self, *, storage_timeout_s: float, store_timeout_s: float, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self.storage_timeout_s = storage_timeout_s
        self.store_timeout_s = store_timeout_s
        self.is_over = is_over
        # By thread: the coordinator makes `.metadata` beside its writing, and asks its peers for it.
        self._now: dict[int, tuple[str, str, float, float]] = {}

    def begins(self, kind: str, what: str, bound_s: float) -> None:
        """From now on this thread waits for `what`."""
        self._now[threading.get_ident()] = (kind, what, time.monotonic(), bound_s)

    def storage(self, what: str, size_bytes: int = 0) -> None:
        """From now on this thread waits for storage, which has to make `size_bytes` durable."""
        self.begins(WaitKind.STORAGE, what, self.storage_timeout_s + size_bytes / SLOWEST_BYTES_PER_S)

    def store(self, what: str, timeout_s: float = 0.0) -> None:
        """From now on this thread waits for the job's store, which may take `timeout_s` itself."""
        self.begins(WaitKind.PEERS, what, timeout_s + self.store_timeout_s)

    def moved(self) -> None:
        """Storage has answered: whoever waits for it begins anew."""
        for thread, (kind, what, _, bound_s) in list(self._now.items()):
            if kind == WaitKind.STORAGE:
                self._now[thread] = (kind, what, time.monotonic(), bound_s)

    def idle(self) -> None:
        """This thread waits for nothing any more."""
        self._now.pop(threading.get_ident(), None)

    def report(self) -> dict[str, Any] | None:
        """What is waited for, as it goes into a pong: what is nearest to its bound. None: nothing."""
        now_s = time.monotonic()
        # A copy: other threads go on meanwhile.
        waits = [(now_s - since, bound_s, kind, what) for kind, what, since, bound_s in list(self._now.values())]
        if not waits:
            return None
        for_s, bound_s, kind, what = max(waits, key=lambda each: each[0] - each[1])
        return {"kind": kind, "what": what, "for_s": for_s, "bound_s": bound_s}


class WatchedExchange:
    """
    An exchange whose calls are watched. A wait for others is made in pieces (`exchange.PIECE_S`), each of which the store has to end
    in time.

    Args:
        moved: whether other pods meet elsewhere by now; asked when somebody has not come yet.

    Raises:
        SessionLeft: any wait; the session ended meanwhile.
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
        # A look at storage, which may hang as well as a write.
        self._watch.storage("look whether other pods meet there")
        if self._moved():
            raise protocol.StoreLost(f"{cause or phase}: other pods do not meet in the job's store any more") from cause

    def _watched(self, phase: str, call: Callable[[], None]) -> None:
        self._watch.store(phase)
        try:
            call()
        finally:
            self._watch.idle()
