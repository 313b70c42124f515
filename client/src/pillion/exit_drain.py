"""
The interpreter's end while saves are in flight: they are drained, and what is lost is told by the exit status.

Called from: `Checkpointer`, `pillion.dcp`. A job whose last checkpoint was lost must not look complete; atexit cannot change the
exit status by an exception, so the process ends here, after the streams are flushed.
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
"""Exit status (EX_IOERR) of an interpreter that ends while a save is lost."""


class Saving(Protocol):
    """Somebody with saves in flight."""

    def close(self) -> None:
        """Drain what is in flight, and call `closed`; idempotent. Blocks: up to the policy's drain.timeoutSeconds."""


_open: weakref.WeakKeyDictionary[Saving, int] = weakref.WeakKeyDictionary()
"""Who has to be closed, and the process that has to: a forked child runs this hook too, at its own end."""
_lost: list[SaveHandle] = []
"""Of those that were closed, the saves that did not reach storage."""
_status: object = None
"""What `sys.exit` was called with last."""
_registered = threading.Event()


def drain_at_exit(saving: Saving) -> None:
    """Have `saving` closed when the interpreter ends without having closed it. Whoever registers keeps it alive."""
    _open[saving] = os.getpid()
    if not _registered.is_set():
        _registered.set()
        atexit.register(_drain_open)
        sys.exit = _noting_exit(sys.exit)


def closed(saving: Saving, handles: Sequence[SaveHandle]) -> None:
    """
    It was closed. `handles`: those that were in flight, and that of the last save to storage; of the ones that are lost, and that nobody has
    asked about, the interpreter's end tells.
    """
    _open.pop(saving, None)
    _lost.extend(handle for handle in handles if handle.error() is not None and handle not in _lost)


def by_exception() -> bool:
    """
    Whether the interpreter ends by an uncaught exception, or by `sys.exit` with a status that is not 0: a restart may come. Of the one Python
    has set `last_value` when atexit runs; of the other it says nothing, so that `sys.exit` is noted where it is called.
    """
    return getattr(sys, "last_value", None) is not None or not is_success(_status)


def is_success(status: object) -> bool:
    """Whether `sys.exit(status)` ends with the status 0."""
    return status is None or (isinstance(status, int) and status == 0)


def _noting_exit(exit_: Callable[[Any], NoReturn]) -> Callable[..., NoReturn]:
    @functools.wraps(exit_)
    def noted(status: object = None, /) -> NoReturn:
        global _status
        # In another thread it ends that thread alone.
        if threading.current_thread() is threading.main_thread():
            _status = status
        exit_(status)

    return noted


def lost_saves() -> list[str]:
    """Steps and errors of the saves of this process that were lost, and that nobody has asked about."""
    return [f"step {each.step}: {each.error()}" for each in _lost if not each.asked and not each.inherited]


def _drain_open() -> None:
    for saving in [each for each, pid in list(_open.items()) if pid == os.getpid()]:
        saving.close()
    lost = lost_saves()
    if lost:
        print("pillion: saves lost at exit: " + "; ".join(lost), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_LOST)
