"""
Filling a slot from storage: which stored bytes go where, read and verified. Called from: `load`, `arena_load`.

A wanted chunk that was stored as it is (the common case: the same ranks) is read straight into the slot with direct I/O and
checked against its digest. Anything else (another world size, a checkpoint of stock DCP) goes through `executor.reshard`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Final

from pillion.errors import ArenaExhausted
from pillion.wire import arena, layout, manifest
from pillion_sidecar import catalog, shared_files
from pillion_sidecar.executor import matching
from pillion_sidecar.executor.context import Context, Progress
from pillion_sidecar.executor.load_request import Request, Wanted
from pillion_sidecar.storage import digest, directio, reading

PROGRESS_BYTES: Final = 32 * 1024**2
"""Verified bytes between two announcements: 5 ms of copying, so the copy starts early and messages stay few."""

_growing = threading.Lock()
"""Ranks are filled side by side, and the limit is one for all."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What one local rank got."""

    opaque: Mapping[str, Any]
    """Where its opaque leaves are: file, starts, lengths."""
    match: matching.Match | None = None
    """What of its wishes was fulfilled; None: all, as they are."""
    unexpected: Sequence[str] = ()
    """What its own snapshot has besides; from storage that is a matter of all ranks."""


def from_storage(context: Context, request: Request, stored: catalog.Stored, progress: Progress) -> dict[int, Filled]:
    """
    Fill the spare slot of every local rank.

    Raises:
        catalog.Damaged: something stored does not match its digest, or is missing.
        IncompatibleCheckpoint: the checkpoint has not what the state dict wants; names the FQNs.
        ArenaExhausted: the slot would be larger than the policy allows.
        LoadError: the storage does not answer.
    """

    def fill(wanted: Wanted) -> tuple[int, Filled]:
        return wanted.rank, _fill_rank(context, request, stored, wanted, progress)

    with futures.ThreadPoolExecutor(max(1, min(len(request.wanted), os.cpu_count() or 1)), "pillion-fill") as pool:
        return dict(pool.map(fill, request.wanted))


def _fill_rank(
    context: Context, request: Request, stored: catalog.Stored, wanted: Wanted, progress: Progress
) -> Filled:
    tensors = {fqn: matching.Tensor(chunks[0].dtype, chunks[0].size) for fqn, chunks in stored.chunks.items()}
    where = f"the checkpoint {stored.path}"
    found = matching.match(wanted.layout, tensors, stored.opaque.keys(), strict=request.strict, where=where)
    target = found.layout
    memory = begin(context, request, wanted.rank, found, progress, tier="storage")
    exact: dict[str, list[tuple[int, manifest.StoredChunk]]] = {}
    pending = set()
    for index, item in enumerate(target.items):
        chunk = next((c for c in stored.chunks[item.fqn] if (c.offsets, c.sizes) == (item.offsets, item.sizes)), None)
        if chunk is not None and stored.native:
            exact.setdefault(chunk.file, []).append((index, chunk))
        else:
            pending.add(index)
    ready = Ready(len(target.items), wanted.rank, target, progress)
    for file, members in exact.items():
        _read_exact(os.path.join(stored.path, file), memory, target, members, ready)
    if pending:
        from pillion_sidecar.executor import reshard  # torch

        cache = reshard.Source(stored)
        for index in sorted(pending):
            cache.assemble(target, index, memory)
            ready.mark(index)
    return Filled(_write_opaque(context, stored, wanted.rank, target), found)


def begin(
    context: Context, request: Request, rank: int, found: matching.Match, progress: Progress, *, tier: str
) -> memoryview:
    """
    Have the spare slot of a rank hold the layout that was found, and tell the trainer how it lies there; the image.

    Raises:
        ArenaExhausted: it would be larger than the policy allows.
    """
    segment, slot = context.segments[rank], request.spare_slot
    needed = arena.PAGE_BYTES + found.layout.tensors_bytes + arena.PAGE_BYTES
    with _growing:
        used = sum(each.capacity_bytes(i) for each in context.segments.values() for i in range(each.header.num_slots))
        has = segment.capacity_bytes(slot, enough_bytes=needed)
        if request.limit_bytes is not None and needed > has and used - has + needed > request.limit_bytes:
            raise ArenaExhausted(
                needed_bytes=needed,
                available_bytes=max(0, request.limit_bytes - used + has),
                cause=f"the pod's limit is {request.limit_bytes} bytes, and {used - has} are in use beside the slot to load into",
            )
        segment.grow(slot, needed)
    progress(
        {
            "type": "load_begin",
            "rank": rank,
            "tier": tier,
            "slot": slot,
            "spare": True,
            "dtypes": found.dtypes,
            "missing": found.missing,
        }
    )
    return segment.slot(slot)[arena.PAGE_BYTES : needed]


class Ready:
    """Announces the longest prefix of items that is verified."""

    def __init__(self, num_items: int, rank: int, of: layout.Layout, progress: Progress) -> None:
        self._done = bytearray(num_items)
        self._upto = self._announced = 0
        self._rank, self._layout, self._progress = rank, of, progress

    def mark(self, index: int) -> None:
        self._done[index] = 1
        while self._upto < len(self._done) and self._done[self._upto]:
            self._upto += 1
        if self._upto > self._announced:
            start = self._layout.starts[self._announced]
            if self._layout.end(self._upto - 1) - start >= PROGRESS_BYTES:
                self._announced = self._upto
                self._progress({"type": "load_progress", "rank": self._rank, "upto": self._upto})


def _read_exact(
    path: str,
    memory: memoryview,
    target: layout.Layout,
    members: Sequence[tuple[int, manifest.StoredChunk]],
    ready: Ready,
) -> None:
    pieces = [directio.Piece(chunk.offset, target.starts[index], chunk.length) for index, chunk in members]

    def verify(position: int) -> None:
        index, chunk = members[position]
        start = target.starts[index]
        if digest.digest(memory[start : start + chunk.length]) != chunk.digest:
            raise catalog.Damaged(f"{path}: {chunk.fqn!r} at offset {chunk.offset} does not match its digest")
        ready.mark(index)

    with catalog.damage(path):
        reading.retried(path, lambda: directio.read_file(path, memory, pieces, on_piece=verify))


def _write_opaque(context: Context, stored: catalog.Stored, rank: int, of: layout.Layout) -> dict[str, Any]:
    """The opaque leaves, verified, in a file beside the arena: the trainer reads it before it says that it is done."""
    segment = context.segments[rank]
    path = f"{segment.path}.opaque"
    starts, lengths, cursor = [], [], 0
    with open(shared_files.create(path, segment.mode), "wb") as out:
        for fqn in of.opaque:
            data = _read_opaque(stored, stored.opaque[fqn])
            out.write(data)
            starts.append(cursor)
            lengths.append(len(data))
            cursor += len(data)
    return {"file": path, "starts": starts, "lengths": lengths}


def _read_opaque(stored: catalog.Stored, leaf: manifest.StoredBytes) -> bytearray:
    path = os.path.join(stored.path, leaf.file)
    with catalog.damage(path):
        data = reading.read_piece(path, leaf.offset, leaf.length)
    if leaf.digest and digest.digest(data) != leaf.digest:
        raise catalog.Damaged(f"{path}: {leaf.fqn!r} at offset {leaf.offset} does not match its digest")
    return data
