"""
Removes abandoned arenas: those of sidecars that were killed, or ended before their newest snapshot was on storage.

Called from: `app`, in a thread, when an embedded sidecar starts. Otherwise that memory would stay taken until the next boot.
Must never: remove an arena that a process holds (the lock of its sidecar, the lease of a segment), that belongs to another user, or that
has changed within KEPT_S. Restarted trainers of its root would adopt it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import time
from typing import Final

from pillion.wire import names

_log = logging.getLogger(__name__)

KEPT_S: Final = 24 * 3600.0
"""Time after its last change for which an arena is kept for its trainers. A job that ended at night is started again the next day."""


def remove(base: str, *, but: str, now_s: float | None = None) -> list[str]:
    """
    Remove every runtime directory of this user below `base` that no process holds and that has not changed for KEPT_S.

    Args:
        base: the tmpfs.
        but: the caller's own runtime directory.
        now_s: time in seconds since 1970. None: the current time.

    Blocks: about 0.1 s for each GiB.

    Returns:
        The removed directories.
    """
    now_s = time.time() if now_s is None else now_s
    prefix = f"{names.RUNTIME_PREFIX}{os.getuid()}-"
    removed = []
    try:
        paths = [os.path.join(base, name) for name in os.listdir(base) if name.startswith(prefix)]
    except OSError:
        return []
    for path in paths:
        with contextlib.suppress(OSError):
            if path != but and _is_old(path, now_s) and _remove(path):
                _log.warning(
                    "removed the abandoned arena %s: no process holds it, and nothing has changed in it for %.0f h",
                    path,
                    KEPT_S / 3600,
                )
                removed.append(path)
    return removed


def _is_old(path: str, now_s: float) -> bool:
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    times = [status.st_mtime, *(os.lstat(os.path.join(path, name)).st_mtime for name in os.listdir(path))]
    return now_s - max(times) > KEPT_S


def _remove(path: str) -> bool:
    with contextlib.ExitStack() as held:
        # The lock is taken first and kept to the end, as a sidecar does. A sidecar that starts meanwhile then creates a new directory.
        taken = [_take(os.path.join(path, names.SIDECAR_LOCK), held, os.O_CREAT)]
        taken += [_take(os.path.join(path, name), held) for name in os.listdir(path) if name.endswith(".arena")]
        if not all(taken):
            return False
        shutil.rmtree(path)
        return True


def _take(path: str, held: contextlib.ExitStack, flags: int = 0) -> bool:
    """Lock a file exclusively. Return False if another process has a lock on it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    held.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
