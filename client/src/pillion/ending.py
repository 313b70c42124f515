"""
The interpreter's end while saves are in flight: they are drained, and what is lost is told by the exit status.

Called from: `Checkpointer`, `pillion.dcp`. A job whose last checkpoint was lost must not look complete; atexit cannot change the
exit status by an exception, so the process ends here, after the streams are flushed.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Final, Protocol

from pillion.handle import SaveHandle

EXIT_LOST: Final = 74
"""Exit status (EX_IOERR) of an interpreter that ends while a save is lost."""


class Saving(Protocol):
    """Somebody with saves in flight."""

    def in_flight(self) -> Sequence[SaveHandle]:
        """The handles that are not done."""

    def close(self) -> None:
        """Drain them; idempotent. Afterwards each is done. Blocks: up to the policy's drain.timeoutSeconds."""


_open: weakref.WeakKeyDictionary[Saving, int] = weakref.WeakKeyDictionary()
"""Who has to be closed, and the process that has to: a forked child runs this hook too, at its own end."""
_registered = threading.Event()


def drain_at_exit(saving: Saving) -> None:
    """Have `saving` closed when the interpreter ends without having closed it. Whoever registers keeps it alive."""
    _open[saving] = os.getpid()
    if not _registered.is_set():
        _registered.set()
        atexit.register(_drain_open)


def closed(saving: Saving) -> None:
    """It was closed: nothing is left to do for it at the end."""
    _open.pop(saving, None)


def by_exception() -> bool:
    """Whether the interpreter ends by an uncaught exception: it has set `last_value` when atexit runs."""
    return getattr(sys, "last_value", None) is not None


def _drain_open() -> None:
    lost: list[str] = []
    for saving in [each for each, pid in list(_open.items()) if pid == os.getpid()]:
        handles = saving.in_flight()
        saving.close()
        for handle in handles:
            error = handle.committed.exception(0) if handle.committed.done() else None
            if error is not None:
                lost.append(f"step {handle.step}: {error}")
    if lost:
        print("pillion: saves lost at exit: " + "; ".join(lost), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_LOST)
