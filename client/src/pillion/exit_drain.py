"""
The interpreter's exit while saves are in flight: it waits for them, and reports lost saves by its exit status.

Called from: `Checkpointer`, `pillion.dcp`. A job whose last checkpoint was lost must not look complete. An exception in an atexit hook
cannot change the exit status, so this module ends the process itself, after it has flushed the streams.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, Protocol

from pillion.handle import SaveHandle

EXIT_LOST: Final = 74
"""Exit status (EX_IOERR) of a process that lost a save."""


class Saving(Protocol):
    """An object with saves in flight."""

    def close(self) -> None:
        """Wait for the saves in flight, and call `closed`. Idempotent. Blocks: up to the policy's drain.timeoutSeconds."""


_open: weakref.WeakKeyDictionary[Saving, int] = weakref.WeakKeyDictionary()
"""Objects to close -> the process that must close them. A forked child runs this hook as well, at its own exit."""
_lost: list[SaveHandle] = []
"""Saves of closed objects that did not reach storage."""
_status: object = None
"""Argument of the last call of `sys.exit`."""
_registered = threading.Event()


def drain_at_exit(saving: Saving) -> None:
    """Close `saving` at the interpreter's exit, unless the script has closed it. The caller keeps `saving` alive."""
    _open[saving] = os.getpid()
    if not _registered.is_set():
        _registered.set()
        atexit.register(_drain_open)
        sys.exit = _noting_exit(sys.exit)


def closed(saving: Saving, handles: Sequence[SaveHandle]) -> None:
    """
    Note that `saving` was closed. The interpreter's exit reports the lost saves among `handles` that the script has not looked at.

    Args:
        saving: the closed object.
        handles: the saves that were in flight, and the last save to storage.
    """
    _open.pop(saving, None)
    _lost.extend(handle for handle in handles if handle.error() is not None and handle not in _lost)


def by_exception() -> bool:
    """
    Whether the interpreter exits by an uncaught exception, or by `sys.exit` with a status other than 0. Then a restart may follow.

    For an exception, Python has set `last_value` before atexit hooks run. It keeps no record of `sys.exit`, so this module wraps it.
    """
    return getattr(sys, "last_value", None) is not None or not is_success(_status)


def is_success(status: object) -> bool:
    """Whether `sys.exit(status)` ends with the status 0."""
    return status is None or (isinstance(status, int) and status == 0)


def _noting_exit(exit_: Callable[[Any], NoReturn]) -> Callable[..., NoReturn]:
    @functools.wraps(exit_)
    def noted(status: object = None, /) -> NoReturn:
        global _status
        # In another thread, `sys.exit` ends only that thread.
        if threading.current_thread() is threading.main_thread():
            _status = status
        exit_(status)

    return noted


def lost_saves() -> list[str]:
    """Return step and error of each lost save of this process that the script has not looked at."""
    return [f"step {each.step}: {each.error()}" for each in _lost if not each.examined and not each.inherited]


def _drain_open() -> None:
    for saving in [each for each, pid in list(_open.items()) if pid == os.getpid()]:
        saving.close()
    lost = lost_saves()
    if lost:
        print("pillion: saves lost at exit: " + "; ".join(lost), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_LOST)
