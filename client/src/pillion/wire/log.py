"""
The format of a log line: one JSON object, with the same keys from sidecar and operator.

Producer: sidecar and operator, on stderr. Consumer: the log collection of a cluster.
Breaking: renaming `time`, `level`, `logger`, `message`, `traceback`, or a field in the list of either side. Not breaking: a new field.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import Final

TEXT_LIMIT: Final = 2000
"""Maximum length of message and traceback, characters. An error may contain a long answer of a storage or an API server."""


class JsonFormatter(logging.Formatter):
    """
    Formats a record as a line.

    Args:
        fields: names of the structured fields. The line has a record's `extra` values under these names, and no other `extra` value.
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
        # Values that JSON cannot represent become text, so that logging never fails.
        return json.dumps(entry, default=str)


def to_stderr(fields: Iterable[str]) -> logging.Handler:
    """Return a handler that writes such lines to this process's stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(fields))
    return handler
