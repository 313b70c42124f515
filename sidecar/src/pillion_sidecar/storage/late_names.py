"""
Looks again and again for a file or folder that storage has and that does not show yet. A client of a network file system may have cached that
there is none, and shows another client's name late.

Called from: `storage.folders`, `storage.local`, `checkpoint.commit`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

LATE_S: Final = 3.0
"""Timeout for a name to show. In a folder in which the client has just made a file of its own, it asks the server anew before the first look."""
PAUSE_FIRST_S: Final = 0.05
"""Pause between the first two looks. Each further pause is twice as long."""
MAX_PAUSE_S: Final = 0.4
"""Maximum of the pause between two looks."""


def looks(late_s: float | None = None) -> Iterator[bool]:
    """
    Yield once for each look, with a pause before all but the first. The value says whether it is the last look, after which the time is over.

    Args:
        late_s: timeout, seconds; None: LATE_S.

    Blocks: up to `late_s` and a pause, if the caller does not stop.
    """
    deadline = time.monotonic() + (LATE_S if late_s is None else late_s)
    pause_s = PAUSE_FIRST_S
    while True:
        is_last = time.monotonic() >= deadline
        yield is_last
        if is_last:
            return
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
