"""
Grows the slots of one pod, within the policy's limit, the container's memory limit, and the room of the tmpfs.

Called from: `arena.pod_arena` (claims and reserves, in threads) and the executor's `executor.load.fill` (the slot of a load). Ranks grow in
parallel, one or two seconds for each GiB. Each rank first reserves the bytes, so that all ranks together stay within the limit. The two
processes take turns, because each knows only its own reservations.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from pillion.errors import ArenaExhausted, SidecarError
from pillion_sidecar.arena import memory_limit
from pillion_sidecar.arena.segment import Segment

TURN_TIMEOUT_S: Final = 300.0
"""Timeout for the other process's growth: 100 GiB in each of several ranks, on a busy node."""
TURN_POLL_S: Final = 0.02
"""Pause between two attempts to take the turn."""
SPARE_BYTES: Final = 64 * 1024**2
"""Bytes of the container's memory limit that the arena leaves for the sidecar's own work: the buffers and texts of a save."""


class Growth:
    """
    Grows the slots of one pod. See the module.

    Args:
        segments: rank -> its segment. All are in one directory.
        limit_bytes: maximum bytes of all slots together.
        container: returns the tightest memory limit of this process's container. None: no limit.
    """

    def __init__(
        self,
        segments: Mapping[int, Segment],
        limit_bytes: int,
        *,
        container: Callable[[], memory_limit.Level | None] = memory_limit.tightest,
    ) -> None:
        self._segments = segments
        self._limit_bytes = limit_bytes
        self._container = container
        self._growing: dict[int, int] = {}
        """Rank -> number of its slots that grow now."""
        self._promised: dict[int, int] = {}
        """Rank whose slots grow -> bytes of its segment after the growth."""
        self._changing = threading.Lock()
        self._slots = {(rank, i): threading.Lock() for rank, s in segments.items() for i in range(s.header.num_slots)}
        self._turn = -1
        """Descriptor of the segments' directory, locked with flock while this process has the turn. -1: it does not have the turn."""

    def grow(self, rank: int, slot: int, room_bytes: int) -> int:
        """
        Grow a rank's slot to at least `room_bytes`. Return its capacity, bytes.

        Blocks: 1 to 2 s for each new GiB, and up to TURN_TIMEOUT_S while the other process grows slots.

        Raises:
            ArenaExhausted: a limit is reached, or the tmpfs is full.
            SidecarError: the other process did not end its turn in time.
        """
        segment = self._segments[rank]
        have = segment.capacity_bytes(slot, enough_bytes=room_bytes)
        if room_bytes <= have:
            return have
        with self._slots[rank, slot]:
            have = segment.capacity_bytes(slot, enough_bytes=room_bytes)
            if room_bytes <= have:
                return have  # another thread grew the slot while this one waited for the lock
            self._reserve(rank, have, room_bytes)
            try:
                return segment.grow(slot, room_bytes)
            finally:
                self._release(rank)

    def _reserve(self, rank: int, have: int, room_bytes: int) -> None:
        with self._changing:
            if not self._growing:
                self._take_turn()
            try:
                promised = self._checked(rank, have, room_bytes)
            except BaseException:
                if not self._growing:
                    self._end_turn()
                raise
            self._promised[rank] = promised
            self._growing[rank] = self._growing.get(rank, 0) + 1

    def _release(self, rank: int) -> None:
        with self._changing:
            self._growing[rank] -= 1
            if not self._growing[rank]:
                del self._growing[rank], self._promised[rank]
            if not self._growing:
                self._end_turn()

    def _checked(self, rank: int, have: int, room_bytes: int) -> int:
        """
        Return the bytes of the rank's segment after its slot has grown from `have` to `room_bytes`.

        Raises:
            ArenaExhausted: with that, all reservations together exceed a limit.
        """
        allocated = {member: segment.allocated_bytes() for member, segment in self._segments.items()}
        others = sum((allocated | self._promised).values()) - have
        if others + room_bytes > self._limit_bytes:
            raise ArenaExhausted(
                needed_bytes=room_bytes,
                available_bytes=max(0, self._limit_bytes - others),
                cause=f"the pod's limit is {self._limit_bytes} bytes for {len(self._slots)} slots of {len(self._segments)} ranks,"
                f" of which the others have {others}",
            )
        level = self._container()
        if level is not None:
            coming = sum(promised - allocated[member] for member, promised in self._promised.items())
            free = level.free_bytes - coming - SPARE_BYTES
            if room_bytes - have > free:
                raise ArenaExhausted(
                    needed_bytes=room_bytes,
                    available_bytes=max(0, have + free),
                    cause=f"the memory limit of this container ({level.path}) is {level.limit_bytes} bytes, of which"
                    f" {level.used_bytes + coming} are in use, and {SPARE_BYTES} stay free for the sidecar itself",
                    remedy="raise the container's memory limit, or save less at once",
                )
        return self._promised.get(rank, allocated[rank]) + room_bytes - have

    def _take_turn(self) -> None:
        folder = os.path.dirname(next(iter(self._segments.values())).path)
        self._turn = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        begun = time.monotonic()
        try:
            while not _locked(self._turn):
                if time.monotonic() - begun > TURN_TIMEOUT_S:
                    raise SidecarError(
                        f"another process of this sidecar has been growing the arena in {folder} for {TURN_TIMEOUT_S:.0f} s"
                    )
                time.sleep(TURN_POLL_S)
        except BaseException:
            self._end_turn()
            raise

    def _end_turn(self) -> None:
        os.close(self._turn)
        self._turn = -1


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
