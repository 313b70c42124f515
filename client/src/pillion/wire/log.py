"""
A line of the log: one JSON object, the same keys from sidecar and operator.

Producer: sidecar and operator, on stderr. Consumer: whoever collects the logs of a cluster.
Breaking: renaming `time`, `level`, `logger`, `message`, `traceback` or a field of either side's list. Not breaking: a new field.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import Final

TEXT_LIMIT: Final = 2000
"""Longest message and traceback, characters: an error may carry what a storage or an API server answered."""


class JsonFormatter(logging.Formatter):
    """
    Makes a line of a record.

    Args:
        fields: names of the structured fields; what a record has under them by `extra` is in its line, all else of `extra` is not.
    """

    def __init__(self, fields: Iterable[str]) -> None:
        super().__init__()
        self._fields = tuple(str(name) for name in fields)

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage()[:TEXT_LIMIT],
        }
        for name in self._fields:
            value = getattr(record, name, None)
            if value is not None:
                entry[name] = value
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)[-TEXT_LIMIT:]
        # A value that JSON has no form for is said as text: a line of the log never fails.
        return json.dumps(entry, default=str)


def to_stderr(fields: Iterable[str]) -> logging.Handler:
    """A handler that writes such lines to this process's stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(fields))
    return handler
