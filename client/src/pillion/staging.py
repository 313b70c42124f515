"""
Copies between the trainer's tensors and the arena: the only place where user data moves in the trainer.

Called from: `pillion.checkpointer` (training thread, or the staging thread of an overlapped save). Owns: the trainer's mapping
of its segment; it never creates, grows or unlinks one.

On a GPU the mapping is registered with CUDA, so that device-to-host copies run asynchronously on a stream of their own
straight into the arena. On a CPU one batched call copies all tensors: the GIL is given up once, not once a tensor, because a
trainer whose GIL is busy takes up to 5 ms (sys.getswitchinterval) to give it back.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Sequence
from typing import Any, Final

import torch

from pillion import leaves as leaves_module
from pillion.errors import StagingError
from pillion.wire import arena, layout

_log = logging.getLogger(__name__)

REGISTER_PIECE_BYTES: Final = 256 * 1024**3
"""Longest single cudaHostRegister: one call of 512 GiB or more fails on r580 drivers and leaves a sticky error (maru#65)."""
POPULATE_STEP_BYTES: Final = 64 * 1024**2
"""madvise holds the GIL while it maps pages: this bounds the pause to about 5 ms a call."""
MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14: map the pages now, so that the first save takes no page faults. Older kernels answer EINVAL, which is fine."""


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
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._views: dict[tuple[int, str], list[torch.Tensor]] = {}
        self._populated: dict[int, int] = {}
        self._registered: dict[int, list[tuple[int, int]]] = {}
        self._stream: Any = None

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

    def views(self, slot: int, of: layout.Layout) -> list[torch.Tensor]:
        """A tensor over the payload of each item, in the arena. Kept: making 10,000 of them takes some 50 ms."""
        known = self._views.get((slot, of.digest))
        if known is not None:
            return known
        for key in [key for key in self._views if key[0] == slot]:
            del self._views[key]
        image = self.header.slot_offset(slot) + arena.PAGE_BYTES
        made = []
        for item, start in zip(of.items, of.payload_starts, strict=True):
            dtype = leaves_module.DTYPES[item.dtype]
            if item.payload_bytes == 0:
                made.append(torch.empty(item.sizes, dtype=dtype))
                continue
            flat = self._bytes[image + start : image + start + item.payload_bytes]
            made.append(flat.view(dtype).view(item.sizes))
        self._views[(slot, of.digest)] = made
        return made

    def copy_in(self, slot: int, leaves: leaves_module.Leaves, *, ready: Any = None) -> None:
        """
        Copy the leaves' tensors into the slot.

        Args:
            slot: index of the slot.
            leaves: what to copy; their layout says where to.
            ready: a CUDA event that the copies wait for; None for the current stream.

        Blocks: for the copy; on a GPU until the side stream is done.
        """
        views = self.views(slot, leaves.layout)
        sources = leaves.tensors
        with torch.no_grad():
            host = [(v, s) for v, s in zip(views, sources, strict=True) if s.is_cpu]
            if host:
                torch._foreach_copy_([v for v, _ in host], [s for _, s in host])
            if len(host) < len(sources):
                device = [(v, s) for v, s in zip(views, sources, strict=True) if not s.is_cpu]
                self._copy_from_device(device, ready)

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
        manifest = json.dumps({"version": 1, "opaque": [len(data) for data in opaque]}, separators=(",", ":")).encode()
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
            sealed_ns=time.time_ns(),
            layout_digest=bytes.fromhex(of.digest),
            manifest_digest=hashlib.blake2b(manifest, digest_size=16).digest(),
            session=session,
            # Another layout has overwritten the archive heads of the one before.
            framed_digest=before.framed_digest if before.layout_digest == bytes.fromhex(of.digest) else bytes(16),
            digests_offset=layout.aligned(manifest_offset + len(manifest)),
        )
        self._map[base : base + arena.SLOT_FORMAT.size] = header.pack()
        state = base + arena.STATE_OFFSET
        ctypes.c_uint32.from_buffer(self._map, state).value = int(arena.SlotState.SEALED)

    def copy_out(self, slot: int, leaves: leaves_module.Leaves, first: int, last: int) -> None:
        """Copy items [first, last) of a slot into the leaves' own tensors (which may be of another dtype)."""
        views = self.views(slot, leaves.layout)
        with torch.no_grad():
            pairs = [(leaves.tensors[i], views[i]) for i in range(first, last) if views[i].numel()]
            host = [(t, v) for t, v in pairs if t.device.type == "cpu" and t.dtype == v.dtype]
            if host:
                torch._foreach_copy_([t for t, _ in host], [v for _, v in host])
            for target, view in pairs:
                if target.device.type != "cpu" or target.dtype != view.dtype:
                    target.copy_(view)

    def close(self) -> None:
        """Unregister from CUDA (before the mapping goes: checkpoint-engine#67) and drop the mapping."""
        for pieces in self._registered.values():
            for address, _ in pieces:
                torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        self._views.clear()
        self._bytes = torch.empty(0, dtype=torch.uint8)
