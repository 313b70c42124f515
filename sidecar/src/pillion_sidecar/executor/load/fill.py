"""
Filling a slot from storage: the stored bytes are read to their place in the slot and verified.

A chunk that was stored exactly as wanted (the common case: the same ranks) is read straight into the slot with direct I/O, and its digest is
checked. Any other chunk (another world size, a checkpoint of stock DCP) goes through `executor.load.reshard`.

Called from: `executor.load.restore`, `executor.load.snapshot`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from pillion.wire import arena, layout, manifest
from pillion.wire.load_messages import LoadBegin, LoadProgress, OpaqueLeaves, Tier
from pillion_sidecar import affinity, channel
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.executor.load import matching
from pillion_sidecar.executor.load.request import Request, Wanted
from pillion_sidecar.executor.session import Context, Progress
from pillion_sidecar.storage import digest, reading, stretches
from pillion_sidecar.storage.folder import Folder

PROGRESS_BYTES: Final = 32 * 1024**2
"""Verified bytes between two announcements. They take 5 ms to copy, so the copy starts early and messages stay few."""


@dataclass(frozen=True, slots=True)
class Filled:
    """The result of filling the slot of one local rank."""

    opaque: OpaqueLeaves
    match: matching.Match | None = None
    """The comparison of the rank's state dict with the checkpoint; None: they are equal."""
    unexpected: Sequence[str] = ()
    """Names in the rank's own snapshot that it did not ask for. Empty for a load from storage, where all ranks share the checkpoint."""


def from_storage(
    context: Context,
    request: Request,
    stored: catalog.Stored | Mapping[int, catalog.Stored],
    progress: Progress,
    tier: Tier = Tier.STORAGE,
) -> dict[int, Filled]:
    """
    Fill the spare slot of every local rank.

    Args:
        stored: the checkpoint of all ranks; or for each local rank its own.
        tier: what the trainers are told.

    Raises:
        catalog.Damaged: stored data does not match its digest, or is missing.
        IncompatibleCheckpoint: the checkpoint lacks a part of the state dict; the error names the FQNs.
        ArenaExhausted: the slot would be larger than the policy allows.
        LoadError: the storage does not answer.
    """

    def fill(wanted: Wanted) -> tuple[int, Filled]:
        own = stored if isinstance(stored, catalog.Stored) else stored[wanted.rank]
        return wanted.rank, _fill_rank(context, request, own, wanted, progress, tier)

    with futures.ThreadPoolExecutor(max(1, min(len(request.wanted), os.cpu_count() or 1)), "pillion-fill") as pool:
        return dict(pool.map(fill, request.wanted))


def _fill_rank(
    context: Context, request: Request, stored: catalog.Stored, wanted: Wanted, progress: Progress, tier: Tier
) -> Filled:
    tensors = matching.tensors_in(stored.chunks)
    where = f"the checkpoint {stored.folder}"
    match = matching.match(wanted.layout, tensors, stored.opaque.keys(), strict=request.strict, where=where)
    target = match.layout
    opaque_bytes = _opaque_bytes(stored, target)
    memory = begin(context, request, wanted.rank, match, progress, tier=tier, opaque_bytes=opaque_bytes)
    exact: dict[str, list[tuple[int, manifest.StoredChunk]]] = {}
    pending = set()
    taken: set[tuple[str, int]] = set()
    for index, item in enumerate(target.items):
        chunk = next((c for c in stored.chunks[item.fqn] if (c.offsets, c.sizes) == (item.offsets, item.sizes)), None)
        # A chunk that fills a second tensor (a load with `rename`) is copied: a direct read moves each piece of a file once.
        if chunk is not None and stored.native and (chunk.file, chunk.offset) not in taken:
            taken.add((chunk.file, chunk.offset))
            exact.setdefault(chunk.file, []).append((index, chunk))
        else:
            pending.add(index)
    ready = Ready(len(target.items), wanted.rank, target, progress)
    for file, members in exact.items():
        _read_exact(stored.folder, file, memory, target, members, ready)
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
    leaves = OpaqueLeaves(file=file, starts=tuple(starts) if lengths else (), lengths=tuple(lengths))
    return Filled(leaves, match)


def begin(
    context: Context,
    request: Request,
    rank: int,
    match: matching.Match,
    progress: Progress,
    *,
    tier: Tier,
    opaque_bytes: int = 0,
) -> memoryview:
    """
    Make the spare slot of a rank large enough for the matched layout, and send the layout to the trainer. Return the slot's image.

    Args:
        opaque_bytes: room behind the tensors, for opaque leaves.

    Raises:
        ArenaExhausted: the slot would be larger than the policy or the container allows.
        SidecarError: the supervisor did not finish growing the slot.
    """
    segment, slot = context.segments[rank], request.spare_slot
    # Behind the last tensor: a page that direct I/O may touch. The opaque leaves go there too, after all tensors are read.
    needed = arena.PAGE_BYTES + match.layout.tensors_bytes + max(arena.PAGE_BYTES, opaque_bytes)
    with affinity.beside(request.near.get(rank, 0)):
        context.growth.grow(rank, slot, needed)
    begun = LoadBegin(tier=tier, slot=slot, dtypes=match.dtypes, missing=match.missing)
    progress(channel.LoadBegun(rank=rank, begin=begun, fills=True))
    return segment.slot(slot)[arena.PAGE_BYTES : needed]


class Ready:
    """Announces to the trainer how many items, counted from the first, are verified."""

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
                self._progress(channel.LoadMoved(rank=self._rank, progress=LoadProgress(upto=self._upto)))


def _read_exact(
    folder: Folder,
    file: str,
    memory: memoryview,
    target: layout.Layout,
    members: Sequence[tuple[int, manifest.StoredChunk]],
    ready: Ready,
) -> None:
    path = f"{folder}/{file}"
    pieces = [stretches.Piece(chunk.offset, target.starts[index], chunk.length) for index, chunk in members]

    def verify(position: int) -> None:
        index, chunk = members[position]
        start = target.starts[index]
        if digest.digest(memory[start : start + chunk.length]) != chunk.digest:
            raise catalog.Damaged(f"{path}: {chunk.fqn!r} at offset {chunk.offset} does not match its digest")
        ready.mark(index)

    with catalog.damage(path):
        reading.retried(path, lambda: folder.read_into(file, memory, pieces, on_piece=verify))


def _opaque_bytes(stored: catalog.Stored, slot_layout: layout.Layout) -> int:
    """
    Return the sum of the lengths of all wanted opaque leaves.

    Raises:
        catalog.Damaged: a length is negative, or reaches beyond the end of its file. The arena must not grow for such a length.
    """
    files = reading.retried(stored.folder, stored.folder.files) if slot_layout.opaque else {}
    for leaf in (stored.opaque[fqn] for fqn in slot_layout.opaque):
        path, end = f"{stored.folder}/{leaf.file}", leaf.offset + leaf.length
        with catalog.damage(path):
            if leaf.file not in files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if end > files[leaf.file].length:
                raise stretches.TruncatedFile(path, wanted_bytes=end, found_bytes=files[leaf.file].length)
        if leaf.length < 0:
            raise catalog.Damaged(f"{path}: {leaf.fqn!r} has a negative length")
    return sum(stored.opaque[fqn].length for fqn in slot_layout.opaque)


def _write_opaque(stored: catalog.Stored, slot_layout: layout.Layout, memory: memoryview) -> list[int]:
    """Write the verified opaque leaves one behind the other, and return their lengths. The trainer reads them before it says "done"."""
    lengths = [stored.opaque[fqn].length for fqn in slot_layout.opaque]
    for fqn, end, length in zip(slot_layout.opaque, accumulate(lengths), lengths, strict=True):
        memory[end - length : end] = _read_opaque(stored, stored.opaque[fqn])
    return lengths


def _read_opaque(stored: catalog.Stored, leaf: manifest.StoredBytes) -> bytearray:
    path = f"{stored.folder}/{leaf.file}"
    with catalog.damage(path):
        data = reading.retried(path, lambda: stored.folder.read_piece(leaf.file, leaf.offset, leaf.length))
    if leaf.digest and digest.digest(data) != leaf.digest:
        raise catalog.Damaged(f"{path}: {leaf.fqn!r} at offset {leaf.offset} does not match its digest")
    return data
