"""
The sidecar's log: JSON lines (`wire.log`) on stderr, with field names from one list. Without a cluster, stderr is a file in the runtime
directory, which this module keeps short.

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
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final

from pillion.wire import log, names

MAX_BYTES: Final = 8 * 1024**2
"""Size at which an embedded sidecar's log, which is in memory, is rotated. A save writes two lines of 300 bytes, so this takes weeks."""
KEEP_TIMEOUT_S: Final = 5.0
"""Timeout for appending the log to the one on the root. Storage that hangs must not delay the sidecar's end."""
_APPEND: Final = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, open(sys.argv[1], 'ab'))"


class Field(StrEnum):
    """Names of the structured fields, passed as `extra={Field.STEP: 20}`."""

    RANK = "rank"
    STEP = "step"
    CHECKPOINT = "checkpoint_id"
    SLOT = "slot"
    BYTES = "bytes"
    ELAPSED = "elapsed_s"
    GENERATION = "generation"
    PID = "pid"


def configure(level: str) -> None:
    """Write the log of this package to stderr, from `level` on (DEBUG, INFO, WARNING, ERROR)."""
    root = logging.getLogger("pillion_sidecar")
    root.handlers = [log.to_stderr(Field)]
    root.setLevel(level)
    root.propagate = False


# --- the file of an embedded sidecar ---------------------------------------------------------------------------------


def tend(runtime_dir: str, fds: Sequence[int] = (1, 2)) -> None:
    """
    Rotate the log file if it is longer than MAX_BYTES. The older half becomes `sidecar.log.1`.

    Create the file again if it was removed: the previous sidecar may have removed the directory with this sidecar's log in it.

    Args:
        runtime_dir: directory of the log file.
        fds: descriptors that write to it. All refer to one open file.
    """
    status = os.fstat(fds[0])
    if not stat.S_ISREG(status.st_mode):
        return
    path = os.path.join(runtime_dir, names.SIDECAR_LOG)
    with contextlib.suppress(OSError):
        if status.st_nlink == 0:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for log_fd in fds:
                os.dup2(fd, log_fd)
            os.close(fd)
        elif status.st_size > MAX_BYTES:
            # Truncated in place, because the executor writes to the same open file. Both append, so no hole is left.
            shutil.copyfile(path, f"{path}.1")
            os.ftruncate(fds[0], 0)


def kept_name(first_rank: int) -> str:
    """Return the name of the log on the root of a sidecar that has ended."""
    return f"sidecar-{first_rank}.log"


def keep(runtime_dir: str, root: str, first_rank: int) -> None:
    """
    Append the log to ``<root>/.pillion/sidecar-<first rank>.log``, before its directory is removed.

    Blocks: up to KEEP_TIMEOUT_S. A separate process writes, because storage that hangs would keep this process from ending.
    """
    target = os.path.join(root, names.INTERNAL_DIR, kept_name(first_rank))
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


def hand_over(runtime_dir: str, append: Callable[[bytes], None]) -> None:
    """
    Call `append` with the log, for a root that is no directory.

    Blocks: up to KEEP_TIMEOUT_S. A daemon thread calls it; one that has not returned by then is left alone, and ends with the process.
    """

    def hand() -> None:
        # Storage that refuses it keeps nobody from ending: the log has said so before.
        with contextlib.suppress(OSError), open(os.path.join(runtime_dir, names.SIDECAR_LOG), "rb") as source:
            append(source.read())

    thread = threading.Thread(target=hand, name="pillion-log", daemon=True)
    thread.start()
    thread.join(KEEP_TIMEOUT_S)
