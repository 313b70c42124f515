"""
One load: the ranks agree on a step and a tier, each pod verifies and hands over, a corrupt one is skipped for an older.

Called from: `executor.worker`. Reads are verified item by item and announced as they pass, so that the trainer copies one part
while the next is read; a snapshot in the arena is announced whole, and verified while it is copied.

    every pod:    post what its arena holds of what is wanted (`executor.load.snapshot`)
    coordinator:  the newest that every arena holds, or the newest committed on storage (`executor.load.choose`) -> publish
    every pod:    verify (arena) or read and verify (storage) into a slot (`executor.load.fill`), post the result
    coordinator:  all well -> done; a corrupt one -> refuse it, next round; an error -> done, with the error

Who only looks for a checkpoint (`find`) is answered with the choice: nothing is read, and it does not count as a load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pillion import fault_points
from pillion.errors import BarrierTimeout, ErrorDocument, InternalError, LoadError, PillionError
from pillion.wire import names
from pillion_sidecar.arena.slots import NO_SLOT
from pillion_sidecar.checkpoint import catalog, milestones
from pillion_sidecar.executor.load import choose, fill, matching, snapshot
from pillion_sidecar.executor.load.choose import ARENA, STORAGE
from pillion_sidecar.executor.load.request import Request
from pillion_sidecar.executor.session import Context, Progress
from pillion_sidecar.storage import reading

ROUNDS_LIMIT: Final = 64
"""Corrupt checkpoints refused before giving up: more than any retention keeps."""


def load(context: Context, request: Request, progress: Progress) -> dict[str, Any]:
    """
    Run one load, or look for what one would take.

    Blocks: peer_timeout_s for each agreement (the first one waits for the slowest pod), persist_timeout_s for the reads.

    Returns:
        step (None: a fresh start), tier, path, refused, passed_over, set_aside, alike; and for each local rank where its opaque leaves
        are, and what nothing asked for.

    Raises:
        LoadError: see pillion.errors.
    """
    phase = f"load/{context.loads}"
    fault_points.working_on(request.step)
    offer = snapshot.offer(context, request)
    context.exchange.post(f"{phase}/offer", offer.to_document() | {"not_shared": context.not_shared})
    refused: dict[str, str] = {}
    for number in range(ROUNDS_LIMIT):
        at = f"{phase}/{number}"
        if context.coordinator:
            _publish_choice(context, request, phase, number, refused)
        # The coordinator waits for every pod's offer first.
        choice = context.exchange.receive(f"{at}/choice", context.peer_timeout_s * 2)
        refused = dict(choice["refused"])
        if choice["error"] is not None:
            raise ErrorDocument.from_document(choice["error"]).to_exception()
        chosen = {
            name: choice[name] for name in ("step", "tier", "path", "refused", "passed_over", "set_aside", "order")
        }
        if choice["step"] is None or request.find:
            context.epoch = int(choice["epoch"])
            fresh = {"tier": "fresh"} if choice["step"] is None else {}
            return chosen | fresh | {"opaque": {}, "unexpected": {}, "alike": True, "differing": []}
        step, tier = int(choice["step"]), str(choice["tier"])
        fault_points.reach(fault_points.FaultPoint.LOAD, step=step, path=str(choice["path"]))
        request, filled, result = _try_to_read(context, request, choice, progress)
        context.exchange.post(f"{at}/result", result)
        if context.coordinator:
            context.exchange.publish(f"{at}/verdict", _judge(context, at))
        verdict = context.exchange.receive(f"{at}/verdict", context.persist_timeout_s)
        if verdict["error"] is not None:
            raise ErrorDocument.from_document(verdict["error"]).to_exception()
        if verdict["corrupt"] is None:
            context.epoch = int(choice["epoch"])
            if context.coordinator and tier == STORAGE and request.path is None and not verdict["unexpected"]:
                # Every byte of it was read and matched its digest: retention keeps it.
                with contextlib.suppress(OSError):
                    milestones.note_verified(context.root, step)
            return chosen | {
                "opaque": {str(rank): each.opaque for rank, each in filled.items()},
                "unexpected": {
                    str(rank): verdict["unexpected"] if tier == STORAGE else list(each.unexpected)
                    for rank, each in filled.items()
                },
                "alike": verdict["alike"],
                "differing": result.get("differing", []),
            }
        refused[f"{tier}:{step}"] = str(verdict["corrupt"])
    raise InternalError(f"{ROUNDS_LIMIT} checkpoints in a row were corrupt: {refused}")


def _publish_choice(context: Context, request: Request, phase: str, number: int, refused: Mapping[str, str]) -> None:
    """(coordinator) Choose what every pod loads in this round, and publish it."""
    at = f"{phase}/{number}"
    choice = choose.choose(context, request, phase, refused)
    if number == 0 and choice["error"] is None:
        # Every pod is here, so that every pod has left the load before.
        context.exchange.forget(context.finished_loads)
        context.finished_loads = [f"{phase}/offer"]
    context.finished_loads += [f"{at}/choice", f"{at}/result", f"{at}/verdict"]
    # The epoch that holds when this ends well: a pod that missed the end of an earlier load is in step again.
    epoch = context.epoch if request.find else context.epoch + 1
    context.exchange.publish(f"{at}/choice", choice | {"epoch": epoch})


def _try_to_read(
    context: Context, request: Request, choice: Mapping[str, Any], progress: Progress
) -> tuple[Request, dict[int, fill.Filled], dict[str, Any]]:
    """Read what was chosen; the request (which may have got another slot), what was filled, and what this pod reports. Never raises."""
    step, tier = int(choice["step"]), str(choice["tier"])
    result: dict[str, Any] = {"corrupt": None, "error": None}
    filled: dict[int, fill.Filled] = {}
    try:
        if tier == ARENA and request.arena[step] == request.spare_slot:
            raise catalog.Damaged(f"the slot of step {step} was taken for a checkpoint that turned out corrupt")
        request = _with_spare(context, request, step, choice)
        filled = _read(context, request, choice, result, progress)
    except catalog.Damaged as err:
        result["corrupt"] = str(err)
    except PillionError as err:
        result["error"] = ErrorDocument.from_exception(err).to_document()
    except Exception as err:  # a boundary: the peers wait for this pod's result
        text = f"{type(err).__name__}: {err}\n{traceback.format_exc()}"
        result["error"] = ErrorDocument("LoadError", text).to_document()
    return request, filled, result


def _with_spare(context: Context, request: Request, step: int, choice: Mapping[str, Any]) -> Request:
    """The request with a slot of this pod to load into, where it needs one and was lent none."""
    if request.spare_slot != NO_SLOT:
        return request
    source = request.arena[step] if choice["tier"] == ARENA else NO_SLOT
    if source != NO_SLOT and not snapshot.needs_spare(context, request, source):
        return request
    # Every slot holds a whole snapshot: rather one that not all pods hold, then the oldest.
    others = [each for each, slot in request.arena.items() if slot != source]
    taken = min(others, key=lambda each: (each in choice["arena"], request.orders.get(each, (0, 0)), each))
    for segment in context.segments.values():
        # Before the first byte: whoever finds the arena after a crash takes it for free.
        segment.reset(request.arena[taken])
    return dataclasses.replace(request, spare_slot=request.arena[taken])


def _read(
    context: Context, request: Request, choice: Mapping[str, Any], result: dict[str, Any], progress: Progress
) -> dict[int, fill.Filled]:
    """Fill what every local rank wants; what the coordinator has to know of it goes into `result`."""
    step, path = int(choice["step"]), str(choice["path"])
    if choice["tier"] == ARENA:
        filled = snapshot.from_arena(context, request, request.arena[step], step, progress)
    else:

        def watched(event: Mapping[str, Any]) -> None:
            context.watch.moved()
            progress(event)

        context.watch.storage(f"read {path}")
        try:
            if not context.coordinator:
                look(path, context.local_ranks)
            stored = catalog.read(path, step)
            filled = fill.from_storage(context, request, stored, watched)
        finally:
            context.watch.idle()
        asked = set[str]().union(*(matching.names_of(wanted.layout) for wanted in request.wanted))
        result["differing"] = list(stored.differing)
        result["unexpected"] = matching.unexpected([*stored.chunks, *stored.opaque], asked)
    result["prints"] = sorted({_print(each) for each in filled.values()})
    return filled


def look(path: str, ranks: Sequence[int]) -> None:
    """
    Find the checkpoint that the coordinator has found. Another pod's storage may show it late, or be another storage.

    Blocks: reading.RETRY_AFTER_S for one that shows it late.

    Raises:
        LoadError: it is not there for this pod.
    """
    marker = os.path.join(path, names.COMMIT_MARKER)
    for pause_s in (*reading.RETRY_AFTER_S, None):
        with contextlib.suppress(FileNotFoundError):
            reading.retried(marker, lambda: os.stat(marker))
            return
        if pause_s is not None:
            time.sleep(pause_s)
    raise LoadError(
        f"rank 0's pod reads {path}, and in the pod of ranks {list(ranks)} it is not there: all pods of a job need one storage"
    )


def _print(filled: fill.Filled) -> str:
    """Equal for ranks that have the same to say of their load."""
    match = filled.match
    return matching.fingerprint(
        list(match.missing) if match else [], dict(match.dtypes) if match else {}, list(filled.unexpected)
    )


def _judge(context: Context, at: str) -> dict[str, Any]:
    """(coordinator) One verdict from the results of all pods: an error outweighs a corrupt item."""
    try:
        results = context.exchange.collect(f"{at}/result", context.persist_timeout_s)
    except BarrierTimeout as err:
        text = f"ranks {list(err.missing)} did not finish reading within {err.waited_s:.1f} s"
        return {"corrupt": None, "error": ErrorDocument("LoadError", text).to_document()}
    error = next((r["error"] for r in results.values() if r["error"] is not None), None)
    corrupt = next((r["corrupt"] for r in results.values() if r["corrupt"] is not None), None)
    return {
        "corrupt": corrupt,
        "error": error,
        "unexpected": matching.common([r.get("unexpected", ()) for r in results.values()]),
        "alike": len({each for r in results.values() for each in r.get("prints", ())}) <= 1,
    }
