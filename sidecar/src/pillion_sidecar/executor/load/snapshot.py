"""
Loading from the arena: which snapshots have what is wanted, and handing one over. Called from: `executor.load.restore`.

A snapshot of exactly the wanted layout is read by the trainer where it lies. One that has all of it in another layout (more leaves, another
order, other dtypes) is copied into the spare slot as it is wanted. Either is verified against the digests that were taken after its seal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import arena, layout
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.executor.load import fill, matching
from pillion_sidecar.executor.load.request import Request, Wanted
from pillion_sidecar.executor.session import Context, Progress
from pillion_sidecar.storage import digest


@dataclass(frozen=True, slots=True)
class Offer:
    """What the arena of this pod has for a load."""

    usable: dict[int, dict[str, Any]] = field(default_factory=dict)
    """step -> its order, and whether it lacks some of what is wanted (`partial`)."""
    torn: dict[int, str] = field(default_factory=dict)
    """step -> what is wrong with a slot that was sealed."""
    misfits: dict[int, dict[str, Any]] = field(default_factory=dict)
    """step -> why it is whole and yet not usable, and its order."""

    def to_document(self) -> dict[str, Any]:
        return {"arena": self.usable, "torn": self.torn, "misfits": self.misfits}


def offer(context: Context, request: Request) -> Offer:
    """Look at every snapshot that all local ranks have sealed."""
    offered = Offer()
    for step, num_ranks, born in request.strangers:
        offered.misfits[step] = {
            "why": f"the snapshot of step {step} in memory is of {num_ranks} ranks, and there are {context.world_size} now: only through"
            " storage could these share it out",
            "order": list(born),
        }
    for step, slot in request.arena.items():
        order = list(request.orders.get(step, (0, 0)))
        try:
            partial = [_missing(context, request, slot, step, rank) for rank in context.local_ranks]
        except image.TornSlot as err:
            offered.torn[step] = str(err)
        except IncompatibleCheckpoint as err:
            offered.misfits[step] = {"why": str(err), "order": order}
        else:
            offered.usable[step] = {"order": order, "partial": any(partial)}
    return offered


def _missing(context: Context, request: Request, slot: int, step: int, rank: int) -> tuple[str, ...]:
    """
    What a rank's snapshot does not have of what is wanted.

    Raises:
        images.TornSlot, IncompatibleCheckpoint.
    """
    slot_image = context.reader.read(context.segments[rank], slot, step=step)
    header = slot_image.header
    if header.rank != rank or header.world_size != context.world_size:
        raise IncompatibleCheckpoint(
            f"it is of rank {header.rank} of {header.world_size}, this is rank {rank} of {context.world_size}"
        )
    wanted = next((each for each in request.wanted if each.rank == rank), None)
    if wanted is None or wanted.layout.digest == slot_image.layout.digest:
        return ()
    return match(wanted, slot_image.layout, step, strict=request.strict).missing


def match(wanted: Wanted, has: layout.Layout, step: int, *, strict: bool) -> matching.Match:
    """
    What of a rank's wishes its own snapshot fulfils. Pure.

    Raises:
        IncompatibleCheckpoint: as `matching.match`; or the ranks cut a tensor otherwise now, for which storage is needed.
    """
    where = f"the snapshot of step {step} in the memory of rank {wanted.rank}"
    tensors = {item.fqn: matching.Tensor(item.dtype, item.size) for item in has.items}
    matched = matching.match(wanted.layout, tensors, frozenset(has.opaque), strict=strict, where=where)
    keys = {item.key for item in has.items}
    cut = sorted({item.fqn for item in matched.layout.items if item.key not in keys})
    if cut:
        raise IncompatibleCheckpoint(
            f"{where} does not fit: this rank has other parts there of "
            + ", ".join(map(repr, cut[: matching.MISMATCHES_SHOWN])),
            fqns=cut,
        )
    return matched


def from_arena(context: Context, request: Request, slot: int, step: int, progress: Progress) -> dict[int, fill.Filled]:
    """
    Hand a snapshot over to every local rank, every item verified.

    Raises:
        catalog.Damaged: an item does not match its digest.
    """

    def hand_over(wanted: Wanted) -> tuple[int, fill.Filled]:
        try:
            slot_image = context.reader.read(context.segments[wanted.rank], slot, step=step)
        except image.TornSlot as err:
            raise catalog.Damaged(str(err)) from err
        if slot_image.layout.digest == wanted.layout.digest:
            return wanted.rank, _as_it_lies(slot_image, wanted, progress)
        return wanted.rank, _copied(context, request, slot_image, wanted, step, progress)

    with futures.ThreadPoolExecutor(max(1, min(len(request.wanted), os.cpu_count() or 1)), "pillion-verify") as pool:
        return dict(pool.map(hand_over, request.wanted))


def needs_spare(context: Context, request: Request, slot: int) -> bool:
    """Whether some local rank's snapshot has another layout than is wanted."""
    return any(
        context.reader.read(context.segments[wanted.rank], slot).layout.digest != wanted.layout.digest
        for wanted in request.wanted
    )


def _as_it_lies(slot_image: image.SlotImage, wanted: Wanted, progress: Progress) -> fill.Filled:
    digests = image.known_digests(slot_image)
    progress({"type": "load_begin", "rank": wanted.rank, "tier": "arena", "slot": slot_image.slot, "dtypes": {}})
    # The copy goes on beside the verification, and counts only when that has passed: reading memory twice in turn would
    # take twice as long. An item that fails refuses the snapshot as a whole, and the next round copies everything again.
    progress({"type": "load_progress", "rank": wanted.rank, "upto": len(slot_image.layout.items)})
    for index, _ in enumerate(slot_image.extents()):
        _verify(slot_image, index, digests, wanted.rank)
    return fill.Filled(opaque=_opaque(slot_image, wanted.layout))


def _copied(
    context: Context, request: Request, slot_image: image.SlotImage, wanted: Wanted, step: int, progress: Progress
) -> fill.Filled:
    has = slot_image.layout
    matched = match(wanted, has, step, strict=request.strict)
    target = matched.layout
    digests = image.known_digests(slot_image)
    memory = fill.begin(context, request, wanted.rank, matched, progress, tier="arena")
    source = slot_image.memory
    where = {item.key: index for index, item in enumerate(has.items)}
    ready = fill.Ready(len(target.items), wanted.rank, target, progress)
    for index, item in enumerate(target.items):
        there = where[item.key]
        _verify(slot_image, there, digests, wanted.rank)
        start, into, length = has.payload_starts[there], target.payload_starts[index], item.payload_bytes
        memory[into : into + length] = source[start : start + length]
        ready.mark(index)
    opaque = frozenset(target.opaque)
    for index, fqn in enumerate(has.opaque):
        if fqn in opaque:
            _verify(slot_image, len(has.items) + index, digests, wanted.rank)
    beside = matching.unexpected(matching.names_of(has), matching.names_of(wanted.layout))
    return fill.Filled(opaque=_opaque(slot_image, target), match=matched, unexpected=beside)


def _verify(slot_image: image.SlotImage, index: int, digests: list[str] | None, rank: int) -> None:
    """
    Raises:
        catalog.Damaged.
    """
    if digests is None:
        # Killed between its seal and its digests: layout and manifest matched, there is nothing to hold the rest against.
        return
    slot_layout = slot_image.layout
    num_items = len(slot_layout.items)
    if index < num_items:
        start, end, name = slot_layout.starts[index], slot_layout.end(index), slot_layout.items[index].fqn
    else:
        start = slot_image.opaque_starts[index - num_items]
        end, name = start + slot_image.opaque_lengths[index - num_items], slot_layout.opaque[index - num_items]
    if digest.digest(slot_image.memory[start:end]) != digests[index]:
        raise catalog.Damaged(f"{name!r} in the arena's slot {slot_image.slot} of rank {rank} changed since its seal")


def _opaque(slot_image: image.SlotImage, target: layout.Layout) -> Mapping[str, Any]:
    """Where the trainer finds its opaque leaves: in the snapshot itself, which the load keeps where it is."""
    places = {
        fqn: (start, length)
        for fqn, start, length in zip(
            slot_image.layout.opaque, slot_image.opaque_starts, slot_image.opaque_lengths, strict=True
        )
    }
    base = slot_image.segment.header.slot_offset(slot_image.slot) + arena.PAGE_BYTES
    return {
        "file": slot_image.segment.path,
        "starts": [base + places[fqn][0] for fqn in target.opaque],
        "lengths": [places[fqn][1] for fqn in target.opaque],
    }
