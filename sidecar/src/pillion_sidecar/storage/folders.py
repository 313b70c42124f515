"""
Makes folders that survive a crash of the machine. Called from: all code that makes a folder in a file system.
"""

from __future__ import annotations

import contextlib
import os

from pillion_sidecar.storage import durable, late_names


def make(path: str) -> None:
    """
    Make a folder, and the missing folders above it. Make each new name durable in the folder above.

    A durable folder is still lost with a parent whose name is not durable.

    Blocks: until the storage answers; up to late_names.LATE_S for a folder that another pod has made and that does not show yet.

    Raises:
        FileExistsError: the path is not a folder, or the other pod's folder does not appear.
        OSError: with errno and filename.
    """
    missing = []
    at = os.path.abspath(path)
    while not os.path.isdir(at) and at != os.path.dirname(at):
        missing.append(at)
        at = os.path.dirname(at)
    _make(path)
    for made in reversed(missing):
        # A folder without read permission cannot be synced. Writes into it may still succeed.
        with contextlib.suppress(PermissionError):
            durable.fsync_directory(os.path.dirname(made))


def _make(path: str) -> None:
    for is_last in late_names.looks():
        try:
            os.makedirs(path, exist_ok=True)
            return
        except (FileExistsError, FileNotFoundError):
            # The folder, or one above it, exists and does not appear yet. Or another process has just removed it.
            if os.path.lexists(path) or is_last:
                raise
