"""
Waits for the trainers of an adopted session, which an earlier sidecar served, to connect again.

Called from: `supervisor.trainers`, the supervisor. Trainers connect to the successor of a dead sidecar within a tenth of a second. Until
then, no other training may take their place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

RETURN_TIMEOUT_S: Final = 3.0
"""Timeout for trainers whose processes this process cannot see. A client makes several attempts in this time."""
RETURN_LIVING_TIMEOUT_S: Final = 30.0
"""Timeout for trainers whose processes are known to live. A thread of theirs reconnects, even during a long call."""
POLL_S: Final = 0.05
"""Pause between two checks of the trainers' processes."""

Process = tuple[int, int]
"""Process id, and start time in clock ticks since the boot. The start time distinguishes processes with a reused id."""


def process(pid: int) -> Process:
    """Return the identity of a process. (0, 0) if this process cannot see it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program is in brackets, and may hold anything. Source: proc(5), fields 3 and 22.
            fields = file.read().rpartition(b")")[2].split()
        return (0, 0) if pid <= 0 or fields[0] in (b"Z", b"X") else (pid, int(fields[19]))
    except (OSError, ValueError, IndexError):
        return (0, 0)


def living(processes: Iterable[Process]) -> list[int]:
    """Return the ids of the processes that still run."""
    return [pid for pid, started in processes if pid > 0 and process(pid) == (pid, started)]


async def wait(processes: Sequence[Process], are_here: Callable[[], bool]) -> list[int]:
    """
    Wait until the trainers have connected again, or all of them have ended.

    Args:
        processes: the trainers.
        are_here: returns whether they have connected.

    Returns:
        Ids of trainers that live and did not connect in time.

    Blocks: up to RETURN_LIVING_TIMEOUT_S while a trainer is known to live; up to RETURN_TIMEOUT_S if a trainer's process cannot be seen.
    """
    begun = time.monotonic()
    while not are_here():
        waited_s = time.monotonic() - begun
        alive = living(processes)
        unseen = any(pid <= 0 for pid, _ in processes)
        if waited_s >= (RETURN_LIVING_TIMEOUT_S if alive else RETURN_TIMEOUT_S if unseen else 0.0):
            return alive
        await asyncio.sleep(POLL_S)
    return []
