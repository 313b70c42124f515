"""
Folders that survive a crash of the machine. Called from: whoever makes one on storage.
"""

from __future__ import annotations

import contextlib
import os

from pillion_sidecar.storage import durable


def make(path: str) -> None:
    """
    Make a folder and those above it that are missing, each one's name durable in the folder above: a checkpoint whose own folder is durable
    is lost with a parent that is not.

    Blocks: until the storage answers. Raises: OSError with errno and filename.
    """
    missing = []
    at = os.path.abspath(path)
    while not os.path.isdir(at) and at != os.path.dirname(at):
        missing.append(at)
        at = os.path.dirname(at)
    os.makedirs(path, exist_ok=True)
    for made in reversed(missing):
        # One that may not be read cannot be synced; it may be written all the same.
        with contextlib.suppress(PermissionError):
            durable.fsync_directory(os.path.dirname(made))
