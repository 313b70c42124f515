"""
Creates files in the runtime directory. In a pod the trainers may write there as well, as another user.

Called from: the modules that create such files. An existing file of that name is replaced. A link is never followed, because a trainer's link
could make the sidecar write to, or open for everybody, a file that only the sidecar can reach.
"""

from __future__ import annotations

import contextlib
import os


def create(path: str, mode: int) -> int:
    """
    Create a new file at `path`, in place of an existing one. Return its descriptor, for reading and writing.

    Args:
        path: path in the runtime directory.
        mode: permissions of the file, whatever the umask.

    Raises:
        FileExistsError: another process has created a file of that name at the same moment.
        OSError: the directory cannot be written, or `path` is a directory.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, mode)
    return fd
