"""
Ends a trainer whose pod is deleted, if the trainer does not end by itself.

Called from: `session`, in the listening thread, when the sidecar reports that the last save is on storage. The kernel does not deliver
a SIGTERM without a handler to a container's first process, and a shell in front of the trainer forwards none. Such a process would train
on until the kubelet kills it.

    SystemExit(143) in the main thread, so that `with` blocks, `finally` and atexit hooks run --> END_BOUND_S --> the process ends as it is

Must never: end a process that has its own handler for SIGTERM, in Python or not. That handler has run, and decides.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from typing import Final

EXIT_TERMINATED: Final = 143
"""Exit status of a process that SIGTERM ended, as shells report it (128 + 15)."""
END_BOUND_S: Final = 10.0
"""Timeout for the trainer's own exit. A main thread in a collective whose peers are gone never runs the exception. The last save is on
storage, and the pod's deletion waits meanwhile."""
FLUSH_BOUND_S: Final = 1.0
"""Timeout for flushing the trainer's output. A pipe without a reader must not keep the process alive."""

_stopping = threading.Event()


class Terminated(SystemExit):
    """Raised in the main thread: the pod is being deleted, and the last save is on storage."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


def ends_by_itself() -> bool:
    """Whether the process has set a disposition for SIGTERM. (`getsignal` returns None for a handler that Python did not set.)"""
    return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def stop() -> bool:
    """
    End this process within END_BOUND_S. Returns whether it will end. Blocks: never.

    Called from: any thread but the main one. Further calls do nothing.
    """
    if ends_by_itself() or _stopping.is_set():
        return False
    _stopping.set()
    print(
        f"pillion: the pod is being deleted, and the last save is on storage: ending this process with status {EXIT_TERMINATED}"
        " (drain.endTrainer)",
        file=sys.stderr,
        flush=True,
    )
    if sys.version_info < (3, 12):
        atexit.register(_leave, os.getpid())
    main = threading.main_thread().ident
    if main is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(Terminated))
    threading.Thread(target=_end, name="pillion-end", daemon=True).start()
    return True


def _leave(pid: int) -> None:
    """
    Run the atexit hooks, and end with EXIT_TERMINATED.

    Python 3.11 instantiates an exception set by another thread only when a handler catches it. Without a handler it exits with status 0
    (CPython's `handle_system_exit`), and the Job would look complete.
    """
    if pid == os.getpid():
        atexit.unregister(_leave)
        atexit._run_exitfuncs()
        _flush()
        os._exit(EXIT_TERMINATED)


def _end() -> None:
    # Waits only for the timeout. This is a daemon thread, so the interpreter's exit stops it.
    threading.Event().wait(END_BOUND_S)
    flushing = threading.Thread(target=_flush, name="pillion-flush", daemon=True)
    with contextlib.suppress(RuntimeError):
        flushing.start()
        flushing.join(FLUSH_BOUND_S)
    os._exit(EXIT_TERMINATED)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
