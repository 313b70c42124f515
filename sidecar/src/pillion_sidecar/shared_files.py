"""
Files that this process makes in the runtime directory, where in a pod the trainers may write too, as another user.

Called from: whoever lays a file there. What stands at the name already, a link of a trainer's among it, is replaced and never followed:
it would lead the sidecar to write, or to open for everybody, a file that only the sidecar reaches.
"""

from __future__ import annotations

import contextlib
import os


def create(path: str, mode: int) -> int:
    """
    Make a new file in the place of what was at `path`; its descriptor, for reading and writing.

    Args:
        path: in the runtime directory.
        mode: its permissions, whatever the umask.

    Raises:
        FileExistsError: somebody else made a file of that name at the same moment.
        OSError: the folder cannot be written, or there is a folder at `path`.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, mode)
    return fd
