"""
Loading from the arena: finds the snapshots that fit the request, and hands one to the trainers. Called from: `executor.load.restore`.

If a snapshot has exactly the wanted layout, the trainer reads it in its own slot. If it has the state in another layout (more leaves, another
order, other dtypes), it is copied into the spare slot in the wanted layout. Both are verified against the digests that were taken after the seal.
"""

from __future__ import annotations

import os
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import arena, layout
from pillion.wire.load_messages import LoadBegin, LoadProgress, OpaqueLeaves, Tier
from pillion_sidecar import channel
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.executor.load import fill, matching, whole
from pillion_sidecar.executor.load.request import Request, Wanted
from pillion_sidecar.executor.session import Context, Progress
from pillion_sidecar.storage import digest


@dataclass(frozen=True, slots=True)
class Offer:
    """The snapshots in this pod's arena, sorted by their use for a load."""

    usable: dict[int, dict[str, Any]] = field(default_factory=dict)
    """step -> the snapshot's order, and whether it lacks a part of the state (`partial`). For a request of whole tensors also a fingerprint
    (`content`)."""
    torn: dict[int, str] = field(default_factory=dict)
    """step -> the damage of a sealed slot."""
    misfits: dict[int, dict[str, Any]] = field(default_factory=dict)
    """step -> the reason why a whole snapshot is not usable, and its order."""

    def to_document(self) -> dict[str, Any]:
        return {"arena": self.usable, "torn": self.torn, "misfits": self.misfits}


def offer(context: Context, request: Request) -> Offer:
    """Compare every snapshot that all local ranks have sealed with the request."""
    offered = Offer()
    for stranger in request.strangers:
        offered.misfits[stranger.step] = {
            "why": f"the snapshot of step {stranger.step} in memory is of {stranger.world_size} ranks, and there are {context.world_size} now:"
            " only through storage could these share it out",
            "order": list(stranger.order),
        }
    for step, slot in request.arena.items():
        order = list(request.orders.get(step, (0, 0)))
        try:
            if request.whole:
                offered.usable[step] = {
                    "order": order,
                    "partial": False,
                    "content": _content(context, request, slot, step),
                }
                continue
            partial = [_missing(context, request, slot, step, rank) for rank in context.local_ranks]
        except image.TornSlot as err:
            offered.torn[step] = str(err)
        except IncompatibleCheckpoint as err:
            offered.misfits[step] = {"why": str(err), "order": order}
        else:
            offered.usable[step] = {"order": order, "partial": any(partial)}
    return offered


def together(context: Context, slot: int, step: int) -> whole.Together:
    """
    Return the snapshots of all local ranks in this slot.

    Raises:
        image.TornSlot, IncompatibleCheckpoint.
    """
    images = [context.reader.read(context.segments[rank], slot, step=step) for rank in context.local_ranks]
    for rank, slot_image in zip(context.local_ranks, images, strict=True):
        _check_rank(context, slot_image, rank)
    return whole.Together(images, step)


def _content(context: Context, request: Request, slot: int, step: int) -> str:
    """
    Return a fingerprint of what the local ranks hold for a request of whole tensors. Pods with equal ones hold the same names.

    Raises:
        image.TornSlot; IncompatibleCheckpoint: the pod does not hold all of it.
    """
    held = together(context, slot, step)
    if not request.find:
        for wanted in request.wanted[:1]:  # every rank asks for the same
            held.match(wanted.layout)
        return ""
    content = held.content(request.prefixes)
    items = sorted((item.fqn, item.dtype, item.size) for item in content.items)
    return matching.fingerprint(items, sorted(content.opaque))


def _missing(context: Context, request: Request, slot: int, step: int, rank: int) -> tuple[str, ...]:
    """
    Return the wanted names that a rank's snapshot lacks.

    Raises:
        image.TornSlot, IncompatibleCheckpoint.
    """
    slot_image = context.reader.read(context.segments[rank], slot, step=step)
    _check_rank(context, slot_image, rank)
    wanted = next((each for each in request.wanted if each.rank == rank), None)
    if wanted is None or wanted.layout.digest == slot_image.layout.digest:
        return ()
    return match(wanted, slot_image.layout, step, strict=request.strict).missing


def _check_rank(context: Context, slot_image: image.SlotImage, rank: int) -> None:
    header = slot_image.header
    if header.rank != rank or header.world_size != context.world_size:
        raise IncompatibleCheckpoint(
            f"it is of rank {header.rank} of {header.world_size}, this is rank {rank} of {context.world_size}"
        )


def match(wanted: Wanted, has: layout.Layout, step: int, *, strict: bool) -> matching.Match:
    """
    Compare a rank's state dict with the rank's own snapshot. Pure.

    Raises:
        IncompatibleCheckpoint: as `matching.match`; or the tensors are sharded otherwise now, which only a load from storage can handle.
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
    Hand a snapshot to every local rank, and verify every item.

    Raises:
        catalog.Damaged: an item does not match its digest.
    """

    if request.whole:
        return _from_all(context, request, slot, step, progress)

    def hand_over(wanted: Wanted) -> tuple[int, fill.Filled]:
        try:
            slot_image = context.reader.read(context.segments[wanted.rank], slot, step=step)
        except image.TornSlot as err:
            raise catalog.Damaged(str(err)) from err
        if slot_image.layout.digest == wanted.layout.digest:
            return wanted.rank, _as_it_lies(slot_image, wanted, progress, first=context.checked.count(slot_image))
        return wanted.rank, _copied(context, request, slot_image, wanted, step, progress)

    with futures.ThreadPoolExecutor(max(1, min(len(request.wanted), os.cpu_count() or 1)), "pillion-verify") as pool:
        return dict(pool.map(hand_over, request.wanted))


def needs_spare(context: Context, request: Request, slot: int) -> bool:
    """Return whether the snapshot of some local rank has another layout than the wanted one."""
    return request.whole or any(
        context.reader.read(context.segments[wanted.rank], slot).layout.digest != wanted.layout.digest
        for wanted in request.wanted
    )


def _as_it_lies(slot_image: image.SlotImage, wanted: Wanted, progress: Progress, *, first: int) -> fill.Filled:
    """Hand over a snapshot in its own slot. `first`: index of the first archive that is not verified yet."""
    digests = image.known_digests(slot_image)
    progress(channel.LoadBegun(rank=wanted.rank, begin=LoadBegin(tier=Tier.ARENA, slot=slot_image.slot)))
    # The trainer copies while this verifies: one after the other would take twice as long. The copy counts only if every item passes. If an item
    # fails, the snapshot is refused, and the next round copies everything again.
    progress(channel.LoadMoved(rank=wanted.rank, progress=LoadProgress(upto=len(slot_image.layout.items))))
    for index in range(first, slot_image.num_leaves):
        _verify(slot_image, index, digests, wanted.rank)
    return fill.Filled(opaque=_opaque(slot_image, wanted.layout))


def _copied(
    context: Context, request: Request, slot_image: image.SlotImage, wanted: Wanted, step: int, progress: Progress
) -> fill.Filled:
    has = slot_image.layout
    matched = match(wanted, has, step, strict=request.strict)
    target = matched.layout
    digests = image.known_digests(slot_image)
    memory = fill.begin(context, request, wanted.rank, matched, progress, tier=Tier.ARENA)
    source = slot_image.memory
    source_indexes = {item.key: index for index, item in enumerate(has.items)}
    ready = fill.Ready(len(target.items), wanted.rank, target, progress)
    for index, item in enumerate(target.items):
        source_index = source_indexes[item.key]
        _verify(slot_image, source_index, digests, wanted.rank)
        start, target_start, length = has.payload_starts[source_index], target.payload_starts[index], item.payload_bytes
        memory[target_start : target_start + length] = source[start : start + length]
        ready.mark(index)
    opaque = frozenset(target.opaque)
    for index, fqn in enumerate(has.opaque):
        if fqn in opaque:
            _verify(slot_image, len(has.items) + index, digests, wanted.rank)
    not_wanted = matching.unexpected(matching.names_of(has), matching.names_of(wanted.layout))
    return fill.Filled(opaque=_opaque(slot_image, target), match=matched, unexpected=not_wanted)


def _from_all(context: Context, request: Request, slot: int, step: int, progress: Progress) -> dict[int, fill.Filled]:
    """Put whole tensors together from the snapshots of all local ranks, into the spare slot of each."""
    try:
        held = together(context, slot, step)
    except image.TornSlot as err:
        raise catalog.Damaged(str(err)) from err
    verified: set[tuple[int, int]] = set()

    def verify(part: whole.Part, index: int) -> None:
        rank = part.image.header.rank
        if (rank, index) not in verified:
            _verify(part.image, index, image.known_digests(part.image), rank)
            verified.add((rank, index))

    def put_together(wanted: Wanted) -> tuple[int, fill.Filled]:
        matched = held.match(wanted.layout)
        target = matched.layout
        leaves = [held.leaf(fqn) for fqn in target.opaque]
        for leaf in leaves:
            verify(leaf, len(leaf.image.layout.items) + leaf.index)
        lengths = [leaf.image.opaque_lengths[leaf.index] for leaf in leaves]
        memory = fill.begin(
            context, request, wanted.rank, matched, progress, tier=Tier.ARENA, opaque_bytes=sum(lengths)
        )
        ready = fill.Ready(len(target.items), wanted.rank, target, progress)
        for index, item in enumerate(target.items):
            parts = list(held.chunks(item.fqn))
            for part in parts:
                verify(part, part.index)
            whole.copy(parts, target, index, memory)
            ready.mark(index)
        place = target.tensors_bytes
        starts = []
        for leaf, length in zip(leaves, lengths, strict=True):
            start = leaf.image.opaque_starts[leaf.index]
            memory[place : place + length] = leaf.image.memory[start : start + length]
            starts.append(place)
            place += length
        segment = context.segments[wanted.rank]
        base = segment.header.slot_offset(request.spare_slot) + arena.PAGE_BYTES
        opaque = OpaqueLeaves(file=segment.path, starts=tuple(base + start for start in starts), lengths=tuple(lengths))
        return wanted.rank, fill.Filled(opaque=opaque, match=matched)

    return dict(map(put_together, request.wanted))


def _verify(slot_image: image.SlotImage, index: int, digests: list[str] | None, rank: int) -> None:
    """
    Compare an item of a snapshot with its digest.

    Raises:
        catalog.Damaged: the item does not match.
    """
    if digests is None:
        # The sidecar was killed between the seal and the digests. Layout and trailer matched; nothing else can be compared.
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


def _opaque(slot_image: image.SlotImage, target: layout.Layout) -> OpaqueLeaves:
    """Return the place of the trainer's opaque leaves: the snapshot itself, whose slot the load does not change."""
    places = {
        fqn: (start, length)
        for fqn, start, length in zip(
            slot_image.layout.opaque, slot_image.opaque_starts, slot_image.opaque_lengths, strict=True
        )
    }
    base = slot_image.segment.header.slot_offset(slot_image.slot) + arena.PAGE_BYTES
    return OpaqueLeaves(
        file=slot_image.segment.path,
        starts=tuple(base + places[fqn][0] for fqn in target.opaque),
        lengths=tuple(places[fqn][1] for fqn in target.opaque),
    )
