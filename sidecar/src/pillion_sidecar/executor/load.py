"""
One load: the ranks agree on a step and a tier, each pod verifies and hands over, a corrupt one is skipped for an older.

Called from: `executor.worker`. Reads are verified item by item and announced as they pass, so that the trainer copies one part
while the next is read; a snapshot in the arena is announced whole, and verified while it is copied.

    every pod:    post what its arena holds
    coordinator:  newest step that every arena holds, or newest committed on storage -> publish
    every pod:    verify (arena) or read and verify (storage) into a slot, post the result
    coordinator:  all well -> done; a corrupt one -> refuse it, next round; an error -> done, with the error
"""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Final

from pillion import phases
from pillion.errors import (
    BarrierTimeout,
    CorruptCheckpoint,
    ErrorDocument,
    InternalError,
    NoCheckpoint,
    PillionError,
)
from pillion.wire import arena, layout
from pillion.wire.policy import OnMissing, RestoreMode
from pillion_sidecar import catalog, commit, retention
from pillion_sidecar.arena.slots import NO_SLOT
from pillion_sidecar.executor import exchange, fill, images
from pillion_sidecar.executor.context import Context, Progress
from pillion_sidecar.storage import digest

ROUNDS_LIMIT: Final = 64
"""Corrupt checkpoints refused before giving up: more than any retention keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one local rank wants filled."""

    rank: int
    layout: layout.Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    step: int | None
    wanted: tuple[Wanted, ...]
    arena: Mapping[int, int]
    """step -> slot that every local rank has sealed."""
    spare_slot: int
    """A slot that may be filled from storage; NO_SLOT: one is taken once the pods have agreed on a checkpoint there."""

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Request:
        return cls(
            step=document.get("step"),
            wanted=tuple(
                Wanted(rank=int(rank), layout=layout.decode(str(encoded).encode()))
                for rank, encoded in sorted(document["layouts"].items(), key=lambda entry: int(entry[0]))
            ),
            arena={int(step): int(slot) for step, slot in document["arena"].items()},
            spare_slot=int(document["spare_slot"]),
        )


def load(context: Context, request: Request, progress: Progress) -> dict[str, Any]:
    """
    Run one load.

    Blocks: peer_timeout_s for each agreement (the first one waits for the slowest pod), persist_timeout_s for the reads.

    Returns:
        step (None: a fresh start), tier, path, refused, and for each local rank where its opaque leaves are.

    Raises:
        LoadError: see pillion.errors.
    """
    phase = f"load/{context.loads}"
    phases.working_on(request.step)
    usable, torn = _usable(context, request)
    context.exchange.post(f"{phase}/offer", {"arena": sorted(usable), "torn": torn, "step": request.step})
    refused: dict[str, str] = {}
    for number in range(ROUNDS_LIMIT):
        at = f"{phase}/{number}"
        if context.coordinator:
            choice = _choose(context, request, phase, refused)
            if number == 0 and choice["error"] is None:
                # Every pod is here, so that every pod has left the load before.
                context.exchange.forget(context.finished_loads)
                context.finished_loads = [f"{phase}/offer"]
            context.finished_loads += [f"{at}/choice", f"{at}/result", f"{at}/verdict"]
            # The epoch that holds when this ends well: a pod that missed the end of an earlier load is in step again.
            context.exchange.publish(f"{at}/choice", choice | {"epoch": context.epoch + 1})
        # The coordinator waits for every pod's offer first.
        choice = context.exchange.receive(f"{at}/choice", context.peer_timeout_s * 2)
        refused = dict(choice["refused"])
        if choice["error"] is not None:
            raise ErrorDocument.from_document(choice["error"]).to_exception()
        if choice["step"] is None:
            context.epoch = int(choice["epoch"])
            return {"step": None, "tier": "fresh", "path": "", "refused": refused, "opaque": {}}
        step, tier = int(choice["step"]), str(choice["tier"])
        phases.reach(phases.Phase.LOAD, step=step, path=str(choice["path"]))
        result: dict[str, Any] = {"corrupt": None, "error": None}
        opaque: dict[str, Any] = {}
        try:
            if tier == "storage" and request.spare_slot == NO_SLOT:
                request = dataclasses.replace(request, spare_slot=_take_slot(context, request, choice))
            if tier == "arena" and usable[step] == request.spare_slot:
                raise catalog.Damaged(f"the slot of step {step} was taken for a checkpoint that turned out corrupt")
            if tier == "arena":
                opaque = _from_arena(context, request, usable[step], progress)
            else:
                opaque = _from_storage(context, request, str(choice["path"]), step, progress)
        except catalog.Damaged as err:
            result["corrupt"] = str(err)
        except PillionError as err:
            result["error"] = ErrorDocument.from_exception(err).to_document()
        except Exception as err:  # a boundary: the peers wait for this pod's result
            text = f"{type(err).__name__}: {err}\n{traceback.format_exc()}"
            result["error"] = ErrorDocument("LoadError", text).to_document()
        context.exchange.post(f"{at}/result", result)
        if context.coordinator:
            context.exchange.publish(f"{at}/verdict", _judge(context, at))
        verdict = context.exchange.receive(f"{at}/verdict", context.persist_timeout_s)
        if verdict["error"] is not None:
            raise ErrorDocument.from_document(verdict["error"]).to_exception()
        if verdict["corrupt"] is None:
            context.epoch = int(choice["epoch"])
            return {"step": step, "tier": tier, "path": choice["path"], "refused": refused, "opaque": opaque}
        refused[f"{tier}:{step}"] = str(verdict["corrupt"])
    raise InternalError(f"{ROUNDS_LIMIT} checkpoints in a row were corrupt: {refused}")


def _take_slot(context: Context, request: Request, choice: Mapping[str, Any]) -> int:
    """A slot of this pod to load into, where every one holds a whole snapshot: rather one that not all pods hold, then the oldest."""
    step = min(request.arena, key=lambda each: (each in choice["arena"], each))
    for segment in context.segments.values():
        # Before the first byte: whoever finds the arena after a crash takes it for free.
        segment.write_state(request.arena[step], arena.SlotState.FREE)
    return request.arena[step]


def _from_storage(context: Context, request: Request, path: str, step: int, progress: Progress) -> dict[str, Any]:
    def watched(event: Mapping[str, Any]) -> None:
        context.watch.moved()
        progress(event)

    context.watch.storage(f"read {path}")
    try:
        return fill.from_storage(context, request, path, step, watched)
    finally:
        context.watch.idle()


# --- choosing (coordinator) ------------------------------------------------------------------------------------------


def _choose(context: Context, request: Request, phase: str, refused: Mapping[str, str]) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "step": None,
        "tier": "",
        "path": "",
        "refused": dict(refused),
        "error": None,
        "arena": [],
    }
    try:
        offers = context.exchange.collect(f"{phase}/offer", context.peer_timeout_s)
        for offer in offers.values():
            choice["refused"] |= {f"arena:{step}": str(why) for step, why in offer["torn"].items()}
        arena_steps = set.intersection(*(set(map(int, offer["arena"])) for offer in offers.values()))
        choice["arena"] = sorted(arena_steps)
        committed = _committed(context)
        choice["refused"] |= missing(commit.remembered(context.root), arena_steps, committed)
        found = pick(
            arena_steps=arena_steps,
            committed=committed,
            refused=choice["refused"],
            step=_wanted_step(context, request),
            fresh=context.restore.mode is RestoreMode.NONE and request.step is None,
            on_missing=context.restore.on_missing,
            root=context.root,
        )
    except exchange.StoreLost:
        raise
    except PillionError as err:
        choice["error"] = ErrorDocument.from_exception(err).to_document()
    except OSError as err:
        choice["error"] = ErrorDocument("LoadError", f"cannot list {context.root}: {err}").to_document()
    else:
        if found is not None:
            choice["step"], choice["tier"] = found
            choice["path"] = context.step_path(found[0]) if found[1] == "storage" else ""
    finally:
        context.watch.idle()
    return choice


def _wanted_step(context: Context, request: Request) -> int | None:
    if request.step is not None:
        return request.step
    return context.restore.step if context.restore.mode is RestoreMode.STEP else None


def _committed(context: Context) -> set[int]:
    context.watch.storage(f"list {context.root}")
    retention.put_back(context.root)
    catalog.finish_interrupted(context.root)
    return {step for step, done in catalog.steps(context.root).items() if done}


def missing(remembered: int | None, arena_steps: set[int], committed: set[int]) -> dict[str, str]:
    """
    The newest commit, when it is not on storage any more and nothing as new is in memory: refused, with the reason. Pure.

    So an older checkpoint is never taken in silence, and a start from nothing never follows a loss.
    """
    if remembered is None or remembered in committed or any(step >= remembered for step in arena_steps):
        return {}
    return {f"storage:{remembered}": "was committed as the newest, and is not there any more"}


def pick(
    *,
    arena_steps: set[int],
    committed: set[int],
    refused: Mapping[str, str],
    step: int | None,
    fresh: bool,
    on_missing: OnMissing,
    root: str,
) -> tuple[int, str] | None:
    """
    Step and tier to load, or None for a fresh start. Pure.

    The arena wins a tie: it is faster. What was refused is out; when only refused ones are left it is an error, never a
    fresh start.

    Raises:
        NoCheckpoint, CorruptCheckpoint.
    """
    if fresh:
        return None
    candidates = [(s, 1, "arena") for s in arena_steps if f"arena:{s}" not in refused]
    candidates += [(s, 0, "storage") for s in committed if f"storage:{s}" not in refused]
    if step is not None:
        candidates = [candidate for candidate in candidates if candidate[0] == step]
    if candidates:
        best = max(candidates)
        return best[0], best[2]
    if refused:
        raise CorruptCheckpoint(
            f"every checkpoint of {root} that could be used is corrupt or lost: "
            + "; ".join(f"{where}: {why}" for where, why in refused.items()),
            reasons=refused,
        )
    if step is not None:
        raise NoCheckpoint(f"there is no checkpoint of step {step} in {root}; committed are {sorted(committed)}")
    if on_missing is OnMissing.FAIL:
        raise NoCheckpoint(f"there is no checkpoint in {root}, and restore.onMissing is Fail")
    return None


def _judge(context: Context, at: str) -> dict[str, Any]:
    """(coordinator) One verdict from the results of all pods: an error outweighs a corrupt item."""
    try:
        results = context.exchange.collect(f"{at}/result", context.persist_timeout_s)
    except BarrierTimeout as err:
        text = f"ranks {list(err.missing)} did not finish reading within {err.waited_s:.1f} s"
        return {"corrupt": None, "error": ErrorDocument("LoadError", text).to_document()}
    error = next((r["error"] for r in results.values() if r["error"] is not None), None)
    corrupt = next((r["corrupt"] for r in results.values() if r["corrupt"] is not None), None)
    return {"corrupt": corrupt, "error": error}


# --- the arena -------------------------------------------------------------------------------------------------------


def _usable(context: Context, request: Request) -> tuple[dict[int, int], dict[str, str]]:
    """
    step -> slot, where every local rank's slot holds exactly what that rank wants, from the same world; and step -> why not,
    where a slot was sealed and does not hold what its header says.
    """
    usable = {}
    torn = {}
    for step, slot in request.arena.items():
        try:
            pictures = {w.rank: context.reader.read(context.segments[w.rank], slot, step=step) for w in request.wanted}
        except images.TornSlot as err:
            torn[str(step)] = str(err)
            continue
        if all(
            pictures[w.rank].layout.digest == w.layout.digest
            and pictures[w.rank].header.rank == w.rank
            and pictures[w.rank].header.world_size == context.world_size
            for w in request.wanted
        ):
            usable[step] = slot
    return usable, torn


def _from_arena(context: Context, request: Request, slot: int, progress: Progress) -> dict[str, Any]:
    """
    Verify every item of every local rank's slot against the digests taken after its seal.

    Raises:
        catalog.Damaged: an item does not match.
    """

    def verify(wanted: Wanted) -> tuple[str, dict[str, Any]]:
        segment = context.segments[wanted.rank]
        try:
            picture = context.reader.read(segment, slot)
        except images.TornSlot as err:
            raise catalog.Damaged(str(err)) from err
        known = images.known_digests(picture)
        progress({"type": "load_begin", "rank": wanted.rank, "tier": "arena", "slot": slot, "dtypes": {}})
        memory = picture.memory
        num_items = len(picture.layout.items)
        # The copy goes on beside the verification, and counts only when that has passed: reading memory twice in turn would
        # take twice as long. An item that fails refuses the snapshot as a whole, and the next round copies everything anew.
        progress({"type": "load_progress", "rank": wanted.rank, "upto": num_items})
        # Killed between its seal and its digests: layout and manifest matched, there is nothing to hold the rest against.
        for index, (start, length) in enumerate(picture.extents() if known is not None else ()):
            if known is not None and digest.digest(memory[start : start + length]) != known[index]:
                name = (
                    picture.layout.items[index].fqn if index < num_items else picture.layout.opaque[index - num_items]
                )
                raise catalog.Damaged(
                    f"{name!r} in the arena's slot {slot} of rank {wanted.rank} changed since its seal"
                )
        base = segment.header.slot_offset(slot) + arena.PAGE_BYTES
        return str(wanted.rank), {
            "file": segment.path,
            "starts": [base + start for start in picture.opaque_starts],
            "lengths": list(picture.opaque_lengths),
        }

    with futures.ThreadPoolExecutor(max(1, min(len(request.wanted), os.cpu_count() or 1)), "pillion-verify") as pool:
        return dict(pool.map(verify, request.wanted))
