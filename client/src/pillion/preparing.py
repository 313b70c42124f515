"""
Prepares the arena beside training, so that the slots are large enough before a save needs them.

Called from: `pillion.saving`, after a load, and after each save that was larger than the previous ones. One rank's slots take a second a
GiB to allocate and touch, and on a GPU some 0.1 s more to register. Without a load, the first save pays for its own slot; later saves
pay nothing. And once at the begin of a session: the pages that earlier trainers have left are mapped while the script builds its model, so that a
load from memory copies without a page fault for each 64 KiB. With the faults 1 GiB took 0.20 s, and without them 0.15 s.

A failure here is no error. The save that needs the room requests it itself, and reports errors.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pillion import devices
from pillion.errors import SidecarUnavailable
from pillion.session import Session
from pillion.wire import layout

_log = logging.getLogger(__name__)

END_TIMEOUT_S: Final = 30.0
"""Timeout for the thread's end after the session was closed. At most one call is left then, which maps 64 MiB or registers a GiB."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a save will need in every slot."""

    room_bytes: int
    layout: layout.Layout | None
    """None: nothing is known of the state yet."""
    devices: Sequence[torch.device]


WHAT_IS_THERE: Final = Need(room_bytes=0, layout=None, devices=())
"""The slots as they are, which an earlier trainer of this rank has filled. In a new arena they are empty, and nothing is to do."""


class Preparer:
    """
    Prepares the slots of one session.

    Owns: one thread while it prepares. Never two, as pages are registered once.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._next: Need | None = None
        self._closed = False
        self.room_bytes = 0
        """The largest room that was requested."""

    def begin(self, need: Need) -> None:
        """Prepare for `need`, after the current preparation. A newer need replaces a waiting one. Never blocks."""
        with self._lock:
            if self._closed:
                return
            self.room_bytes = max(self.room_bytes, need.room_bytes)
            self._next = need
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="pillion-prepare", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # a limit: the saves do it themselves
                    return
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                need, self._next = self._next, None
                if need is None or self._closed:
                    self._thread = None
                    return
            try:
                self._prepare(need)
            except SidecarUnavailable as err:
                _log.info("pillion: stopped preparing the arena ahead of the next save: %s", err)
            except (
                Exception
            ) as err:  # a boundary: nothing that goes wrong ahead of a save may end the trainer's thread of it
                _log.warning(
                    "pillion: could not prepare the arena ahead of the next save, which will do it itself: %s", err
                )

    def _prepare(self, need: Need) -> None:
        devices.use(need.devices)
        # Read before the request. If the mapping is replaced meanwhile, it raises, and the successor's sizes are not applied to it.
        mapping = self._session.mapping
        for slot, capacity_bytes in enumerate(self._session.reserve(need.room_bytes)):
            if mapping is not None:
                mapping.populate(slot, capacity_bytes, need.devices)
                if need.layout is not None:
                    mapping.warm(slot, need.layout)

    def close(self) -> None:
        """Begin no further preparation. The current one continues until the session is closed; see `join`."""
        with self._lock:
            self._closed = True

    def join(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """Wait for the thread. Blocks: up to `timeout_s`."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
