"""
One segment file: creates, opens and grows it, and reads and writes its headers.

Called from: the supervisor (owner) and the executor (reader and writer of images). The supervisor's process has a shared `flock` on each
segment while it lives. Only segments without a lock may be removed (`leftovers`).

This module allocates memory with `posix_fallocate` and touches it before the trainer needs it. So a full tmpfs is an error in the sidecar
instead of a SIGBUS in the trainer, and the kernel charges the pages to the sidecar's container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
from typing import Final

from pillion.errors import ArenaExhausted, SidecarError
from pillion.wire import arena
from pillion_sidecar import shared_files

TOUCH_STEP_BYTES: Final = 64 * 1024**2
"""Bytes that one madvise call touches."""
MADV_POPULATE_WRITE: Final = 23
"""madvise advice (Linux 5.14) that maps pages now. Older kernels return EINVAL; then each page is read, which keeps what a trainer has
written to it."""
PRIVATE: Final = 0o600
"""Mode of a segment without a cluster. Other users of the machine must not read a model's state."""
SHARED: Final = 0o666
"""Mode of a segment in a pod. Trainer and sidecar may be different users, and only their containers mount the volume."""


class Segment:
    """
    One open segment, from `create` or `attach`.

    Owns: the file descriptor (with its lock) and one mapping of the whole address range.
    """

    def __init__(self, path: str, fd: int, header: arena.SegmentHeader) -> None:
        self.path = path
        self.header = header
        self._fd = fd
        self.map = _mapped(path, fd, header.segment_bytes)
        status = os.fstat(fd)
        self._file = (status.st_dev, status.st_ino)
        self._known: dict[int, int] = {}
        """Slot -> its capacity at the last look, bytes. A slot never shrinks, so this is a lower bound."""

    @classmethod
    def create(cls, path: str, *, num_slots: int, stride_bytes: int, mode: int = PRIVATE) -> Segment:
        """
        Create an empty segment with `mode`, whatever the umask. Replace a file at `path`.

        Raises:
            ArenaExhausted: the tmpfs has no room even for the header pages.
            SidecarError: a limit of this process forbids a file or mapping of this length.
            OSError: the directory cannot be written.
        """
        header = arena.SegmentHeader(num_slots=num_slots, stride_bytes=stride_bytes)
        temporary = f"{path}.{os.getpid()}.tmp"
        fd = shared_files.create(temporary, mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _set_length(path, fd, header.segment_bytes)
            _allocate(fd, 0, arena.PAGE_BYTES)
            os.pwrite(fd, header.pack(), 0)
            for index in range(num_slots):
                _allocate(fd, header.slot_offset(index), arena.PAGE_BYTES)
                os.pwrite(fd, arena.SlotHeader(state=arena.SlotState.FREE).pack(), header.slot_offset(index))
            os.rename(temporary, path)
            return cls(path, fd, header)
        except BaseException:
            os.close(fd)
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    @classmethod
    def attach(cls, path: str, earlier: Segment | None = None) -> Segment:
        """
        Open an existing segment.

        Args:
            path: the segment.
            earlier: what this process had open before, closed or not. If it was the same file, the new segment takes over the capacities that
                it knew: the file system takes 10 ms for each GiB to count them, and trainers would wait for that at their load.

        Raises:
            FileNotFoundError: there is no file at `path`.
            ValueError: the file is not a segment, or is shorter than its header says.
            SidecarError: a limit of this process forbids a mapping of this length.
        """
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            header = arena.SegmentHeader.unpack(os.pread(fd, arena.PAGE_BYTES, 0))
            if os.fstat(fd).st_size < header.segment_bytes:
                raise ValueError(f"{path} is shorter than its header says")
            segment = cls(path, fd, header)
        except BaseException:
            os.close(fd)
            raise
        if earlier is not None and earlier._file == segment._file:
            segment._known |= earlier._known
        return segment

    def allocated_bytes(self) -> int:
        """Return the allocated bytes of all slots together. One system call, while `capacity_bytes` walks all pages of a slot."""
        return max(0, os.fstat(self._fd).st_blocks * 512 - arena.PAGE_BYTES)

    def capacity_bytes(self, slot: int, *, enough_bytes: int | None = None) -> int:
        """
        Return the capacity of a slot: its allocated bytes up to the first hole, as the file system reports it (SEEK_HOLE).

        Args:
            slot: index of the slot.
            enough_bytes: return the last known capacity if it is at least this. None: always ask the file system.
        """
        known = self._known.get(slot)
        if enough_bytes is not None and known is not None and known >= enough_bytes:
            # SEEK_HOLE walks every page and takes 10 ms for each GiB, while a claim waits.
            return known
        start = self.header.slot_offset(slot)
        try:
            hole = os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError:
            return 0
        self._known[slot] = max(0, min(hole, start + self.header.stride_bytes) - start)
        return self._known[slot]

    def grow(self, slot: int, room_bytes: int) -> int:
        """
        Allocate and touch the slot's first `room_bytes`. Return its capacity, bytes.

        Blocks: about 1 s for each new GiB.

        Raises:
            ArenaExhausted: the slot's address range is shorter, or the tmpfs is full.
        """
        have = self.capacity_bytes(slot, enough_bytes=room_bytes)
        if room_bytes <= have:
            return have
        if room_bytes > self.header.stride_bytes:
            raise ArenaExhausted(
                needed_bytes=room_bytes,
                available_bytes=self.header.stride_bytes,
                cause="a slot's range of addresses ends there",
            )
        start = self.header.slot_offset(slot)
        _allocate(self._fd, start + have, room_bytes - have)
        self._touch(start + have, room_bytes - have)
        return room_bytes

    def _touch(self, start: int, length: int) -> None:
        end = start + length
        while start < end:
            step = min(TOUCH_STEP_BYTES, end - start)
            try:
                self.map.madvise(MADV_POPULATE_WRITE, start, step)
            except OSError:
                for page in range(start, start + step, arena.PAGE_BYTES):
                    _ = self.map[page]
            start += step

    def slot(self, index: int) -> memoryview:
        """Return the slot's whole address range. The caller may touch only its capacity."""
        start = self.header.slot_offset(index)
        return memoryview(self.map)[start : start + self.header.stride_bytes]

    def read_header(self, slot: int) -> arena.SlotHeader:
        """
        Return the slot's header.

        Raises:
            ValueError: the header is damaged.
        """
        start = self.header.slot_offset(slot)
        return arena.SlotHeader.unpack(
            self.map[start : start + arena.PAGE_BYTES], stride_bytes=self.header.stride_bytes
        )

    def write_header(self, slot: int, header: arena.SlotHeader) -> None:
        """Write a slot's header: the fields first, and the state word last, as `pillion.wire.arena` requires."""
        start = self.header.slot_offset(slot)
        packed = header.pack()
        self.map[start + arena.STATE_OFFSET + 4 : start + len(packed)] = packed[arena.STATE_OFFSET + 4 :]
        self.map[start : start + arena.STATE_OFFSET] = packed[: arena.STATE_OFFSET]
        self.write_state(slot, header.state)

    def write_state(self, slot: int, state: arena.SlotState) -> None:
        start = self.header.slot_offset(slot) + arena.STATE_OFFSET
        self.map[start : start + 4] = arena.pack_state(state)

    def reset(self, slot: int) -> None:
        """
        Free a slot. The new header does not keep the digest of the framed layout.

        So the next save writes heads and tails of the archives again, even for the same layout.
        """
        sequence = 0
        with contextlib.suppress(ValueError):
            sequence = self.read_header(slot).sequence
        self.write_header(slot, arena.SlotHeader(state=arena.SlotState.FREE, sequence=sequence))

    def close(self) -> None:
        """Release the mapping and the lock. The file stays."""
        # A view may still exist after a cancelled read. Then the mapping ends with that view.
        with contextlib.suppress(BufferError):
            self.map.close()
        os.close(self._fd)


def _mapped(path: str, fd: int, length: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, length)
    except OSError as err:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        why = (
            f"the limit of this process is {limit} bytes (ulimit -v)"
            if limit != resource.RLIM_INFINITY
            else "no limit is set"
        )
        raise SidecarError(
            f"the sidecar cannot map the arena segment {path}: {length} bytes of addresses, not of memory, are needed: {err.strerror}; {why}"
        ) from err


def _set_length(path: str, fd: int, length: int) -> None:
    try:
        os.ftruncate(fd, length)
    except OSError as err:
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if err.errno != errno.EFBIG or limit == resource.RLIM_INFINITY:
            raise
        raise SidecarError(
            f"the sidecar cannot make the arena segment {path}: the file needs a length of {length} bytes (of addresses, not of memory), and"
            f" this process may have {limit} (ulimit -f, inherited from the trainer)"
        ) from err


def _allocate(fd: int, offset: int, length: int) -> None:
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        stats = os.fstatvfs(fd)
        raise ArenaExhausted(
            needed_bytes=length,
            available_bytes=stats.f_bavail * stats.f_frsize,
            cause=f"the file system of {os.readlink(f'/proc/self/fd/{fd}')} is full, with {stats.f_blocks * stats.f_frsize} bytes in all",
            remedy="free it, or make it larger (/dev/shm of a container: --shm-size; in a pod: staging.sizeLimit)",
        ) from err
