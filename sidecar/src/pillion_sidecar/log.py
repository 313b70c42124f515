"""
The sidecar's log: lines of `wire.log` on stderr, with field names from one list.

Called from: `__main__` (set-up) and everywhere through `logging`. Never logs user state.
"""

from __future__ import annotations

import logging
from enum import StrEnum

from pillion.wire import log


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
