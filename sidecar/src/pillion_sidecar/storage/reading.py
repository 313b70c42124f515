"""
Reading what storage holds, where it may fail for a moment. Called from: `checkpoint.catalog`, `executor.load.fill`, `executor.load.reshard`.

Only three things say that a file itself is bad: it is not there, it is too short, or its digest differs. Any other error says that the
storage could not be asked: it is tried again, and then ends the load. An older checkpoint is not taken for it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final, TypeVar

from pillion.errors import LoadError
from pillion_sidecar.storage.directio import TruncatedFile

RETRY_AFTER_S: Final = (0.5, 2.0, 8.0)
"""Pauses before a failed read is tried again: most errors of network storage pass within seconds. 10 s in all, for which training waits."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


def retried(path: str, read: Callable[[], T]) -> T:
    """
    Call `read`, which reads `path`, until the storage answers.

    Blocks: for the reads, and RETRY_AFTER_S between them.

    Raises:
        FileNotFoundError, TruncatedFile: at once, as they say something about the file.
        LoadError: the storage failed each time; names the file and the last error.
    """
    for pause_s in (*RETRY_AFTER_S, None):
        try:
            return read()
        except (FileNotFoundError, TruncatedFile):
            raise
        except OSError as err:
            if pause_s is None:
                raise LoadError(
                    f"cannot read {path}: {err} ({len(RETRY_AFTER_S) + 1} tries). That says nothing about the checkpoint, so that no"
                    " older one is loaded for it; load(step=...) takes one by its number"
                ) from err
            _log.warning("reading %s is retried in %.1f s: %s", path, pause_s, err)
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def read_whole(path: str) -> bytes:
    """All of a small file. Raises: as `retried`."""

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    return retried(path, read)


def read_piece(path: str, offset: int, length: int) -> bytearray:
    """
    `length` bytes of a file from `offset` on.

    Raises: as `retried`; TruncatedFile where the file ends before.
    """

    def read() -> bytearray:
        # The length of the file first: one that a damaged manifest names may not fit into memory.
        with open(path, "rb") as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes < offset + length:
                raise TruncatedFile(path, wanted_bytes=offset + length, found_bytes=found_bytes)
            data = bytearray(length)
            done = 0
            while done < length:
                # One call moves at most 0x7ffff000 bytes, read(2).
                count = os.preadv(file.fileno(), [memoryview(data)[done:]], offset + done)
                if count == 0:
                    raise TruncatedFile(path, wanted_bytes=offset + length, found_bytes=offset + done)
                done += count
            return data

    return retried(path, read)
