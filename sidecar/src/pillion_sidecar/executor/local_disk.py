"""
This pod's local disk as the executor uses it: the copies on it (`copies.disk`), whether it can be used, and the thread that writes to it.

Called from: `executor.session` (opens it), `executor.save.hold`, `executor.save.upload`, `executor.load.nearby`.

A disk that is full, broken or hangs never fails a save: it is left out, and the log says so. A write that hangs has a thread of its own, which
nobody waits for longer than SILENT_S. While that thread hangs, no other write begins.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Final, TypeVar, final

from pillion.wire import remarks
from pillion.wire.remarks import Remarks
from pillion_sidecar import channel
from pillion_sidecar.copies.disk import Disk

_log = logging.getLogger(__name__)
T = TypeVar("T")

SILENT_S: Final = 20.0
"""Timeout for the local disk to take one block. A local disk takes milliseconds. A save that waits longer for it than this is better written
to storage at once."""
SLOWEST_BYTES_PER_S: Final = 50e6
"""Rate by which the timeout of a sync grows with its bytes: a tenth of a slow local disk."""
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@final
class LocalDisk:
    """See the module."""

    def __init__(self, copies: Disk) -> None:
        self.copies = copies
        self.problem = ""
        """Why the disk cannot be used in this session; empty: it can, as far as is known."""
        self._writing: threading.Thread | None = None
        self._began = self._deadline = 0.0
        self._given_up = False
        """Whether nobody waits for the work of `_writing` any more. What it was given, such as a slot, may have another content since."""
        self._lock = threading.Lock()

    @classmethod
    def open(cls, asked: channel.Open) -> LocalDisk:
        """Return the disk of a session. No I/O."""
        return cls(Disk(asked.local, asked.local_ranks, asked.world_size, asked.run_id))

    def take_up(self, line: str) -> None:
        """
        Take up the copies that earlier sessions of the same root have left on this node.

        Args:
            line: what all sessions of the root have in common (`checkpoint.ownership.Record.line`).

        Blocks: up to SILENT_S. Never raises: the disk is then left out, see `problem`.
        """

        if not line:
            # Whose the copies are cannot be said, and they may be the only ones.
            self.problem = "the root's record of this session cannot be read"
            _log.error("the local disk is left out: %s", self.problem)
            return

        def look() -> bool:
            return self.copies.belong_to(line)

        try:
            if not self.run(look):
                _log.warning("the copies in %s were of another training, and are removed", self.copies.directory)
        except OSError as err:
            self.problem = f"{err.strerror or err} ({err.filename or self.copies.directory})"
            _log.error("the local disk is left out: %s", self.problem)

    def remarks(self, step: int) -> Remarks:
        """Return what the script said about the save of the newest copy of a step. Never raises."""

        def look() -> Remarks:
            newest = max(copy for copy in self.copies.copies() if copy.step == step)
            return remarks.read(self.copies.head(self.copies.ranks[0], newest).remarks)

        try:
            return self.run(look)
        except (OSError, ValueError):
            return Remarks()  # the load finds the damage

    def run(self, work: Callable[[], T]) -> T:
        """
        Do something on the disk, in a thread of its own. The work calls `moved` when the disk has answered. After a call that returns, the
        work is not given up for another SILENT_S.

        Blocks: until the disk has not answered for SILENT_S.

        Raises:
            OSError: of the work; or the disk does not answer, now or since an earlier call.
        """
        if self._writing is not None and self._writing.is_alive():
            raise self._hangs()
        done: futures.Future[T] = futures.Future()
        self._began, self._given_up = time.monotonic(), False
        self._writing = threading.Thread(target=_settle, args=(done, work), name="pillion-local", daemon=True)
        self.moved()
        self._writing.start()
        while not futures.wait([done], timeout=self._deadline - time.monotonic()).done:
            with self._lock:
                if time.monotonic() >= self._deadline:
                    self._given_up = True
                    raise self._hangs()
        return done.result()

    def moved(self, size_bytes: int = 0) -> None:
        """
        Note that the disk has answered, and that it makes `size_bytes` durable next.

        Raises:
            OSError: the disk was silent for too long, and nobody waits for this work. It ends here: its slot may belong to a newer step.
        """
        with self._lock:
            if self._given_up:
                raise self._hangs()
            self._deadline = time.monotonic() + SILENT_S + size_bytes / SLOWEST_BYTES_PER_S

    def _hangs(self) -> OSError:
        silent_s = time.monotonic() - self._began
        return OSError(errno.ETIMEDOUT, f"it has not answered for {silent_s:.0f} s", self.copies.directory)


def _settle(done: futures.Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as err:  # a boundary: the caller gets it
        done.set_exception(err)
    else:
        done.set_result(result)
