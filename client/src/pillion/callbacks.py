"""
The whole of: futures whose callbacks may take an hour, save, load, or raise anything.

Called from: `handle`, `pillion.dcp`. The thread that listens to the sidecar ends these futures, and whoever waits for one goes on at once;
what users have it call back runs in a thread of its own, one after another, so that a slow callback holds up other callbacks alone.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any, Final, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")

DRAIN_S: Final = 30.0
"""How long the end of a session waits for callbacks that are due: what they do at the end of a run (a line in a log, the name of a checkpoint
handed on) takes seconds. One that takes longer goes on, and is ended with the interpreter."""

IDLE_S: Final = 2.0
"""How long the thread stays when nothing is to be called and nothing is promised: saves of a busy run keep it."""


class Outcome(futures.Future[T]):
    """
    A future that nobody can cancel, as another process does the work.

    Args:
        on_asked: called when somebody has learned how it ended.
    """

    def __init__(self, on_asked: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._on_asked = on_asked
        self.set_running_or_notify_cancel()

    def add_done_callback(self, fn: Callable[[futures.Future[T]], object]) -> None:
        """Have `fn` called in the thread of callbacks; at once and here where no thread can be started, at the interpreter's end."""
        caller = _promised()
        if caller is None:
            super().add_done_callback(fn)
            return
        super().add_done_callback(lambda done: caller.call(fn, done))

    def result(self, timeout: float | None = None) -> T:
        try:
            return super().result(timeout)
        finally:
            self._note()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        finally:
            self._note()

    def _note(self) -> None:
        if self.done():
            self._on_asked()


class _Caller:
    """
    One daemon thread, and what it is to call. It is started with the first promise of a call, as at the interpreter's end no thread can
    be, and lives until the last promise is kept and IDLE_S more.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.promised = 0
        """Calls that are due, or will be; under the module's lock."""
        self._due: queue.SimpleQueue[tuple[Callable[[Any], object], Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pillion-callbacks", daemon=True)
        self._thread.start()

    def call(self, callback: Callable[[Any], object], argument: object) -> None:
        self._due.put((callback, argument))

    def drain(self, timeout_s: float) -> bool:
        if self._thread is threading.current_thread():
            return True  # a callback that closes the session: the ones behind it come when it has returned
        ended = threading.Event()
        with _lock:
            if self.promised == 0:
                return True
            self.promised += 1
        self._due.put((lambda _: ended.set(), None))
        return ended.wait(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                callback, argument = self._due.get(timeout=IDLE_S)
            except queue.Empty:
                if self._leave():
                    return
                continue
            try:
                callback(argument)
            except BaseException:  # a boundary: CheckpointException and SystemExit end no thread that others need
                _log.exception("pillion: a done-callback of a save raised")
            # Not kept until the next one comes: it may hold a state dict.
            del callback, argument
            with _lock:
                self.promised -= 1

    def _leave(self) -> bool:
        global _caller
        with _lock:
            if self.promised:
                return False
            if _caller is self:
                _caller = None
            return True


_caller: _Caller | None = None
_lock = threading.Lock()


def _promised() -> _Caller | None:
    """The caller of this process, which stays until it has made one more call; None where the interpreter ends and starts no thread."""
    global _caller
    if sys.is_finalizing():
        return None
    with _lock:
        if _caller is None or _caller.pid != os.getpid():
            try:
                _caller = _Caller()
            except RuntimeError:
                return None
        _caller.promised += 1
        return _caller


def _forget_in_child() -> None:
    global _caller, _lock
    _caller, _lock = None, threading.Lock()


# The thread lives in the parent alone.
os.register_at_fork(after_in_child=_forget_in_child)


def drain() -> None:
    """Wait for the callbacks that are due. Blocks: up to DRAIN_S; not at all where there were none, or in a callback."""
    caller = _caller
    if caller is not None and caller.pid == os.getpid() and not caller.drain(DRAIN_S):
        _log.warning(
            "pillion: done-callbacks of saves are still running after %.0f s; closing without waiting for them", DRAIN_S
        )
