"""
What the executor waits for at this moment, since when, and how long that may take: what tells a slow storage from one that hangs.

Called from: the running operation (`begins`, `idle`) and the thread that answers pings (`report`). A write that never returns cannot time
out by itself: the supervisor sees it in the answer to its ping, says so while it lasts, and replaces this process at the bound.

What is watched moves on with every block, phase and answer, so that the bound is one for standing still, not for the whole.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor import exchange

T = TypeVar("T")

SLOWEST_BYTES_PER_S: Final = 10e6
"""A sync may take the storage's bound, and this rate for what it has to write out: a tenth of the slowest network disk."""
LOOK_S: Final = 5.0
"""How long one who waits for others waits at a time: between two waits it looks whether they meet elsewhere by now, and a store that
does not answer is noticed this long, and its bound, after the question. A thousand pods look 200 times a second."""


class Watch:
    """
    See the module.

    Args:
        storage_timeout_s: how long storage may stand still.
        store_timeout_s: how long the job's store may take for one answer.
    """

    def __init__(self, *, storage_timeout_s: float, store_timeout_s: float) -> None:
        self.storage_timeout_s = storage_timeout_s
        self.store_timeout_s = store_timeout_s
        # By thread: the coordinator makes `.metadata` beside its writing, and asks its peers for it.
        self._now: dict[int, tuple[str, str, float, float]] = {}

    def begins(self, kind: str, what: str, bound_s: float) -> None:
        """From now on this thread waits for `what`."""
        self._now[threading.get_ident()] = (kind, what, time.monotonic(), bound_s)

    def storage(self, what: str, size_bytes: int = 0) -> None:
        """From now on this thread waits for storage, which has to make `size_bytes` durable."""
        self.begins(exchange.STORAGE, what, self.storage_timeout_s + size_bytes / SLOWEST_BYTES_PER_S)

    def store(self, what: str, timeout_s: float = 0.0) -> None:
        """From now on this thread waits for the job's store, which may take `timeout_s` itself."""
        self.begins(exchange.PEERS, what, timeout_s + self.store_timeout_s)

    def moved(self) -> None:
        """Storage has answered: whoever waits for it begins anew."""
        for thread, (kind, what, _, bound_s) in list(self._now.items()):
            if kind == exchange.STORAGE:
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


class Watched:
    """
    An exchange whose calls are watched. A wait for others is made in pieces, each of which the store has to end in time.

    Args:
        moved: whether other pods meet elsewhere by now; asked when somebody has not come yet.
    """

    def __init__(self, inner: exchange.Exchange, watch: Watch, moved: Callable[[], bool] = lambda: False) -> None:
        self._inner = inner
        self._watch = watch
        self._moved = moved

    def post(self, phase: str, document: exchange.Document) -> None:
        self._watched(phase, 0.0, lambda: self._inner.post(phase, document))

    def collect(self, phase: str, timeout_s: float) -> dict[int, exchange.Document]:
        return self._wait(phase, timeout_s, lambda piece_s: self._inner.collect(phase, piece_s))

    def publish(self, phase: str, document: exchange.Document) -> None:
        self._watched(phase, 0.0, lambda: self._inner.publish(phase, document))

    def receive(self, phase: str, timeout_s: float) -> exchange.Document:
        return self._wait(phase, timeout_s, lambda piece_s: self._inner.receive(phase, piece_s))

    def forget(self, phases: Sequence[str]) -> None:
        self._watched("forget", 0.0, lambda: self._inner.forget(phases))

    def _wait(self, phase: str, timeout_s: float, call: Callable[[float], T]) -> T:
        started = begun = time.monotonic()
        left_s = timeout_s
        while True:
            piece_s = min(left_s, LOOK_S)
            try:
                return self._watched(phase, piece_s, functools.partial(call, piece_s))
            except BarrierTimeout as err:
                if self._have_moved():
                    raise exchange.StoreLost(f"other pods do not meet in the job's store any more: {err}") from err
                now = time.monotonic()
                # Who gave up at once knows that nobody will come.
                gave_up = now - begun < piece_s / 2
                begun, waited_s = now, now - started
                left_s = timeout_s - waited_s
                if left_s <= 0 or gave_up:
                    raise BarrierTimeout(phase=phase, missing=err.missing, waited_s=waited_s) from err

    def _have_moved(self) -> bool:
        # A look at storage, which may hang as well as a write.
        self._watch.storage("look whether other pods meet there")
        try:
            return self._moved()
        finally:
            self._watch.idle()

    def _watched(self, phase: str, timeout_s: float, call: Callable[[], T]) -> T:
        self._watch.store(phase, timeout_s)
        try:
            return call()
        finally:
            self._watch.idle()
