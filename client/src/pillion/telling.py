"""
Tells the script of commits and failures: rank 0, each once, in the thread of callbacks.

Called from: `Checkpointer`. A save is told by its handle. A commit without a handle (of a snapshot that was rescued after its trainer died, or of
a save that a later sidecar finished) is found by a question to the sidecar, which keeps a note on the root of what was told.
Must never: let an error of the script's functions reach training. The log has it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, Final

from pillion import callbacks
from pillion.errors import PillionError
from pillion.handle import Checkpoint, SaveHandle
from pillion.session import Session
from pillion.wire import control, remarks

_log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S: Final = 60.0
"""Timeout for an answer of the sidecar, which reads or writes the root for it. Only the thread of callbacks waits."""

OnCommit = Callable[[Checkpoint], object]
OnFailure = Callable[[int, BaseException], object]


class Teller:
    """
    See the module.

    Args:
        session: this rank's session.
        on_commit: called with each committed checkpoint. None: nobody wants to know.
        on_failure: called with the step and the error of each save to storage that failed. None: nobody wants to know.
    """

    def __init__(self, session: Session, on_commit: OnCommit | None, on_failure: OnFailure | None) -> None:
        first = session.group.rank == 0
        self._session = session
        self._on_commit = on_commit if first else None
        self._on_failure = on_failure if first else None
        self._lock = threading.Lock()
        self._watched: dict[int, SaveHandle] = {}
        """Saves whose outcome is not told yet. Their own handles tell them."""
        self._told: set[int] = set()
        """Steps of this process that were told. Only the handle of a new save of such a step tells it again."""

    @property
    def tells(self) -> bool:
        """Whether anybody on this rank wants to know anything."""
        return self._on_commit is not None or self._on_failure is not None

    def watch(self, handle: SaveHandle) -> None:
        """Tell the outcome of a save to storage."""
        if not self.tells:
            return
        with self._lock:
            self._watched[handle.step] = handle
        handle.committed.add_done_callback(lambda done: self._ended(handle, done))

    def look(self) -> None:
        """Tell the commits without a handle, in the thread of callbacks. Blocks: never."""
        if self._on_commit is not None:
            callbacks.run(self._look)

    def _ended(self, handle: SaveHandle, done: futures.Future[Checkpoint]) -> None:
        # Not the future's own method, which would count as the script's look at the outcome.
        error = futures.Future.exception(done)
        try:
            if error is None:
                self._tell(futures.Future.result(done))
            elif self._on_failure is not None:
                handle.note_examined()
                self._call(self._on_failure, handle.step, error)
        finally:
            with self._lock:
                if self._watched.get(handle.step) is handle:
                    del self._watched[handle.step]

    def _tell(self, checkpoint: Checkpoint) -> None:
        if self._on_commit is None:
            return
        with self._lock:
            self._told.add(checkpoint.step)
        self._call(self._on_commit, checkpoint)
        try:
            self._session.request(control.Told(step=checkpoint.step), ANSWER_TIMEOUT_S)
        except (PillionError, TimeoutError) as err:
            _log.warning(
                "pillion: on_commit was called for step %d, and may be called for it again after a restart: %s",
                checkpoint.step,
                err,
            )

    def _look(self) -> None:
        try:
            answer = self._session.request(control.FindUntold(), ANSWER_TIMEOUT_S)
        except (PillionError, TimeoutError) as err:
            _log.warning("pillion: commits after the last trainer's death are not told: %s", err)
            return
        for each in answer.checkpoints:
            with self._lock:
                known = each.step in self._watched or each.step in self._told
            if not known and each.step is not None:
                said = remarks.read(each.remarks)
                self._tell(
                    Checkpoint(
                        step=each.step,
                        path=each.path,
                        size_bytes=each.size_bytes,
                        metrics=said.metrics,
                        metadata=said.metadata,
                    )
                )

    @staticmethod
    def _call(function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException:  # a boundary: the script's function, in a thread that others need
            _log.exception("pillion: %s raised", getattr(function, "__qualname__", function))
