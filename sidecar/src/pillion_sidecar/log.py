"""
The sidecar's log: one JSON object a line on stderr, with field names from one list.

Called from: `__main__` (set-up) and everywhere through `logging`. Never logs user state.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from enum import StrEnum
from typing import Final

TEXT_LIMIT: Final = 2000
"""Longest message, characters: an error may carry what a storage answered."""


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


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage()[:TEXT_LIMIT],
        }
        for name in Field:
            value = getattr(record, name, None)
            if value is not None:
                entry[name] = value
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)[-TEXT_LIMIT:]
        return json.dumps(entry)


def configure(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger("pillion_sidecar")
    root.handlers = [handler]
    root.setLevel(level)
    root.propagate = False
