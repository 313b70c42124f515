"""
Filling a slot from storage: which stored bytes go where, read and verified. Called from: `executor.load`.

A wanted chunk that was stored as it is (the common case: the same ranks) is read straight into the slot with direct I/O and
checked against its digest. Anything else (another world size, a checkpoint of stock DCP) goes through `executor.reshard`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import arena, layout, manifest
from pillion_sidecar import catalog
from pillion_sidecar.storage import digest, directio, reading

if TYPE_CHECKING:
    from pillion_sidecar.executor.context import Context, Progress
    from pillion_sidecar.executor.load import Request, Wanted

PROGRESS_BYTES = 32 * 1024**2
"""Verified bytes between two announcements: 5 ms of copying, so the copy starts early and messages stay few."""
MISMATCHES_SHOWN = 20
"""FQNs listed in an error's text; the error's field has all."""


def from_storage(context: Context, request: Request, path: str, step: int, progress: Progress) -> dict[str, Any]:
    """
    Fill the spare slot of every local rank.

    Raises:
        catalog.Damaged: something stored does not match its digest, or is missing.
        IncompatibleCheckpoint: the checkpoint has not what the state dict wants; names the FQNs.
    """
    stored = catalog.read(path, step)

    def fill(wanted: Wanted) -> tuple[str, dict[str, Any]]:
        return str(wanted.rank), _fill_rank(context, request, stored, wanted, progress)

    with futures.ThreadPoolExecutor(max(1, min(len(request.wanted), os.cpu_count() or 1)), "pillion-fill") as pool:
        return dict(pool.map(fill, request.wanted))


def _fill_rank(
    context: Context, request: Request, stored: catalog.Stored, wanted: Wanted, progress: Progress
) -> dict[str, Any]:
    target, dtypes = match(wanted.layout, stored)
    segment, slot = context.segments[wanted.rank], request.spare_slot
    needed = arena.PAGE_BYTES + target.tensors_bytes + arena.PAGE_BYTES
    segment.grow(slot, needed)
    progress({"type": "load_begin", "rank": wanted.rank, "tier": "storage", "slot": slot, "dtypes": dtypes})
    memory = segment.slot(slot)[arena.PAGE_BYTES : needed]
    exact: dict[str, list[tuple[int, manifest.StoredChunk]]] = {}
    pending = set()
    for index, item in enumerate(target.items):
        chunk = next((c for c in stored.chunks[item.fqn] if (c.offsets, c.sizes) == (item.offsets, item.sizes)), None)
        if chunk is not None and stored.native:
            exact.setdefault(chunk.file, []).append((index, chunk))
        else:
            pending.add(index)
    ready = _Ready(len(target.items), wanted.rank, target, progress)
    for file, members in exact.items():
        _read_exact(os.path.join(stored.path, file), memory, target, members, ready)
    if pending:
        from pillion_sidecar.executor import reshard  # torch

        cache = reshard.Source(stored)
        for index in sorted(pending):
            cache.assemble(target, index, memory)
            ready.mark(index)
    return _write_opaque(context, stored, wanted)


def match(of: layout.Layout, stored: catalog.Stored) -> tuple[layout.Layout, dict[str, str]]:
    """
    The wanted layout in the dtypes of the checkpoint, and those that differ. Pure.

    Raises:
        IncompatibleCheckpoint: names, shapes or kinds do not fit.
    """
    problems: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    items = []
    for item in of.items:
        chunks = stored.chunks.get(item.fqn)
        if chunks is None:
            problems[item.fqn] = "is no tensor there" if item.fqn in stored.opaque else "is not in it"
        elif chunks[0].size != item.size:
            problems[item.fqn] = f"has shape {list(chunks[0].size)} there, {list(item.size)} here"
        else:
            if chunks[0].dtype != item.dtype:
                dtypes[item.fqn] = chunks[0].dtype
            items.append(dataclasses.replace(item, dtype=chunks[0].dtype))
    for fqn in of.opaque:
        if fqn not in stored.opaque:
            problems[fqn] = "is a tensor there" if fqn in stored.chunks else "is not in it"
    if problems:
        shown = list(problems.items())[:MISMATCHES_SHOWN]
        more = f" and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise IncompatibleCheckpoint(
            f"the checkpoint {stored.path} does not fit: " + "; ".join(f"{f!r} {why}" for f, why in shown) + more,
            fqns=list(problems),
        )
    return layout.Layout(tuple(items), of.opaque, of.paths), dtypes


class _Ready:
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
    ready: _Ready,
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


def _write_opaque(context: Context, stored: catalog.Stored, wanted: Wanted) -> dict[str, Any]:
    """The opaque leaves, verified, in a file beside the arena: the trainer reads it before it says that it is done."""
    segment = context.segments[wanted.rank]
    path = f"{segment.path}.opaque"
    starts, lengths, cursor = [], [], 0
    with open(path, "wb") as out:
        os.fchmod(out.fileno(), segment.mode)
        for fqn in wanted.layout.opaque:
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
