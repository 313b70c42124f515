"""
The sidecar's log: lines of `wire.log` on stderr, with field names from one list; and the file that stderr is in a run without a cluster.

Called from: `__main__` (set-up), `app` (the file), and everywhere through `logging`. Never logs user state.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from pillion.wire import log, names

MOST_BYTES: Final = 8 * 1024**2
"""Size at which an embedded sidecar's log is turned over: it lies in memory. A save is two lines of 300 bytes, so that this is weeks."""
KEEP_TIMEOUT_S: Final = 5.0
"""Bound for the log to be appended to the one on the root; a storage that hangs at the end must not hold the end up."""
_APPEND: Final = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, open(sys.argv[1], 'ab'))"


class Field(StrEnum):
    """Names of the structured fields; pass them as `extra={Field.STEP: 20}`."""

    RANK = "rank"
    STEP = "step"
    CHECKPOINT = "checkpoint_id"
    SLOT = "slot"
    BYTES = "bytes"
    ELAPSED = "elapsed_s"
    GENERATION = "generation"
    PID = "pid"


def configure(level: str) -> None:
    root = logging.getLogger("pillion_sidecar")
    root.handlers = [log.to_stderr(Field)]
    root.setLevel(level)
    root.propagate = False


# --- the file of an embedded sidecar ---------------------------------------------------------------------------------


def tend(runtime_dir: str, fds: Sequence[int] = (1, 2)) -> None:
    """
    Keep the log where people look for it, and within MOST_BYTES twice over: the older half is `sidecar.log.1`.

    The sidecar before this one may have removed the folder, and the file in it, that this one was started with.

    Args:
        runtime_dir: its folder.
        fds: the descriptors that write to it; all are one open file.
    """
    status = os.fstat(fds[0])
    if not stat.S_ISREG(status.st_mode):
        return
    path = os.path.join(runtime_dir, names.SIDECAR_LOG)
    with contextlib.suppress(OSError):
        if status.st_nlink == 0:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for each in fds:
                os.dup2(fd, each)
            os.close(fd)
        elif status.st_size > MOST_BYTES:
            # The executor writes to the same open file: it is emptied where it is. Both append, so that no hole is left.
            shutil.copyfile(path, f"{path}.1")
            os.ftruncate(fds[0], 0)


def keep(runtime_dir: str, root: str, first_rank: int) -> None:
    """
    Append the log to ``<root>/.pillion/sidecar-<first rank>.log``, before its folder is removed.

    Blocks: up to KEEP_TIMEOUT_S. A process of its own writes: one that storage holds for ever cannot be waited for at an end.
    """
    target = os.path.join(root, names.INTERNAL_DIR, f"sidecar-{first_rank}.log")
    with contextlib.suppress(OSError):
        with open(os.path.join(runtime_dir, names.SIDECAR_LOG), "rb") as source:
            writer = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _APPEND, target],
                stdin=source,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        reaper = threading.Thread(target=writer.wait, name="pillion-log", daemon=True)
        reaper.start()
        reaper.join(KEEP_TIMEOUT_S)
