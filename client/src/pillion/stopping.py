"""
The end of a trainer in a pod that is deleted, where the trainer does not end by itself.

Called from: `session`, in the thread that listens, once the sidecar says that the last save is on storage. The kernel keeps a SIGTERM without a
handler from a container's first process, and a shell in front of it passes none on: the process would train on until the kubelet kills it.

    SystemExit(143) in the main thread, so that `with` blocks, `finally` and atexit hooks run --> END_BOUND_S --> the process ends as it is

Must never: touch a process that has a handler of its own for SIGTERM, in Python or not: it has heard, and decides.
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
"""Exit status: that of a process that SIGTERM has ended, as a shell says it (128 + 15)."""
END_BOUND_S: Final = 10.0
"""How long the trainer may take to end by itself: a main thread in a collective whose peers are gone hears nothing, and the last save is on
storage. The pod is waited for meanwhile."""
FLUSH_BOUND_S: Final = 1.0
"""How long its output is flushed: a pipe whose reader is gone must not keep the process."""

_stopping = threading.Event()


class Terminated(SystemExit):
    """The pod ends, and what was saved is on storage."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


def ends_by_itself() -> bool:
    """Whether the process has said what SIGTERM does to it. None: something else than Python has."""
    return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def stop() -> bool:
    """
    Have this process end, within END_BOUND_S; whether it will. Blocks: never.

    Called from: any thread but the main one; once is enough.
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
    Run what is to run at exit, and end with the status.

    Python 3.11 makes no object of an exception that came from another thread until a handler sees it, and ends with status 0 where
    the script has none (CPython's `handle_system_exit`): the Job would look complete.
    """
    if pid == os.getpid():
        atexit.unregister(_leave)
        atexit._run_exitfuncs()
        _flush()
        os._exit(EXIT_TERMINATED)


def _end() -> None:
    # Waits for nothing else than the bound: at the interpreter's end daemon threads stop.
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
