"""
The whole of: saying where the harness is while it makes something, for people who wait for it.

Called from: every module of the harness that takes longer than a moment. Lines go to the standard error.
Must never: change what is made, or outlive it.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

EVERY_S: Final = 15.0
"""Between two lines about one step. Half a minute without a word looks like a hang, and makes people end what works."""


def say(text: str) -> None:
    """One line, with the time of day."""
    # Looked up at each call: pytest puts another stream there and takes it away again.
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(what: str, *, every_s: float = EVERY_S, tell: Callable[[str], None] = say) -> Iterator[None]:
    """
    Say that something begins, that it still goes on, and how it ended.

    Args:
        what: is made, and which it is of how many.
        every_s: seconds between two lines while the block runs.
        tell: takes a line.
    """
    since, begun = time.strftime("%H:%M:%S"), time.monotonic()
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(every_s):
            tell(f"{what}: still at it since {since}, {time.monotonic() - begun:.0f} s")

    thread = threading.Thread(target=go_on, name="progress", daemon=True)
    tell(f"{what} ...")
    thread.start()
    ended = "ended early"
    try:
        yield
        ended = "done"
    finally:
        over.set()
        thread.join()
        tell(f"{what}: {ended} after {time.monotonic() - begun:.0f} s")
