"""
The whole of: one path that is another directory for each process: a mount namespace of its own, with a directory mounted over the path.

Called from: forked ranks and trainers of tests, as their first act; what they start inherits it. Needs root; `missing()` says so.
Must never: change the mounts of anybody else.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

_CLONE_NEWNS: Final = 0x00020000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18


def missing() -> str:
    """
    What is needed and not there; empty: nothing.
    """
    return "" if os.geteuid() == 0 else "mounting a directory needs root"


def lay_over(path: Path, directory: Path) -> None:
    """
    From now on `path` is `directory`, for this process and those that it starts.

    Raises:
      OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    done = (
        libc.unshare(_CLONE_NEWNS) == 0
        and libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
        and libc.mount(os.fsencode(directory), os.fsencode(path), None, _MS_BIND, None) == 0
    )
    if not done:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
