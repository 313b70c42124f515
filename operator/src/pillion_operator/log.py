"""
The operator's log: lines of `wire.log` on stderr, with field names from one list.

Called from: `__main__` (set-up) and everywhere through `logging`. Must never: hold a token, a key or a whole object.
"""

import logging
from enum import StrEnum
from typing import Final

from pillion.wire import log

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


def configure(level: str, *others: str) -> None:
    """
    Send every log of this process to stderr.

    Args:
        level: of the operator's loggers and those in `others`; all others log warnings only.
        others: loggers of libraries that log at the same level.
    """
    root = logging.getLogger()
    root.handlers = [log.to_stderr(Field)]
    root.setLevel(logging.WARNING)
    for name in (_OURS, *others):
        logging.getLogger(name).setLevel(level)
