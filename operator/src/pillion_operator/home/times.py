"""
The whole of: times in reports and objects: RFC 3339 text to seconds and back.

Called from: home and controller.
Must never: read a clock.
"""

import re
from datetime import UTC, datetime
from typing import Final

# What the API server takes as a date-time; datetime alone would also take a date, or a time without an offset.
_RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")
_LONGEST: Final = 40
_LAST_S: Final = 253_402_300_799.0
"""The end of the year 9999."""


def parse(text: str) -> float | None:
    """Seconds since 1970; None where the text is no time since then."""
    if len(text) > _LONGEST or not _RFC3339.fullmatch(text):
        return None
    try:
        seconds = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        # The 30th of February, or before the year 1.
        return None
    return seconds if 0 <= seconds <= _LAST_S else None


def text(seconds: float) -> str:
    """RFC 3339 text to the second, in UTC, as the API server writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def canonical(time_text: str) -> str:
    """Return a time as the API server accepts it, to the second. Empty if the text is not a time."""
    seconds = parse(time_text)
    return "" if seconds is None else text(seconds)
