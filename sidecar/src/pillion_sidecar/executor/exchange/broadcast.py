"""
Small messages to all pods of a job, in one order: a save or a change announced for a step, declined, or asked for.

Called from: `executor.worker`. Over a store client of its own: the exchange's client may be waiting for a peer for minutes. Each
pod looks for the next message a few times a second; nothing here is on the training path.

A message reaches all pods or none: nothing is sent before every pod listens (ranks that heard of a change while others did not would
save at different steps), and the successor of an executor goes on with the message after the last one that its predecessor passed on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from pillion.errors import SidecarError
from pillion_sidecar.executor.exchange import protocol

_log = logging.getLogger(__name__)

POLL_S: Final = 0.5
"""Between two looks, of two questions each. With checkpointer.LEAD_PODS_S (2 s) ahead, an announcement is there in time; 1,000 pods then
ask the store 4,000 times a second, a fifth of what it answers."""
KEPT_MESSAGES: Final = 64
"""Messages that stay in the store for pods that look late."""
KEY: Final = "signals"
LISTENING: Final = "listening"


class Store(Protocol):
    """What is used of a `torch.distributed.Store`."""

    def add(self, key: str, amount: int) -> int: ...
    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...


class Signals:
    """
    One pod's end.

    Args:
        store: the session's prefix of the store.
        on_message: called with each message and its number, in their order.
        pods: the first rank of every pod.
        first_rank: this pod's.
        seen: number of the last message that this pod has heard; None: it hears what comes from now on.
        on_lost: called once, in the thread that looks, when the store is gone.

    Owns: a thread that looks for messages until `close`.
    """

    def __init__(
        self,
        store: Store,
        on_message: Callable[[int, protocol.Document], None],
        *,
        pods: Sequence[int],
        first_rank: int,
        seen: int | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._on_message = on_message
        self._on_lost = on_lost
        self._seen = self.begun = store.add(KEY, 0) if seen is None else seen
        store.set(f"{LISTENING}/{first_rank}", "")
        self._listening = tuple(f"{LISTENING}/{each}" for each in pods)
        self._awaited = list(self._listening)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pillion-signals", daemon=True)
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        """
        Tell every pod, this one too. Blocks: one round trip.

        Raises:
            SidecarError: some pod does not listen yet; nothing was sent.
            RuntimeError: the store is gone (torch's DistError is one).
        """
        if self._awaited and not self._store.check(self._awaited):
            raise SidecarError("not every pod of the job listens yet")
        self._awaited = []
        number = self._store.add(KEY, 1)
        self._store.set(f"{KEY}/{number}", protocol.encode(message).decode())
        if number > KEPT_MESSAGES:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"{KEY}/{number - KEPT_MESSAGES}")

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                if not self._store.check([KEY]):
                    # The coordinator has forgotten the session: it is over, and `add` would make the key anew.
                    return
                newest = self._store.add(KEY, 0)
                # A message that was deleted already, or whose sender died between its two steps, is passed over.
                self._seen = max(self._seen, newest - KEPT_MESSAGES)
                while self._seen < newest and self._store.check([f"{KEY}/{self._seen + 1}"]):
                    self._seen += 1
                    self._on_message(self._seen, protocol.decode(bytes(self._store.get(f"{KEY}/{self._seen}"))))
            except (RuntimeError, ValueError) as err:
                _log.warning("this pod no longer receives announcements of other pods: %s", str(err).splitlines()[0])
                if not self._closed.is_set():
                    self._on_lost()
                return

    def forget(self) -> None:
        """
        (coordinator) Delete the session's keys; it is over in every pod.

        Raises:
            RuntimeError: the store is gone.
        """
        newest = self._store.add(KEY, 0)
        numbers = range(max(1, newest - KEPT_MESSAGES + 1), newest + 1)
        for key in (KEY, *self._listening, *(f"{KEY}/{number}" for number in numbers)):
            self._store.delete_key(key)

    def close(self) -> None:
        """Stop looking. Blocks: up to POLL_S and one round trip."""
        self._closed.set()
        self._thread.join(POLL_S * 10)
