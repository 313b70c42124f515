"""
Memory for the slots of one pod: within the policy's limit, what the container may take, and what the tmpfs has.

Called from: `arena.pod_arena` (claims and reserves, in threads) and the executor's `executor.load.fill` (the slot of a load). Ranks grow side by side, a GiB in a
second or two each: each first reserves what it is about to take, so that all of them together stay within the limit. The two processes
grow in turn, as each knows its own reservations only.
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
"""Bound for the other process to have grown its slots: 100 GiB in each of several ranks, on a busy node."""
TURN_POLL_S: Final = 0.02
SPARE_BYTES: Final = 64 * 1024**2
"""Of the container's limit, what the arena leaves to the sidecar's own work: the buffers and texts of a save."""


class Growth:
    """
    See the module.

    Args:
        segments: rank -> its segment; all in one folder.
        limit_bytes: for all slots together.
        container: what it may take as well.
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
        """rank -> how many of its slots are being given memory."""
        self._promised: dict[int, int] = {}
        """rank of these -> bytes of its segment once they have it."""
        self._changing = threading.Lock()
        self._slots = {(rank, i): threading.Lock() for rank, s in segments.items() for i in range(s.header.num_slots)}
        self._turn = -1
        """The folder of the segments, locked with flock by the process that grows them; -1: this one does not."""

    def grow(self, rank: int, slot: int, room_bytes: int) -> int:
        """
        Give a rank's slot at least `room_bytes`; its capacity.

        Blocks: 1 to 2 s a GiB of fresh memory; up to TURN_TIMEOUT_S while the other process grows slots.

        Raises:
            ArenaExhausted: over a limit, or the tmpfs is full.
            SidecarError: the other process has grown slots for too long.
        """
        segment = self._segments[rank]
        have = segment.capacity_bytes(slot, enough_bytes=room_bytes)
        if room_bytes <= have:
            return have
        with self._slots[rank, slot]:
            have = segment.capacity_bytes(slot, enough_bytes=room_bytes)
            if room_bytes <= have:
                return have  # it was given to it while this one waited
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
        """Bytes of the rank's segment once it has `room_bytes` in a slot that has `have`, if everybody's promises may be kept then."""
        allocated = {each: segment.allocated_bytes() for each, segment in self._segments.items()}
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
            coming = sum(promised - allocated[each] for each, promised in self._promised.items())
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
