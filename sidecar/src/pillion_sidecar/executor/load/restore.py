"""
One load: the pods agree on a step and a tier, and each pod verifies the checkpoint and hands it to its trainers. A corrupt checkpoint is refused,
and an older one is loaded.

Called from: `executor.worker`. Items read from storage are verified and announced one by one, so the trainer copies a part while the next one
is read. A snapshot in the arena is announced whole, and verified while the trainer copies it.

    every pod:    posts the snapshots of its arena that fit (`executor.load.snapshot`)
    coordinator:  chooses the newest snapshot that every arena holds, or the newest commit on storage (`executor.load.choose`); publishes it
    every pod:    verifies the snapshot, or reads the commit into a slot and verifies it (`executor.load.fill`); posts the result
    coordinator:  all well -> done; a corrupt checkpoint -> refuses it, next round; an error -> done, with the error

A request of `find` ends with the choice: no byte is read, and it does not count as a load. With `whole` it ends with the list of what the
chosen checkpoint holds; the loads of whole tensors that follow do not count either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pillion import fault_points
from pillion.errors import BarrierTimeout, ErrorDocument, InternalError, LoadError, PillionError, named
from pillion.wire import layout
from pillion.wire.load_messages import Tier
from pillion_sidecar import channel
from pillion_sidecar.arena.slots import NO_SLOT
from pillion_sidecar.checkpoint import catalog, commit, milestones
from pillion_sidecar.copies.head import Copy
from pillion_sidecar.executor.load import choose, fill, matching, nearby, snapshot, whole
from pillion_sidecar.executor.load.request import Request
from pillion_sidecar.executor.session import Context, Progress
from pillion_sidecar.storage import reading
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.generation import Order

_log = logging.getLogger(__name__)

ROUNDS_LIMIT: Final = 64
"""Maximum corrupt checkpoints that one load refuses before it fails: more than any retention keeps."""


def load(context: Context, request: Request, progress: Progress) -> channel.Loaded:
    """
    Run one load. With `find`, only choose the checkpoint that a load would take.

    Blocks: peer_timeout_s for each agreement (the first one waits for the slowest pod), persist_timeout_s for the reads.

    Raises:
        LoadError: see pillion.errors.
    """
    phase = f"load/{context.loads}"
    fault_points.working_on(request.step)
    offer = snapshot.offer(context, request)
    copies = nearby.offer(context, request)
    # The arena is faster, where it has the step; and where both have it, the newer one of two branches counts.
    held = copies | {
        step: entry
        for step, entry in offer.usable.items()
        if step not in copies or tuple(entry["order"]) >= tuple(copies[step]["order"])
    }
    context.exchange.post(f"{phase}/offer", offer.to_document() | {"arena": held, "not_shared": context.not_shared})
    refused = dict(request.refused)
    for number in range(ROUNDS_LIMIT):
        at = f"{phase}/{number}"
        if context.coordinator:
            _publish_choice(context, request, phase, number, refused)
        # The coordinator waits for every pod's offer first.
        choice = context.exchange.receive(f"{at}/choice", context.peer_timeout_s * 2)
        refused = dict(choice["refused"])
        if choice["error"] is not None:
            raise ErrorDocument.from_document(choice["error"]).to_exception()
        chosen = _chosen(choice)
        if chosen.step is None or (request.find and not request.whole):
            context.epoch = int(choice["epoch"])
            return chosen
        step, tier = chosen.step, chosen.tier
        fault_points.reach(fault_points.FaultPoint.LOAD, step=step, path=str(choice["path"]))
        request, found, result = _try_to_read(context, request, choice, held.get(step), progress)
        context.exchange.post(f"{at}/result", result)
        if context.coordinator:
            context.exchange.publish(f"{at}/verdict", _judge(context, at))
        verdict = context.exchange.receive(f"{at}/verdict", context.persist_timeout_s)
        if verdict["error"] is not None:
            raise ErrorDocument.from_document(verdict["error"]).to_exception()
        if verdict["corrupt"] is None:
            context.epoch = int(choice["epoch"])
            counts = request.path is None and not request.whole and not choice.get("elsewhere") and not verdict["own"]
            if context.coordinator and tier is Tier.STORAGE and counts and not verdict["unexpected"]:
                # Every byte of the checkpoint was read and matched its digest: retention keeps it.
                with contextlib.suppress(OSError):
                    milestones.note_verified(context.own_root(), step)
            return dataclasses.replace(
                chosen,
                opaque={rank: each.opaque for rank, each in found.filled.items()},
                unexpected={
                    rank: tuple(verdict["unexpected"] if tier is Tier.STORAGE else each.unexpected)
                    for rank, each in found.filled.items()
                },
                alike=verdict["alike"],
                differing=tuple(result.get("differing", ())),
                content=None if found.content is None else found.content.encoded.decode(),
            )
        refused[f"{tier}:{step}"] = str(verdict["corrupt"])
    raise InternalError(f"{ROUNDS_LIMIT} checkpoints in a row were corrupt: {refused}")


def _chosen(choice: Mapping[str, Any]) -> channel.Loaded:
    """Return what a choice says, as the answer of a load that reads nothing."""
    return channel.Loaded(
        step=choice["step"],
        tier=Tier(choice["tier"]),
        path=str(choice["path"]),
        order=(int(choice["order"][0]), int(choice["order"][1])),
        refused=dict(choice["refused"]),
        passed_over=choice["passed_over"],
        set_aside=tuple(choice["set_aside"]),
        remarks=choice.get("remarks", {}),
        saved_ns=int(choice.get("saved_ns", 0)),
    )


def _publish_choice(context: Context, request: Request, phase: str, number: int, refused: Mapping[str, str]) -> None:
    """(coordinator) Choose the checkpoint that every pod loads in this round, and publish the choice."""
    at = f"{phase}/{number}"
    choice = choose.choose(context, request, phase, refused)
    if number == 0 and choice["error"] is None:
        # Every pod has posted its offer, so every pod has left the load before.
        context.exchange.forget(context.finished_loads)
        context.finished_loads = [f"{phase}/offer"]
    context.finished_loads += [f"{at}/choice", f"{at}/result", f"{at}/verdict"]
    # The epoch after this load, if it ends well. So a pod that missed the end of an earlier load has the right epoch again.
    epoch = context.epoch if request.find or request.whole else context.epoch + 1
    context.exchange.publish(f"{at}/choice", choice | {"epoch": epoch})


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """What this pod has read of the chosen checkpoint."""

    filled: Mapping[int, fill.Filled] = dataclasses.field(default_factory=dict)
    """Local rank -> its slot."""
    content: layout.Layout | None = None
    """What the checkpoint holds, if that was the question."""


def _try_to_read(
    context: Context,
    request: Request,
    choice: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    progress: Progress,
) -> tuple[Request, _Found, dict[str, Any]]:
    """
    Read the chosen checkpoint. Never raises: an error is in the result.

    Args:
        own: what this pod has of the chosen step in its arena or on its disk; None: nothing.

    Returns:
        The request (perhaps with another spare slot), the filled slot of each rank, and the result that this pod posts.
    """
    step, tier = int(choice["step"]), Tier(choice["tier"])
    result: dict[str, Any] = {"corrupt": None, "error": None}
    found = _Found()
    try:
        if tier is Tier.LOCAL and own is not None and not own.get("disk"):
            tier = Tier.ARENA
        if tier is Tier.ARENA and request.arena[step] == request.spare_slot:
            raise catalog.Damaged(f"the slot of step {step} was taken for a checkpoint that turned out corrupt")
        request = _with_spare(context, request, step, tier, choice, own)
        found = _read(context, request, tier, choice, own, result, progress)
    except catalog.Damaged as err:
        result["corrupt"] = str(err)
    except PillionError as err:
        result["error"] = ErrorDocument.from_exception(err).to_document()
    except Exception as err:  # a boundary: the peers wait for this pod's result
        text = f"{type(err).__name__}: {err}\n{traceback.format_exc()}"
        result["error"] = ErrorDocument("LoadError", text).to_document()
    return request, found, result


def _with_spare(
    context: Context, request: Request, step: int, tier: Tier, choice: Mapping[str, Any], own: Mapping[str, Any] | None
) -> Request:
    """Return the request with a spare slot. If the load needs one and the request has none, take the slot of a snapshot."""
    if request.spare_slot != NO_SLOT or request.find:
        return request
    in_arena = own is not None and not own.get("disk")
    source = request.arena[step] if in_arena else NO_SLOT
    if tier is Tier.ARENA and not snapshot.needs_spare(context, request, source):
        return request
    # Every slot holds a whole snapshot. First choice: a snapshot that some pod does not hold; then the oldest.
    others = [each for each, slot in request.arena.items() if slot != source]
    taken = min(others, key=lambda each: (each in choice["arena"], request.orders.get(each, (0, 0)), each))
    for segment in context.segments.values():
        # Before the first byte is written, the slot is marked free: that is what a sidecar must find after a crash.
        segment.reset(request.arena[taken])
    return dataclasses.replace(request, spare_slot=request.arena[taken])


def _read(
    context: Context,
    request: Request,
    tier: Tier,
    choice: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    result: dict[str, Any],
    progress: Progress,
) -> _Found:
    """Fill the slot of every local rank, or list what the checkpoint holds. Add to `result` the facts that the coordinator needs."""
    step, path = int(choice["step"]), str(choice["path"])
    order = (int(choice["order"][0]), int(choice["order"][1]))
    if tier is Tier.ARENA:
        slot = request.arena[step]
        if request.find:
            return _Found(content=snapshot.together(context, slot, step).content(request.prefixes))
        filled = snapshot.from_arena(context, request, slot, step, progress)
    elif tier is Tier.LOCAL:
        filled = nearby.from_disk(context, request, Copy(order, step), progress)
    else:

        def watched(event: channel.LoadBegun | channel.LoadMoved) -> None:
            context.watch.moved()
            progress(event)

        folder = context.open_folder(path)
        context.watch.storage(f"read {folder}")
        try:
            if not context.coordinator:
                await_checkpoint(folder, context.local_ranks)
            # Nothing is repaired in another run's root, which may be training.
            stored = catalog.read(folder, step, repair=not request.below and not choice.get("elsewhere"))
            result["differing"] = list(stored.differing)
            if request.find:
                return _Found(content=whole.stored_content(stored, request.prefixes))
            from_own = _from_own(context, request, stored, Copy(order, step), own, watched)
            result["own"] = from_own is not None
            filled = from_own or fill.from_storage(context, request, stored, watched)
        finally:
            context.watch.idle()
        if not request.whole:
            wanted_names = set[str]().union(*(matching.names_of(wanted.layout) for wanted in request.wanted))
            result["unexpected"] = matching.unexpected([*stored.chunks, *stored.opaque], wanted_names)
    result["prints"] = sorted({_print(each) for each in filled.values()})
    return _Found(filled)


def _from_own(
    context: Context,
    request: Request,
    stored: catalog.Stored,
    copy: Copy,
    own: Mapping[str, Any] | None,
    progress: Progress,
) -> dict[int, fill.Filled] | None:
    """
    Fill the slots with a committed checkpoint from this pod's arena or disk. None: it does not have it, or not as storage has it.

    A pod that was lost needs storage. The others need not read again what they have.
    """
    # Of values that differ from rank to rank, storage gives all ranks one.
    if own is None or not _is_same(own, copy.order) or stored.differing or request.path is not None or request.whole:
        return None
    try:
        if own.get("disk"):
            return nearby.from_disk(context, request, copy, progress)
        return snapshot.from_arena(context, request, request.arena[copy.step], copy.step, progress)
    except (catalog.Damaged, OSError) as err:
        _log.error("this pod's own copy of step %d is not used, and storage is read: %s", copy.step, err)
        return None


def _is_same(own: Mapping[str, Any], order: Order) -> bool:
    """Whether what this pod has of a step is the whole state that was committed with this order."""
    return not own["partial"] and tuple(own["order"]) == order


def await_checkpoint(folder: Folder, ranks: Sequence[int]) -> None:
    """
    Wait until this pod sees the checkpoint that the coordinator has chosen. The pod's storage may show it late, or be another storage.

    Blocks: reading.RETRY_AFTER_S, for storage that shows it late.

    Raises:
        LoadError: this pod does not see the checkpoint.
    """
    for pause_s in (*reading.RETRY_AFTER_S, None):
        if reading.retried(folder, lambda: commit.is_committed(folder)):
            return
        if pause_s is not None:
            time.sleep(pause_s)
    raise LoadError(
        f"rank 0's pod reads {folder}, and in the pod of ranks {list(ranks)} it is not there: all pods of a job need one storage"
    )


def _print(filled: fill.Filled) -> str:
    """Return a fingerprint of the rank's report of its load: equal for ranks whose reports are equal."""
    match = filled.match
    return matching.fingerprint(
        list(match.missing) if match else [], dict(match.dtypes) if match else {}, list(filled.unexpected)
    )


def _judge(context: Context, at: str) -> dict[str, Any]:
    """(coordinator) Return one verdict from the results of all pods. An error outweighs a corrupt checkpoint."""
    try:
        results = context.exchange.collect(f"{at}/result", context.persist_timeout_s)
    except BarrierTimeout as err:
        text = f"ranks {named(err.missing)} did not finish reading within {err.waited_s:.1f} s"
        return {"corrupt": None, "error": ErrorDocument("LoadError", text).to_document()}
    error = next((r["error"] for r in results.values() if r["error"] is not None), None)
    corrupt = next((r["corrupt"] for r in results.values() if r["corrupt"] is not None), None)
    return {
        "corrupt": corrupt,
        "error": error,
        "unexpected": matching.common([r.get("unexpected", ()) for r in results.values()]),
        "own": any(r.get("own") for r in results.values()),
        "alike": len({each for r in results.values() for each in r.get("prints", ())}) <= 1,
    }
