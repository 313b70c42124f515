"""
Futures whose callbacks may take an hour, save, load, or raise anything.

Called from: `handle`, `pillion.dcp`. The thread that listens to the sidecar resolves these futures, and waiting callers return at once.
User callbacks run one after another in a separate thread, so a slow callback delays only other callbacks.
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
"""Timeout for callbacks at the end of a session. At the end of a run a callback takes seconds (a log line, passing on the name of a
checkpoint). A longer one continues until the interpreter's exit ends it."""

IDLE_S: Final = 2.0
"""Lifetime of the idle thread, when no callback is due or promised. The saves of a busy run keep the thread."""


class Outcome(futures.Future[T]):
    """
    A future that cannot be cancelled, as another process does the work.

    Args:
        on_examined: called when a caller has read the outcome.
    """

    def __init__(self, on_examined: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._on_examined = on_examined
        self.waiting = 0
        """Number of threads that wait in `result` or `exception` now. For a log line, so that a lost update does no harm."""
        self.set_running_or_notify_cancel()

    def add_done_callback(self, fn: Callable[[futures.Future[T]], object]) -> None:
        """Call `fn` in the thread of callbacks. At the interpreter's exit, when no thread can start, `fn` runs in the resolving thread."""
        caller = _promised()
        if caller is None:
            super().add_done_callback(fn)
            return
        super().add_done_callback(lambda done: caller.call(fn, done))

    def result(self, timeout: float | None = None) -> T:
        self.waiting += 1
        try:
            return super().result(timeout)
        finally:
            self.waiting -= 1
            self._note()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.waiting += 1
        try:
            return super().exception(timeout)
        finally:
            self.waiting -= 1
            self._note()

    def _note(self) -> None:
        if self.done():
            self._on_examined()


class _Caller:
    """
    One daemon thread and its queue of calls. It starts with the first registered callback, because no thread can start at the
    interpreter's exit. It ends IDLE_S after the last registered callback has run.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.promised = 0
        """Number of callbacks that are due or registered. Guarded by the module's lock."""
        self._due: queue.SimpleQueue[tuple[Callable[[Any], object], Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pillion-callbacks", daemon=True)
        self._thread.start()

    def call(self, callback: Callable[[Any], object], argument: object) -> None:
        self._due.put((callback, argument))

    def drain(self, timeout_s: float) -> bool:
        if self._thread is threading.current_thread():
            return True  # a callback closes the session: the callbacks behind it run after it returns
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
            # Released before the next `get`, as the callback may hold a state dict.
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
    """Return this process's caller, with one more callback registered. None if the interpreter exits and no thread can start."""
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


def run(call: Callable[[], object]) -> None:
    """Call `call` in the thread of callbacks, behind those that are due. Never, if the interpreter exits and no thread can start."""
    caller = _promised()
    if caller is not None:
        caller.call(lambda _: call(), None)


def _forget_in_child() -> None:
    global _caller, _lock
    _caller, _lock = None, threading.Lock()


# After a fork, only the parent has the thread.
os.register_at_fork(after_in_child=_forget_in_child)


def drain() -> None:
    """Wait for the callbacks that are due. Blocks: up to DRAIN_S; never if there are none, or within a callback."""
    caller = _caller
    if caller is not None and caller.pid == os.getpid() and not caller.drain(DRAIN_S):
        _log.warning(
            "pillion: done-callbacks of saves are still running after %.0f s; closing without waiting for them", DRAIN_S
        )
