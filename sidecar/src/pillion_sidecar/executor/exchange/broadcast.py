"""
Signals: small messages to all pods of a job, in the same order everywhere. They announce, decline or request saves and changes.

Called from: `executor.worker`. It has a separate store client, because the exchange's client may wait for a peer for minutes. Each pod checks for
the next message a few times a second. The training path does not use this module.

A message reaches all pods or none. Nothing is sent before every pod listens; otherwise some ranks would know of a change and others not, and
they would save at different steps. The successor of an executor continues with the first message that its predecessor did not deliver.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pillion.errors import SidecarError
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.exchange.store_client import Store

_log = logging.getLogger(__name__)

POLL_S: Final = 0.5
"""Pause between two checks for a message. A check takes two requests. An announcement with a lead of checkpointer.LEAD_PODS_S (2 s) arrives in
time. 1,000 pods send the store 4,000 requests a second, a fifth of its capacity."""
KEPT_MESSAGES: Final = 64
"""Maximum messages that stay in the store, for pods that check late."""
KEY: Final = "signals"
LISTENING: Final = "listening"


class Signals:
    """
    Sends and receives the signals of one pod.

    Args:
        store: the store, with the session's prefix.
        on_message: called with the number and the content of each message, in order.
        pods: the first rank of every pod.
        first_rank: the first rank of this pod.
        seen: number of the last message that this pod has delivered. None: it receives messages from now on.
        on_lost: called once, in the receiving thread, when the store is gone.

    Owns: the receiving thread, until `close`.
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

    def send(self, message: Mapping[str, Any]) -> None:
        """
        Send a message to every pod, including this one.

        Blocks: for a few round trips to the store.

        Raises:
            SidecarError: a pod does not listen yet. Nothing was sent.
            RuntimeError: the store is gone.
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
                    # The coordinator has deleted the key, because the session is over. `add` would create it again.
                    return
                newest = self._store.add(KEY, 0)
                # A message that was already deleted is skipped.
                self._seen = max(self._seen, newest - KEPT_MESSAGES)
                while self._seen < newest and self._store.check([f"{KEY}/{self._seen + 1}"]):
                    self._seen += 1
                    self._on_message(self._seen, protocol.decode(self._store.get(f"{KEY}/{self._seen}")))
            except (RuntimeError, ValueError) as err:
                _log.warning("this pod no longer receives announcements of other pods: %s", str(err).splitlines()[0])
                if not self._closed.is_set():
                    self._on_lost()
                return

    def forget(self) -> None:
        """
        (coordinator) Delete the session's keys. The session is over in every pod.

        Raises:
            RuntimeError: the store is gone.
        """
        newest = self._store.add(KEY, 0)
        numbers = range(max(1, newest - KEPT_MESSAGES + 1), newest + 1)
        self._store.delete_keys([KEY, *self._listening, *(f"{KEY}/{number}" for number in numbers)])

    def close(self) -> None:
        """Stop receiving. Blocks: up to POLL_S and one round trip."""
        self._closed.set()
        self._thread.join(POLL_S * 10)
