"""
What the executor waits for at this moment, since when, and how long that may take: what tells a slow storage from one that hangs.

Called from: the running operation (`begins`, `idle`) and the thread that answers pings (`report`). A write that never returns cannot time
out by itself: the supervisor sees it in the answer to its ping, says so while it lasts, and replaces this process at the bound.

What is watched moves on with every block, phase and answer, so that the bound is one for standing still, not for the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor import exchange

T = TypeVar("T")

ANSWER_S: Final = 30.0
"""Bound for the job's store to answer a single question; it does in less than a millisecond while its process runs."""
SLOWEST_BYTES_PER_S: Final = 10e6
"""A sync may take the storage's bound, and this rate for what it has to write out: a tenth of the slowest network disk."""


class Watch:
    """
    See the module.

    Args:
        storage_timeout_s: how long storage may stand still.
    """

    def __init__(self, storage_timeout_s: float) -> None:
        self.storage_timeout_s = storage_timeout_s
        # One tuple, replaced as a whole: it is read by another thread.
        self._now: tuple[str, str, float, float] | None = None

    def begins(self, kind: str, what: str, bound_s: float) -> None:
        """From now on the operation waits for `what`."""
        self._now = (kind, what, time.monotonic(), bound_s)

    def storage(self, what: str, size_bytes: int = 0) -> None:
        """From now on the operation waits for storage, which has to make `size_bytes` durable."""
        self.begins(exchange.STORAGE, what, self.storage_timeout_s + size_bytes / SLOWEST_BYTES_PER_S)

    def idle(self) -> None:
        self._now = None

    def report(self) -> dict[str, Any] | None:
        """What is waited for, as it goes into a pong; None: nothing."""
        now = self._now
        if now is None:
            return None
        kind, what, since, bound_s = now
        return {"kind": kind, "what": what, "for_s": time.monotonic() - since, "bound_s": bound_s}


class Watched:
    """
    An exchange whose calls are watched: one with a bound of its own gets `ANSWER_S` more, as a stopped store keeps no time.

    Args:
        moved: whether other pods meet elsewhere by now; asked when somebody did not come in time.
    """

    def __init__(self, inner: exchange.Exchange, watch: Watch, moved: Callable[[], bool] = lambda: False) -> None:
        self._inner = inner
        self._watch = watch
        self._moved = moved

    def post(self, phase: str, document: exchange.Document) -> None:
        self._watched(phase, 0.0, lambda: self._inner.post(phase, document))

    def collect(self, phase: str, timeout_s: float) -> dict[int, exchange.Document]:
        return self._watched(phase, timeout_s, lambda: self._inner.collect(phase, timeout_s))

    def publish(self, phase: str, document: exchange.Document) -> None:
        self._watched(phase, 0.0, lambda: self._inner.publish(phase, document))

    def receive(self, phase: str, timeout_s: float) -> exchange.Document:
        return self._watched(phase, timeout_s, lambda: self._inner.receive(phase, timeout_s))

    def forget(self, phases: Sequence[str]) -> None:
        self._watched("forget", 0.0, lambda: self._inner.forget(phases))

    def _watched(self, phase: str, timeout_s: float, call: Callable[[], T]) -> T:
        self._watch.begins(exchange.PEERS, phase, timeout_s + ANSWER_S)
        try:
            return call()
        except BarrierTimeout as err:
            if self._moved():
                raise exchange.StoreLost(f"other pods do not meet in the job's store any more: {err}") from err
            raise
        finally:
            self._watch.idle()
