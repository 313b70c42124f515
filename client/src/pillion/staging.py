"""
The trainer's mapping of its segment: copies into it and out of it, and the seal.

Called from: `pillion.saving`, `pillion.loading`, `pillion.preparing`. In the trainer, user data moves only here, in `pillion.host_copies`
and in `pillion.device_copies`. Owns: the mapping, and its registrations with CUDA. It never creates, grows or unlinks a segment.

Tensors over the arena are kept from save to save. They are made and used with the caller's modes off (`pillion.modes`). A tensor made in
a FakeTensorMode would have no memory, and one made in inference mode could not be written outside of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pillion import device_copies, devices, host_copies, modes, registration
from pillion import leaves as leaves_module
from pillion.errors import IncompatibleCheckpoint, SidecarUnavailable, StagingError
from pillion.wire import arena
from pillion.wire import layout as layout_module
from pillion.wire.remarks import NO_REMARKS, Remarks

POPULATE_STEP_BYTES: Final = 64 * 1024**2
"""Bytes mapped by one madvise call. The call holds the GIL, and this size bounds the pause to about 5 ms."""
MADV_POPULATE_WRITE: Final = 23
"""madvise advice (Linux 5.14) that maps pages now, so that the first save has no page faults. Older kernels return EINVAL."""


class SegmentMapping:
    """
    The trainer's view of its segment.

    Args:
        path: the segment file, made by the sidecar.

    Raises:
        StagingError: the segment cannot be opened or mapped.
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
            self._registration = registration.Registration(self._bytes.data_ptr())
        self._views: dict[int, tuple[str, list[torch.Tensor]]] = {}
        """Slot -> digest of a layout, and a tensor over each of its items."""
        self._making = threading.Lock()
        """Held while views are made: the preparing thread and a save may need the same views."""
        self._populated: dict[int, int] = {}
        self._host = host_copies.HostCopies()
        self._devices = device_copies.DeviceCopies()
        self._on_device = [threading.Lock() for _ in range(self.header.num_slots)]
        """One lock a slot: no further registration while a device copies."""
        self._using = threading.Lock()
        self._users = 0
        self._closed = False

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._using:
            if self._closed:
                raise SidecarUnavailable(
                    "this arena is no longer in use: the sidecar was replaced, or the session was closed"
                )
            self._users += 1
        try:
            yield
        finally:
            with self._using:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                self._let_go()

    # --- ahead of a save ---------------------------------------------------------------------------------------------

    def populate(self, slot: int, capacity_bytes: int, on_devices: Sequence[torch.device] = ()) -> None:
        """
        Map the slot's pages into this process, and register them with CUDA for a state on these devices.

        Called from: a thread of the client, ahead of the first save. Blocks: about 50 ms a GiB, in pieces. On a GPU see `Registration.extend`.

        Raises:
            SidecarUnavailable: see `close`.
        """
        with self._in_use():
            start = self._populated.get(slot, 0)
            base = self.header.slot_offset(slot)
            while start < capacity_bytes and not self._closed:
                length = min(POPULATE_STEP_BYTES, capacity_bytes - start)
                try:
                    self._map.madvise(MADV_POPULATE_WRITE, base + start, length)
                except OSError:
                    break
                start += length
            self._populated[slot] = max(capacity_bytes, self._populated.get(slot, 0))
            if on_devices:
                with self._on_device[slot]:
                    self._registration.extend(base, capacity_bytes, on_devices)

    def warm(self, slot: int, layout: layout_module.Layout) -> None:
        """Make the views and shares that a copy into this slot needs. Called from: a thread of the client, ahead of the first save."""
        self.views(slot, layout)
        self._host.share_out(layout, 0, len(layout.items))

    @modes.off()
    def views(self, slot: int, layout: layout_module.Layout) -> list[torch.Tensor]:
        """
        Return a tensor over each item's payload in the arena. They are kept, as making 10,000 of them takes some 50 ms.

        Raises:
            IncompatibleCheckpoint: this torch does not have the dtype of an item.
            SidecarUnavailable: see `close`.
        """
        with self._in_use(), self._making:
            digest, made = self._views.get(slot, ("", []))
            if digest != layout.digest:
                made = self._made_views(slot, layout)
                self._views[slot] = (layout.digest, made)
            return made

    def _made_views(self, slot: int, layout: layout_module.Layout) -> list[torch.Tensor]:
        image = self.header.slot_offset(slot) + arena.PAGE_BYTES
        made = []
        for item, start in zip(layout.items, layout.payload_starts, strict=True):
            dtype = leaves_module.DTYPES.get(item.dtype)
            if dtype is None:
                raise IncompatibleCheckpoint(
                    f"{item.fqn!r} has the dtype {item.dtype}, which torch {torch.__version__} does not have",
                    fqns=[item.fqn],
                )
            if item.payload_bytes == 0:
                made.append(torch.empty(item.sizes, dtype=dtype))
                continue
            flat = self._bytes[image + start : image + start + item.payload_bytes]
            made.append(flat.view(dtype).view(item.sizes))
        return made

    # --- saving and loading ------------------------------------------------------------------------------------------

    @modes.off()
    def copy_in(
        self,
        slot: int,
        leaves: leaves_module.Leaves,
        *,
        only: Sequence[int] | None = None,
        ready: Mapping[torch.device, Any] | None = None,
        capacity_bytes: int = 0,
    ) -> None:
        """
        Copy the leaves' tensors into the slot.

        Args:
            slot: index of the slot.
            leaves: what to copy. Their layout has the offsets.
            only: indexes of the items to copy. None for all.
            ready: for each CUDA device an event that its copies wait for (`devices.marks`). None: they wait for its current stream.
            capacity_bytes: size of the slot. All of it is registered before a device copies into it.

        Blocks: for the copy; on a GPU until the side streams are done.

        Raises:
            StagingError: torch cannot copy a tensor; names it.
            SidecarUnavailable: see `close`.
        """
        with self._in_use():
            views, sources, layout = self.views(slot, leaves.layout), leaves.tensors, leaves.layout
            try:
                if only is None and all(source.is_cpu for source in sources):
                    self._host.copy(views, sources, layout, 0, len(sources))
                    return
                chosen = range(len(sources)) if only is None else only
                self._host.copy_some(views, sources, layout, [index for index in chosen if sources[index].is_cpu])
                copies = [
                    device_copies.Copy(index, views[index], sources[index])
                    for index in chosen
                    if not sources[index].is_cpu
                ]
                if copies:
                    with self._on_device[slot]:
                        used = devices.used_by(each.device for each in copies)
                        if used and capacity_bytes:
                            self._registration.extend(self.header.slot_offset(slot), capacity_bytes, used)
                        self._devices.take(copies, self._cuts(slot, layout), ready)
            except host_copies.CopyFailed as err:
                fqn = layout.items[err.index].fqn
                raise StagingError(f"cannot copy {fqn!r} into the arena: {err}") from err

    def _cuts(self, slot: int, layout: layout_module.Layout) -> Mapping[int, tuple[int, ...]]:
        image = self.header.slot_offset(slot) + arena.PAGE_BYTES
        return registration.cuts(layout, self._registration.edges(image, layout.tensors_bytes))

    @modes.off()
    def copy_out(self, slot: int, leaves: leaves_module.Leaves, first: int, last: int) -> None:
        """
        Copy items [first, last) of a slot into the leaves' tensors, which may have another dtype.

        Raises:
            IncompatibleCheckpoint: torch cannot copy into a tensor; names it.
            SidecarUnavailable: see `close`.
        """
        with self._in_use():
            views, tensors, layout = self.views(slot, leaves.layout), leaves.tensors, leaves.layout
            alike = [i for i in range(first, last) if tensors[i].is_cpu and tensors[i].dtype == views[i].dtype]
            try:
                if len(alike) == last - first:
                    self._host.copy(tensors, views, layout, first, last)
                    return
                host_copies.copy_each([tensors[i] for i in alike], [views[i] for i in alike], alike)
                others = sorted(set(range(first, last)).difference(alike))
                with self._on_device[slot]:
                    cuts = self._cuts(slot, layout)
                    for index in others:
                        if tensors[index].is_cpu:
                            host_copies.copy_one(tensors[index], views[index], index)
                        else:
                            copy = device_copies.Copy(index, views[index], tensors[index])
                            device_copies.give(copy, cuts.get(index, ()))
            except host_copies.CopyFailed as err:
                fqn = layout.items[err.index].fqn
                raise IncompatibleCheckpoint(f"cannot copy into {fqn!r}: {err}", fqns=[fqn]) from err

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
        remarks: Remarks = NO_REMARKS,
    ) -> None:
        """
        Write opaque leaves, layout, trailer and header, and the state word last.

        Afterwards the sidecar and its successors may read the slot.

        Raises:
            SidecarUnavailable: see `close`.
        """
        with self._in_use():
            trailer = {"version": 1, "step": step, "opaque": [len(data) for data in opaque], **remarks.to_document()}
            encoded = json.dumps(trailer, separators=(",", ":")).encode()
            self._seal(
                slot, leaves.layout, opaque, encoded, step=step, rank=rank, world_size=world_size, session=session
            )

    def _seal(
        self,
        slot: int,
        layout: layout_module.Layout,
        opaque: Sequence[bytes],
        trailer: bytes,
        *,
        step: int,
        rank: int,
        world_size: int,
        session: bytes,
    ) -> None:
        base = self.header.slot_offset(slot)
        before = arena.SlotHeader.unpack(
            self._map[base : base + arena.PAGE_BYTES], stride_bytes=self.header.stride_bytes
        )
        starts, image_bytes = layout.opaque_starts([len(data) for data in opaque])
        image = base + arena.PAGE_BYTES
        for start, data in zip(starts, opaque, strict=True):
            self._map[image + start : image + start + len(data)] = data
        layout_offset = arena.PAGE_BYTES + image_bytes
        if before.layout_digest != bytes.fromhex(layout.digest) or before.layout_offset != layout_offset:
            self._map[base + layout_offset : base + layout_offset + len(layout.encoded)] = layout.encoded
        trailer_offset = layout_module.aligned(layout_offset + len(layout.encoded))
        self._map[base + trailer_offset : base + trailer_offset + len(trailer)] = trailer
        header = arena.SlotHeader(
            state=arena.SlotState.FILLING,
            flags=before.flags,
            sequence=before.sequence,
            step=step,
            rank=rank,
            world_size=world_size,
            image_bytes=image_bytes,
            layout_offset=layout_offset,
            layout_bytes=len(layout.encoded),
            trailer_offset=trailer_offset,
            trailer_bytes=len(trailer),
            sealed_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            layout_digest=bytes.fromhex(layout.digest),
            trailer_digest=hashlib.blake2b(trailer, digest_size=16).digest(),
            session=session,
            # A new layout has overwritten the archive heads of the previous one.
            framed_digest=before.framed_digest if before.layout_digest == bytes.fromhex(layout.digest) else bytes(16),
            digests_offset=layout_module.aligned(trailer_offset + len(trailer)),
            generation=before.generation,
            epoch=before.epoch,
        )
        self._map[base : base + arena.SLOT_FORMAT.size] = header.pack()
        state = base + arena.STATE_OFFSET
        ctypes.c_uint32.from_buffer(self._map, state).value = int(arena.SlotState.SEALED)

    # --- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """
        Release the segment as soon as no copy uses it: unregister it from CUDA, then unmap it. Idempotent.

        Current users finish; later calls raise SidecarUnavailable. Never blocks: the last user releases the segment.
        """
        with self._using:
            self._closed = True
            if self._users:
                return
        self._let_go()

    @modes.off()
    def _let_go(self) -> None:
        # Before the unmapping: the driver keeps its table, and would use it for whatever is mapped at this address next.
        self._registration.release()
        self._host.close()
        with self._making:
            self._views.clear()
            self._bytes = torch.empty(0, dtype=torch.uint8)
        # A view may still exist after an interrupted copy. Then the mapping ends with that view.
        with contextlib.suppress(BufferError):
            self._map.close()


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot that this rank may fill for one step."""

    slot: int
    capacity_bytes: int
    room_bytes: int
    """Bytes that the claim requested. At most `capacity_bytes`."""
    mapping: SegmentMapping
    """The segment with this slot. A replaced sidecar may have another segment."""
