"""
The whole of: trainers of a session that a sidecar before this one served: which processes they are, and whether they may come back.

Called from: the supervisor. Trainers look for the successor of a dead sidecar within a tenth of a second; until they are here again, nobody
else may take them for gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

RETURN_S: Final = 3.0
"""How long trainers get to come back whose processes cannot be seen from here: several of a client's first tries."""
RETURN_LIVING_S: Final = 30.0
"""The same for those that are seen to live: a trainer in the middle of a long call looks for the sidecar beside it."""
POLL_S: Final = 0.05

Process = tuple[int, int]
"""Process id, and when it started (clock ticks since the boot), so that a number that was given again is not taken for it."""


def process(pid: int) -> Process:
    """A process as it can be found again; (0, 0) where it cannot be seen from here."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program is in brackets, and may hold anything. Source: proc(5), fields 3 and 22.
            fields = file.read().rpartition(b")")[2].split()
        return (0, 0) if pid <= 0 or fields[0] in (b"Z", b"X") else (pid, int(fields[19]))
    except (OSError, ValueError, IndexError):
        return (0, 0)


def living(processes: Iterable[Process]) -> list[int]:
    """The ids of those that still run."""
    return [pid for pid, started in processes if pid > 0 and process(pid) == (pid, started)]


async def wait(processes: Sequence[Process], are_here: Callable[[], bool]) -> list[int]:
    """
    Wait until the trainers are here again or cannot come any more; the ids of those that live and did not come.

    Blocks: up to RETURN_LIVING_S while one is seen to live; up to RETURN_S where one cannot be seen.
    """
    begun = time.monotonic()
    while not are_here():
        waited_s = time.monotonic() - begun
        alive = living(processes)
        unseen = any(pid <= 0 for pid, _ in processes)
        if waited_s >= (RETURN_LIVING_S if alive else RETURN_S if unseen else 0.0):
            return alive
        await asyncio.sleep(POLL_S)
    return []
