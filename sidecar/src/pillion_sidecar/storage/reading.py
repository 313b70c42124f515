"""
Reads of storage that are retried after an error. Called from: `checkpoint.catalog`, `executor.load.fill`, `executor.load.reshard`.

Only three facts show that a file itself is bad: it is missing, it is too short, or its digest differs. Any other error only shows that the
storage did not answer. Such a read is retried, and then ends the load. No older checkpoint is loaded in its place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, TypeVar

from pillion.errors import LoadError
from pillion_sidecar.storage.stretches import TruncatedFile

RETRY_AFTER_S: Final = (0.5, 2.0, 8.0)
"""Pauses before a failed read is retried, 10 s in all, for which training waits. Most errors of network storage pass within seconds."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


def retried(path: object, read: Callable[[], T]) -> T:
    """
    Call `read`, which reads `path` (a path, a URL or a folder), until the storage answers.

    Blocks: for the reads, and RETRY_AFTER_S between them.

    Raises:
        FileNotFoundError, TruncatedFile: at once, as they concern the file itself.
        LoadError: the storage failed each time. Names the file and the last error.
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
