"""
Copies between the trainer's tensors and the arena: the only place where user data moves in the trainer.

Called from: `pillion.checkpointer` (training thread, or the staging thread of an overlapped save). Owns: the trainer's mapping
of its segment; it never creates, grows or unlinks one.

On a GPU the mapping is registered with CUDA, so that device-to-host copies run asynchronously on a stream of their own
straight into the arena. On a CPU the tensors are cut into as many stretches of equal bytes as torch has threads, and a thread
each copies one in one batched call: the GIL is given up once, not once a tensor, because a trainer whose GIL is busy takes
up to 5 ms (sys.getswitchinterval) to give it back. torch's own threads are not used: they meet after each tensor, and on a
machine whose cores are busy each meeting waits for the scheduler (measured: 64 tensors beside a spinning thread, 0.10 s
against 0.18 s).

Tensors over the arena are kept from save to save. They are made and used with the caller's modes off (`pillion.modes`): one
made in a FakeTensorMode would hold no memory, and one made in inference mode could not be written outside of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import math
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pillion import copiers as copiers_module
from pillion import leaves as leaves_module
from pillion import modes
from pillion.errors import IncompatibleCheckpoint, StagingError
from pillion.wire import arena, layout

_log = logging.getLogger(__name__)

REGISTER_PIECE_BYTES: Final = 256 * 1024**3
"""Longest single cudaHostRegister: one call of 512 GiB or more fails on r580 drivers and leaves a sticky error (maru#65)."""
POPULATE_STEP_BYTES: Final = 64 * 1024**2
"""madvise holds the GIL while it maps pages: this bounds the pause to about 5 ms a call."""
MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14: map the pages now, so that the first save takes no page faults. Older kernels answer EINVAL, which is fine."""


SPLIT_BYTES: Final = 4 * 1024**2
"""A stretch of copies ends at the end of a tensor, unless it would be this much too long: then it ends within it."""

KEPT_STRETCHES: Final = 1024
"""Ways to share a copy out that are remembered: one for saves, and one for each part of a load."""


@dataclass(frozen=True)
class _Stretch:
    """What one thread copies: whole items [first, last), and elements [start, stop) of single items."""

    first: int
    last: int
    parts: tuple[tuple[int, int, int], ...]


class SegmentMapping:
    """
    The trainer's view of its segment.

    Args:
        path: the segment file, made by the sidecar.

    Raises:
        StagingError: it cannot be opened or mapped.
    """

    def __init__(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self.header = arena.SegmentHeader.unpack(os.pread(fd, arena.PAGE_BYTES, 0))
                self._map = mmap.mmap(fd, self.header.segment_bytes)
                self.inode = os.fstat(fd).st_ino
            finally:
                os.close(fd)
        except (OSError, ValueError) as err:
            raise StagingError(f"cannot map the arena segment {path}: {err}") from err
        with modes.off():
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._views: dict[int, tuple[str, list[torch.Tensor]]] = {}
        """By slot: the digest of a layout, and a tensor over each of its items."""
        self._making = threading.Lock()
        """A thread prepares the arena while the trainer may save already: what both of them need is made once."""
        self._populated: dict[int, int] = {}
        self._registered: dict[int, list[tuple[int, int]]] = {}
        self._stream: Any = None
        self._stretches: dict[tuple[str, int, int, int], tuple[_Stretch, ...]] = {}
        self._copiers: copiers_module.Copiers | None = None

    def populate(self, slot: int, capacity_bytes: int) -> None:
        """
        Map the slot's pages into this process, and register them with CUDA where there is one.

        Called from: a thread of the client, ahead of the first save. Blocks: about 50 ms a GiB, in pieces.
        """
        start = self._populated.get(slot, 0)
        base = self.header.slot_offset(slot)
        while start < capacity_bytes:
            length = min(POPULATE_STEP_BYTES, capacity_bytes - start)
            try:
                self._map.madvise(MADV_POPULATE_WRITE, base + start, length)
            except OSError:
                break
            start += length
        self._populated[slot] = max(capacity_bytes, self._populated.get(slot, 0))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._register(slot, capacity_bytes)

    def _register(self, slot: int, capacity_bytes: int) -> None:
        pieces = self._registered.setdefault(slot, [])
        start = sum(length for _, length in pieces)
        base = self._bytes.data_ptr() + self.header.slot_offset(slot)
        while start < capacity_bytes:
            length = min(REGISTER_PIECE_BYTES, capacity_bytes - start)
            error = torch.cuda.cudart().cudaHostRegister(base + start, length, 0)
            if int(error) != 0:
                # Unregistered memory works, a copy then goes through the driver's own bounce buffer.
                _log.warning("cudaHostRegister of %d arena bytes failed with error %d", length, int(error))
                return
            pieces.append((base + start, length))
            start += length

    @modes.off()
    def views(self, slot: int, of: layout.Layout) -> list[torch.Tensor]:
        """
        A tensor over the payload of each item, in the arena. Kept: making 10,000 of them takes some 50 ms.

        Raises:
            IncompatibleCheckpoint: a dtype that this torch does not have.
        """
        with self._making:
            digest, made = self._views.get(slot, ("", []))
            if digest != of.digest:
                made = self._made_views(slot, of)
                self._views[slot] = (of.digest, made)
            return made

    def _made_views(self, slot: int, of: layout.Layout) -> list[torch.Tensor]:
        image = self.header.slot_offset(slot) + arena.PAGE_BYTES
        made = []
        for item, start in zip(of.items, of.payload_starts, strict=True):
            dtype = leaves_module.DTYPES.get(item.dtype)
            if dtype is None:
                raise IncompatibleCheckpoint(
                    f"{item.fqn!r} is of {item.dtype}, which torch {torch.__version__} does not have", fqns=[item.fqn]
                )
            if item.payload_bytes == 0:
                made.append(torch.empty(item.sizes, dtype=dtype))
                continue
            flat = self._bytes[image + start : image + start + item.payload_bytes]
            made.append(flat.view(dtype).view(item.sizes))
        return made

    @modes.off()
    def copy_in(
        self, slot: int, leaves: leaves_module.Leaves, *, only: Sequence[int] | None = None, ready: Any = None
    ) -> None:
        """
        Copy the leaves' tensors into the slot.

        Args:
            slot: index of the slot.
            leaves: what to copy; their layout says where to.
            only: indexes of the items to copy; None for all.
            ready: a CUDA event that the copies wait for; None for the current stream.

        Blocks: for the copy; on a GPU until the side stream is done.

        Raises:
            StagingError: torch cannot copy a tensor, which is named.
        """
        views, sources = self.views(slot, leaves.layout), leaves.tensors
        try:
            if only is None and all(source.is_cpu for source in sources):
                self._copy_on_host(views, sources, leaves.layout, 0, len(sources))
                return
            chosen = range(len(sources)) if only is None else only
            host = [index for index in chosen if sources[index].is_cpu]
            self._copy_some_on_host(views, sources, leaves.layout, host)
            device = [(views[index], sources[index]) for index in chosen if not sources[index].is_cpu]
            if device:
                self._copy_from_device(device, ready)
        except _CopyFailed as err:
            fqn = leaves.layout.items[err.index].fqn
            raise StagingError(f"cannot copy {fqn!r} into the arena: {err}") from err

    def _copy_some_on_host(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], of: layout.Layout, chosen: Sequence[int]
    ) -> None:
        """`_copy_on_host`, of single items: how they are shared out is not remembered."""
        part = layout.Layout(tuple(of.items[index] for index in chosen), (), {})
        try:
            self._copy_on_host([targets[i] for i in chosen], [sources[i] for i in chosen], part, 0, len(chosen))
        except _CopyFailed as err:
            raise _CopyFailed(chosen[err.index], str(err)) from err

    def _copy_on_host(
        self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], of: layout.Layout, first: int, last: int
    ) -> None:
        """Copy items [first, last) with as many threads as torch uses; sizes and dtypes are those of the layout."""
        copiers, stretches = self._shared_out(of, first, last)
        if copiers is None:
            for stretch in stretches:
                _copy(targets, sources, stretch)
            return
        copiers.each([functools.partial(_copy, targets, sources, stretch) for stretch in stretches])

    def _shared_out(
        self, of: layout.Layout, first: int, last: int
    ) -> tuple[copiers_module.Copiers | None, tuple[_Stretch, ...]]:
        num_threads = torch.get_num_threads()
        with self._making:
            if num_threads > 1 and self._copiers is None:
                self._copiers = _copiers(num_threads)
        if num_threads == 1 or self._copiers is None:
            return None, (_Stretch(first, last, ()),)
        key = (of.digest, first, last, num_threads)
        stretches = self._stretches.get(key)
        if stretches is None:
            if len(self._stretches) >= KEPT_STRETCHES:
                self._stretches.clear()
            stretches = self._stretches[key] = _stretches(of, first, last, num_threads)
        return self._copiers, stretches

    def warm(self, slot: int, of: layout.Layout) -> None:
        """Have everything ready that a copy into this slot needs. Called from: a thread, ahead of the first save."""
        self.views(slot, of)
        self._shared_out(of, 0, len(of.items))

    def _copy_from_device(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], ready: Any) -> None:
        if pairs[0][1].device.type != "cuda":
            for view, source in pairs:
                view.copy_(source)
            return
        device = pairs[0][1].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        # The copies must see what the training stream has queued so far, and nothing after it.
        if ready is not None:
            self._stream.wait_event(ready)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for view, source in pairs:
                view.copy_(source, non_blocking=True)
                source.record_stream(self._stream)
        self._stream.synchronize()

    def seal(
        self,
        slot: int,
        *,
        leaves: leaves_module.Leaves,
        opaque: Sequence[bytes],
        step: int,
        rank: int,
        world_size: int,
        session: bytes,
    ) -> None:
        """
        Write opaque leaves, layout, manifest and header; the state word last.

        From here on the sidecar, and any successor of it, may read the slot.
        """
        of = leaves.layout
        base = self.header.slot_offset(slot)
        before = arena.SlotHeader.unpack(
            self._map[base : base + arena.PAGE_BYTES], stride_bytes=self.header.stride_bytes
        )
        starts, image_bytes = of.opaque_starts([len(data) for data in opaque])
        image = base + arena.PAGE_BYTES
        for start, data in zip(starts, opaque, strict=True):
            self._map[image + start : image + start + len(data)] = data
        layout_offset = arena.PAGE_BYTES + image_bytes
        if before.layout_digest != bytes.fromhex(of.digest) or before.layout_offset != layout_offset:
            self._map[base + layout_offset : base + layout_offset + len(of.encoded)] = of.encoded
        manifest = json.dumps(
            {"version": 1, "step": step, "opaque": [len(data) for data in opaque]}, separators=(",", ":")
        ).encode()
        manifest_offset = layout.aligned(layout_offset + len(of.encoded))
        self._map[base + manifest_offset : base + manifest_offset + len(manifest)] = manifest
        header = arena.SlotHeader(
            state=arena.SlotState.FILLING,
            flags=before.flags,
            sequence=before.sequence,
            step=step,
            rank=rank,
            world_size=world_size,
            image_bytes=image_bytes,
            layout_offset=layout_offset,
            layout_bytes=len(of.encoded),
            manifest_offset=manifest_offset,
            manifest_bytes=len(manifest),
            sealed_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            layout_digest=bytes.fromhex(of.digest),
            manifest_digest=hashlib.blake2b(manifest, digest_size=16).digest(),
            session=session,
            # Another layout has overwritten the archive heads of the one before.
            framed_digest=before.framed_digest if before.layout_digest == bytes.fromhex(of.digest) else bytes(16),
            digests_offset=layout.aligned(manifest_offset + len(manifest)),
            generation=before.generation,
            epoch=before.epoch,
        )
        self._map[base : base + arena.SLOT_FORMAT.size] = header.pack()
        state = base + arena.STATE_OFFSET
        ctypes.c_uint32.from_buffer(self._map, state).value = int(arena.SlotState.SEALED)

    @modes.off()
    def copy_out(self, slot: int, leaves: leaves_module.Leaves, first: int, last: int) -> None:
        """
        Copy items [first, last) of a slot into the leaves' own tensors (which may be of another dtype).

        Raises:
            IncompatibleCheckpoint: torch cannot copy into a tensor, which is named.
        """
        views = self.views(slot, leaves.layout)
        tensors = leaves.tensors
        try:
            if all(tensors[i].is_cpu and tensors[i].dtype == views[i].dtype for i in range(first, last)):
                self._copy_on_host(tensors, views, leaves.layout, first, last)
                return
            batched = [i for i in range(first, last) if tensors[i].is_cpu and tensors[i].dtype == views[i].dtype]
            _copy_each([tensors[i] for i in batched], [views[i] for i in batched], batched)
            for i in range(first, last):
                if not tensors[i].is_cpu or tensors[i].dtype != views[i].dtype:
                    _copy_one(tensors[i], views[i], i)
        except _CopyFailed as err:
            fqn = leaves.layout.items[err.index].fqn
            raise IncompatibleCheckpoint(f"cannot copy into {fqn!r}: {err}", fqns=[fqn]) from err

    def close(self) -> None:
        """Unregister from CUDA (before the mapping goes: checkpoint-engine#67) and drop the mapping."""
        for pieces in self._registered.values():
            for address, _ in pieces:
                torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        if self._copiers is not None:
            self._copiers.close()
            self._copiers = None
        self._views.clear()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        # A view may still be out (an interrupted copy): the mapping then goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()


# --- copying on a CPU ------------------------------------------------------------------------------------------------


def _copiers(num_threads: int) -> copiers_module.Copiers | None:
    """
    Threads in which torch's operations use one thread each; None where that cannot be had.

    The number of OpenMP threads is a property of each thread, and torch (2.6 to 2.15) offers only a setter that also
    changes it for threads of others. Source: OpenMP 5.0, 3.2.1 (omp_set_num_threads).
    """
    library = _openmp_library()
    if library is None:
        return None

    def alone() -> None:
        torch.get_num_threads()  # torch sets its own number at the first use in a thread: let it, and then set ours
        library.omp_set_num_threads(1)

    try:
        found = copiers_module.Copiers(num_threads, alone)
    except RuntimeError:  # no thread more: a limit, or the interpreter's end (Python 3.12)
        return None
    numbers: list[int] = []
    found.each([lambda: numbers.append(torch.get_num_threads())])
    if numbers != [1]:
        found.close()
        return None
    return found


def _openmp_library() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(None, 5)[5].strip() for line in maps if "omp" in line and line.count("/") > 0}
        for path in sorted(paths):
            if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")):
                return ctypes.CDLL(path)
    except (OSError, IndexError):
        pass
    return None


def _stretches(of: layout.Layout, first: int, last: int, num_threads: int) -> tuple[_Stretch, ...]:
    """Cut items [first, last) into at most `num_threads` stretches of about equal bytes. Pure."""
    left = sum(of.items[index].payload_bytes for index in range(first, last))
    found = []
    index, offset = first, 0
    for thread in range(num_threads, 0, -1):
        goal = left if thread == 1 else left // thread
        left -= goal
        parts: list[tuple[int, int, int]] = []
        begin = index
        if offset:
            numel = math.prod(of.items[index].sizes)
            itemsize = of.items[index].payload_bytes // numel
            stop = numel if thread == 1 else min(numel, offset + goal // itemsize)
            parts.append((index, offset, stop))
            goal -= (stop - offset) * itemsize
            index, offset = (index + 1, 0) if stop == numel else (index, stop)
            begin = index
        while not offset and index < last and (goal > 0 or thread == 1):
            size_bytes = of.items[index].payload_bytes
            if size_bytes <= goal + SPLIT_BYTES or thread == 1:
                goal -= size_bytes
                index += 1
            else:
                itemsize = layout.ITEMSIZE_BYTES[of.items[index].dtype]
                offset = max(1, goal // itemsize)
                parts.append((index, 0, offset))
                goal -= offset * itemsize
        left += goal
        found.append(_Stretch(begin, index, tuple(parts)))
    return tuple(stretch for stretch in found if stretch.first < stretch.last or stretch.parts)


class _CopyFailed(Exception):
    """torch could not copy the tensor at `index`."""

    def __init__(self, index: int, why: str) -> None:
        self.index = index
        super().__init__(why)


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stretch: _Stretch) -> None:
    """
    Copy a stretch. Called from: the thread that copies, with no mode on.

    Raises:
        _CopyFailed: one of the tensors cannot be copied.
    """
    indexes = range(stretch.first, stretch.last)
    if indexes:
        _copy_each(list(targets[stretch.first : stretch.last]), list(sources[stretch.first : stretch.last]), indexes)
    for index, start, stop in stretch.parts:
        target, source = targets[index], sources[index]
        if target.is_contiguous() and source.is_contiguous():
            # Modes are properties of a thread: inference tensors can be changed, and viewed to be changed, only in this one.
            with torch.inference_mode():
                target, source = target.view(-1)[start:stop], source.view(-1)[start:stop]
            _copy_one(target, source, index)
        elif start == 0:
            # Elements of a tensor of another order cannot be told apart cheaply: its first thread copies all of it.
            _copy_one(target, source, index)


@torch.inference_mode()
def _copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor], indexes: Sequence[int]) -> None:
    """Copy all in one call; where torch has none for them (conjugated targets), one after the other."""
    if not targets:
        return
    try:
        torch._foreach_copy_(targets, sources)
    except RuntimeError:
        for target, source, index in zip(targets, sources, indexes, strict=True):
            _copy_one(target, source, index)


@torch.inference_mode()
def _copy_one(target: torch.Tensor, source: torch.Tensor, index: int) -> None:
    try:
        target.copy_(source)
    except RuntimeError as err:
        raise _CopyFailed(index, str(err)) from err
