"""
The whole of: what Pillion logs while a test looks.

Called from: tests that run in a forked rank, where pytest's own capture is not.
Must never: change what is logged.
"""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of Pillion in this process."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign] # the shortest handler
    logging.getLogger("pillion").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("pillion").removeHandler(handler)
