"""
The progress of long loads and saves, as lines for a log: how much is done, the rate, and what is left.

Called from: `loading` (the trainer's log), `session` (a save for which the trainer waits), the executor (it measures a save), the supervisor (the
sidecar's log). What is shorter than FIRST_S has no line.
Must never: speak more often than every AGAIN_S.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

FIRST_S: Final = 10.0
"""Time after which a load or a save is long, and gets its first line. Most take less; a person begins to wonder about here."""
AGAIN_S: Final = 30.0
"""Time between two lines: 120 lines an hour."""
STILL_S: Final = 5.0
"""Time without a new byte after which a line says so. A block takes milliseconds, and an object of a bucket a second or two."""
GIB: Final = 1024**3


class Rhythm:
    """Says when the next line is due: after FIRST_S, and then every AGAIN_S."""

    def __init__(self, now_s: float, *, first_s: float = FIRST_S, again_s: float = AGAIN_S) -> None:
        self._next_s, self._again_s = now_s + first_s, again_s

    def due(self, now_s: float) -> bool:
        """Whether a line is due now. The answer True counts as this line."""
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._again_s
        return True


def text(done_bytes: int, total_bytes: int, elapsed_s: float, still_s: float = 0.0) -> str:
    """
    Return the progress for people: ``12.0 of 40.0 GiB (30 %), 1.20 GiB/s, some 23 s left``. Pure.

    Args:
        done_bytes, total_bytes: bytes that are done, and that there are.
        elapsed_s: time since the first byte was asked for, seconds.
        still_s: time since the last byte came, seconds.
    """
    share = f" ({done_bytes * 100 // total_bytes} %)" if total_bytes else ""
    said = f"{done_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB{share}"
    if not done_bytes or elapsed_s <= 0:
        return f"{said} after {elapsed_s:.0f} s"
    rate = done_bytes / elapsed_s
    said += f", {rate / GIB:.2f} GiB/s"
    if still_s >= STILL_S:
        return f"{said}, and nothing for {still_s:.0f} s"
    return f"{said}, some {max(0, total_bytes - done_bytes) / rate:.0f} s left"


class Meter:
    """
    How far one load is. The loading thread moves it, and the speaking thread reads it.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_s = clock()
        self._state: tuple[str, int, int, float, float] | None = None
        """Source, bytes done, bytes in all, time of the begin, time of the last byte. One tuple, so that a reader sees one state."""

    def begin(self, source: str, total_bytes: int) -> None:
        """Note that a source is read from now on. An earlier one does not count any more."""
        self._state = source, 0, total_bytes, self._clock(), self._clock()

    def move(self, done_bytes: int) -> None:
        """Note how many bytes are done."""
        if self._state is not None:
            source, _, total_bytes, begun_s, _ = self._state
            self._state = source, done_bytes, total_bytes, begun_s, self._clock()

    def line(self) -> str:
        """Return the line for the log."""
        now_s, state = self._clock(), self._state
        if state is None:
            waited = now_s - self._asked_s
            return f"a load waits for its first part since {waited:.0f} s: for the other ranks' calls, saves in flight, or storage"
        source, done_bytes, total_bytes, begun_s, moved_s = state
        return f"loading from {source}: {text(done_bytes, total_bytes, now_s - begun_s, now_s - moved_s)}"


class Speaker:
    """
    Calls `say` while something long goes on: after FIRST_S, and then every AGAIN_S. A context manager.

    Args:
        say: called in a thread of its own. None: nobody speaks, and there is no thread.
        first_s, again_s: the times above; shorter in tests.

    Owns: one daemon thread, until the end of the block.
    """

    def __init__(self, say: Callable[[], object] | None, *, first_s: float = FIRST_S, again_s: float = AGAIN_S) -> None:
        self._say, self._first_s, self._again_s = say, first_s, again_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Speaker:
        if self._say is not None:
            thread = threading.Thread(target=self._run, args=(self._say,), name="pillion-progress", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:
                pass  # no thread can start: the load goes on in silence
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, say: Callable[[], object]) -> None:
        pause_s = self._first_s
        while not self._ended.wait(pause_s):
            say()
            pause_s = self._again_s
