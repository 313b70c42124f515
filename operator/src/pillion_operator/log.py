"""
The operator's log: one JSON object a line on stderr, with field names from one list.

Called from: `__main__` (set-up) and everywhere through `logging`. Must never: hold a token, a key or a whole object.
"""

import json
import logging
import sys
import time
from enum import StrEnum
from typing import Final

TEXT_LIMIT: Final = 2000
"""Longest message, characters: a refusal may carry what an API server answered."""
_OURS: Final = "pillion_operator"


class Field(StrEnum):
    """Names of the structured fields; pass them as `extra={Field.POLICY: "llm"}`."""

    NAMESPACE = "namespace"
    POD = "pod"
    OWNER = "owner"
    POLICY = "policy"
    JOB = "job"
    DECISION = "decision"
    REASON = "reason"
    STEP = "step"
    CHECKPOINT = "checkpoint"
    PATH = "path"
    STATUS = "status"
    IDENTITY = "identity"
    EXPIRES = "expires"
    PORT = "port"
    ELAPSED = "elapsed_s"


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
        return json.dumps(entry, default=str)


def configure(level: str, *others: str) -> None:
    """
    Send every log of this process to stderr.

    Args:
        level: of our own, and of the loggers named in `others`; what else is there says its warnings.
        others: loggers of libraries whose words matter as much as ours.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in (_OURS, *others):
        logging.getLogger(name).setLevel(level)
