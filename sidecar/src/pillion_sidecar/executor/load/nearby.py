"""
Loading from this node's disk: finds the local copies that fit the request. A copy is read like a checkpoint on storage (`executor.load.fill`).

Called from: `executor.load.restore`. A copy that is damaged, of another world, or on a disk that does not answer is not offered.
"""

from __future__ import annotations

import logging
from typing import Any

from pillion.errors import IncompatibleCheckpoint
from pillion.wire.load_messages import Tier
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.copies.head import Copy
from pillion_sidecar.executor.load import fill, matching
from pillion_sidecar.executor.load.request import Request
from pillion_sidecar.executor.session import Context, Progress

_log = logging.getLogger(__name__)


def offer(context: Context, request: Request) -> dict[int, dict[str, Any]]:
    """
    Return the copies that every local rank can load from: step -> the newest copy's order, and whether it lacks a part of the state.

    Blocks: local_disk.SILENT_S for a disk that does not answer. Never raises.
    """
    local_disk = context.disk
    # A read without a state dict takes whole tensors, which one pod's disk has only by chance.
    if local_disk is None or local_disk.problem or request.path is not None or request.whole:
        return {}

    def look() -> dict[int, dict[str, Any]]:
        offered: dict[int, dict[str, Any]] = {}
        for copy in local_disk.copies.copies():
            local_disk.moved()
            try:
                partial = any(_lacks(context, request, copy, rank) for rank in context.local_ranks)
            except (catalog.Damaged, IncompatibleCheckpoint) as err:
                _log.warning("the local copy of step %d is not used: %s", copy.step, err)
                continue
            offered[copy.step] = {"order": list(copy.order), "partial": partial, "disk": True}
        return offered

    try:
        return local_disk.run(look)
    except OSError as err:
        _log.error("the local disk is left out of this load: %s", err)
        return {}


def _lacks(context: Context, request: Request, copy: Copy, rank: int) -> bool:
    """
    Whether a rank's copy lacks a part of what the rank wants.

    Raises:
        catalog.Damaged, IncompatibleCheckpoint, OSError.
    """
    assert context.disk is not None
    stored = context.disk.copies.stored(rank, copy)
    wanted = next((each for each in request.wanted if each.rank == rank), None)
    if wanted is None:
        return False
    tensors = matching.tensors_in(stored.chunks)
    where = f"the local copy of step {copy.step} of rank {rank}"
    matched = matching.match(wanted.layout, tensors, stored.opaque.keys(), strict=request.strict, where=where)
    cut = [
        item.fqn
        for item in matched.layout.items
        if all((chunk.offsets, chunk.sizes) != (item.offsets, item.sizes) for chunk in stored.chunks[item.fqn])
    ]
    if cut:
        raise IncompatibleCheckpoint(f"{where} does not fit: this rank has other parts there of {cut[0]!r}", fqns=cut)
    return bool(matched.missing)


def from_disk(context: Context, request: Request, copy: Copy, progress: Progress) -> dict[int, fill.Filled]:
    """
    Fill the spare slot of every local rank from its copy.

    Raises:
        catalog.Damaged: a copy does not match its digests, or is gone.
        others: as `fill.from_storage`.
    """
    assert context.disk is not None
    copies = context.disk.copies
    with copies.using(copy):
        stored = {rank: copies.stored(rank, copy) for rank in context.local_ranks}
        return fill.from_storage(context, request, stored, progress, Tier.LOCAL)
