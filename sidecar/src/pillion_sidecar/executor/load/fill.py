"""
Filling a slot from storage: which stored bytes go where, read and verified. Called from: `executor.load.restore`, `executor.load.snapshot`.

A wanted chunk that was stored as it is (the common case: the same ranks) is read straight into the slot with direct I/O and
checked against its digest. Anything else (another world size, a checkpoint of stock DCP) goes through `executor.load.reshard`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from pillion.wire import arena, layout, manifest
from pillion_sidecar import affinity
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.executor.load import matching
from pillion_sidecar.executor.load.request import Request, Wanted
from pillion_sidecar.executor.session import Context, Progress
from pillion_sidecar.storage import digest, directio, reading

PROGRESS_BYTES: Final = 32 * 1024**2
"""Verified bytes between two announcements: 5 ms of copying, so the copy starts early and messages stay few."""


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
    match = matching.match(wanted.layout, tensors, stored.opaque.keys(), strict=request.strict, where=where)
    target = match.layout
    opaque_bytes = _opaque_bytes(stored, target)
    memory = begin(context, request, wanted.rank, match, progress, tier="storage", opaque_bytes=opaque_bytes)
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
        from pillion_sidecar.executor.load import reshard  # torch

        cache = reshard.Source(stored)
        for index in sorted(pending):
            cache.assemble(target, index, memory)
            ready.mark(index)
    slot_start = context.segments[wanted.rank].header.slot_offset(request.spare_slot)
    lengths = _write_opaque(stored, target, memory[target.tensors_bytes :])
    starts = accumulate(lengths[:-1], initial=slot_start + arena.PAGE_BYTES + target.tensors_bytes)
    file = context.segments[wanted.rank].path
    return Filled({"file": file, "starts": list(starts) if lengths else [], "lengths": lengths}, match)


def begin(
    context: Context,
    request: Request,
    rank: int,
    match: matching.Match,
    progress: Progress,
    *,
    tier: str,
    opaque_bytes: int = 0,
) -> memoryview:
    """
    Have the spare slot of a rank hold the layout that was found, and tell the trainer how it lies there; the image.

    Args:
        opaque_bytes: room behind the tensors.

    Raises:
        ArenaExhausted: it would be larger than the policy or the container allows.
        SidecarError: the supervisor grows slots, and does not end.
    """
    segment, slot = context.segments[rank], request.spare_slot
    # Behind the last tensor a page that direct I/O may touch, or the opaque leaves, which are written when the tensors are there.
    needed = arena.PAGE_BYTES + match.layout.tensors_bytes + max(arena.PAGE_BYTES, opaque_bytes)
    with affinity.beside(request.near.get(rank, 0)):
        context.growth.grow(rank, slot, needed)
    progress(
        {
            "type": "load_begin",
            "rank": rank,
            "tier": tier,
            "slot": slot,
            "spare": True,
            "dtypes": match.dtypes,
            "missing": match.missing,
        }
    )
    return segment.slot(slot)[arena.PAGE_BYTES : needed]


class Ready:
    """Announces the longest prefix of items that is verified."""

    def __init__(self, num_items: int, rank: int, slot_layout: layout.Layout, progress: Progress) -> None:
        self._done = bytearray(num_items)
        self._upto = self._announced = 0
        self._rank, self._layout, self._progress = rank, slot_layout, progress

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


def _opaque_bytes(stored: catalog.Stored, slot_layout: layout.Layout) -> int:
    """
    Length of all opaque leaves that are wanted.

    Raises:
        catalog.Damaged: a length is none, or beyond the end of its file: such a one is no reason to grow the arena.
    """
    sizes: dict[str, int] = {}
    for leaf in (stored.opaque[fqn] for fqn in slot_layout.opaque):
        path = os.path.join(stored.path, leaf.file)
        with catalog.damage(path):
            if path not in sizes:
                sizes[path] = reading.retried(path, functools.partial(os.path.getsize, path))
            if leaf.offset + leaf.length > sizes[path]:
                raise directio.TruncatedFile(path, wanted_bytes=leaf.offset + leaf.length, found_bytes=sizes[path])
        if leaf.length < 0:
            raise catalog.Damaged(f"{path}: {leaf.fqn!r} has a negative length")
    return sum(stored.opaque[fqn].length for fqn in slot_layout.opaque)


def _write_opaque(stored: catalog.Stored, slot_layout: layout.Layout, memory: memoryview) -> list[int]:
    """The opaque leaves, verified, one behind the other: the trainer reads them before it says that it is done. Their lengths."""
    lengths = [stored.opaque[fqn].length for fqn in slot_layout.opaque]
    for fqn, end, length in zip(slot_layout.opaque, accumulate(lengths), lengths, strict=True):
        memory[end - length : end] = _read_opaque(stored, stored.opaque[fqn])
    return lengths


def _read_opaque(stored: catalog.Stored, leaf: manifest.StoredBytes) -> bytearray:
    path = os.path.join(stored.path, leaf.file)
    with catalog.damage(path):
        data = reading.read_piece(path, leaf.offset, leaf.length)
    if leaf.digest and digest.digest(data) != leaf.digest:
        raise catalog.Damaged(f"{path}: {leaf.fqn!r} at offset {leaf.offset} does not match its digest")
    return data
