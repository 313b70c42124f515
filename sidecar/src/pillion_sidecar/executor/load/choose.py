"""
Which checkpoint a load takes. Called from: `executor.load.restore`, in the pod of rank 0.

The newest is the one that was committed (or sealed) last: by the generation of its session, then the loads of that session, then its step.
So a rollback lasts: what was ahead of it belongs to a branch that was left, until somebody loads it by its number.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pillion.errors import (
    CorruptCheckpoint,
    ErrorDocument,
    IncompatibleCheckpoint,
    LoadError,
    NoCheckpoint,
    PillionError,
)
from pillion.wire import names
from pillion.wire.policy import OnMissing, RestoreMode
from pillion_sidecar.checkpoint import catalog, commit, milestones, retention
from pillion_sidecar.checkpoint.commit import Order
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.load.request import Request
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import reading

ARENA: Final = "arena"
STORAGE: Final = "storage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What all pods hold in memory."""

    whole: Mapping[int, Order]
    """Steps that hold all that is wanted -> when they were sealed."""
    partial: Collection[int] = ()
    """Of these, the ones without some of it, where the load is not strict."""
    misfits: Mapping[int, tuple[str, Order]]
    """Steps that some pod cannot use -> why not, and when they were sealed."""


def gathered(offers: Mapping[int, Mapping[str, Any]]) -> Memory:
    """One picture of the memory of all pods, from what each offers. Pure."""
    every = [{int(step): entry for step, entry in offer[ARENA].items()} for offer in offers.values()]
    shared = set.intersection(*(set(held) for held in every)) if every else set()
    # Two pods may hold one step of two branches: never mixed.
    alike = {step for step in shared if len({tuple(held[step]["order"]) for held in every}) == 1}
    misfits: dict[int, tuple[str, Order]] = {}
    for offer in offers.values():
        for step, entry in offer["misfits"].items():
            misfits.setdefault(int(step), (str(entry["why"]), _order(entry["order"])))
    return Memory(
        whole={step: _order(every[0][step]["order"]) for step in alike},
        partial={step for step in alike if any(held[step]["partial"] for held in every)},
        misfits=misfits,
    )


def _order(entry: Any) -> Order:
    return int(entry[0]), int(entry[1])


def choose(context: Context, request: Request, phase: str, refused: Mapping[str, str]) -> dict[str, Any]:
    """
    (coordinator) What every pod loads next, as a document.

    Blocks: peer_timeout_s for the slowest pod's offer; for the listing of the root.

    Raises:
        exchange.StoreLost. Any other error is in the document.
    """
    choice: dict[str, Any] = {
        "step": None,
        "tier": "",
        "path": "",
        "refused": dict(refused),
        "error": None,
        "arena": [],
        "passed_over": {},
        "set_aside": [],
        "order": [0, 0],
    }
    try:
        offers = context.exchange.collect(f"{phase}/offer", context.peer_timeout_s)
        not_shared = next((str(offer["not_shared"]) for offer in offers.values() if offer.get("not_shared")), "")
        if not_shared:
            raise LoadError(not_shared)
        for offer in offers.values():
            choice["refused"] |= {f"arena:{step}": str(why) for step, why in offer["torn"].items()}
        if request.path is not None:
            return choice | _of_directory(context, request.path, refused)
        memory = gathered(offers)
        choice["arena"] = sorted(memory.whole)
        committed = _committed(context)
        choice["refused"] |= missing(milestones.remembered(context.root), memory.whole, committed)
        picked = pick(
            memory=memory,
            committed=committed,
            refused=choice["refused"],
            step=_wanted_step(context, request),
            fresh=context.restore.mode is RestoreMode.NONE and request.step is None,
            on_missing=context.restore.on_missing,
            root=context.root,
        )
    except protocol.StoreLost:
        raise
    except NoCheckpoint as err:
        # A step that a call of find() names may be missing: the answer is None. What the policy demands may not: who finds nothing begins
        # from nothing, and never comes to the load that would refuse it.
        asks = request.find and request.step is not None
        choice["error"] = None if asks else ErrorDocument.from_exception(err).to_document()
    except PillionError as err:
        choice["error"] = ErrorDocument.from_exception(err).to_document()
    except OSError as err:
        choice["error"] = ErrorDocument("LoadError", f"cannot list {context.root}: {err}").to_document()
    else:
        if picked is not None:
            choice |= _described(context, *picked, memory, committed, choice["refused"])
    finally:
        context.watch.idle()
    return choice


def _described(
    context: Context,
    step: int,
    tier: str,
    memory: Memory,
    committed: Mapping[int, commit.Order],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """What the document says of the step that was picked."""
    order = committed[step] if tier == STORAGE else memory.whole[step]
    return {
        "step": step,
        "tier": tier,
        "path": context.step_path(step) if tier == STORAGE else "",
        "order": list(order),
        "passed_over": passed_over(memory, (order, step)),
        "set_aside": set_aside(committed, refused, step),
    }


DIRECTORY_STEP: Final = 0
"""What a checkpoint is called that is loaded by its directory: its own step is a matter of whoever saved it."""


def _of_directory(context: Context, path: str, refused: Mapping[str, str]) -> dict[str, Any]:
    """
    The checkpoint in a directory, whatever else there is.

    Raises:
        NoCheckpoint: nothing is committed there.
        CorruptCheckpoint: it was refused.
    """
    where = f"{STORAGE}:{DIRECTORY_STEP}"
    if where in refused:
        raise CorruptCheckpoint(
            f"the checkpoint in {path} is corrupt: {refused[where]}", reasons={path: refused[where]}
        )
    context.watch.storage(f"look at {path}")
    marker = os.path.join(path, names.COMMIT_MARKER)

    def there() -> bool:
        try:
            os.stat(marker)
        except (FileNotFoundError, NotADirectoryError):
            # One that was interrupted between its last part and its commit is finished first, as a listing of the root does.
            return os.path.isdir(path) and commit.finish(path) is not None
        return True

    if not reading.retried(path, there):
        raise NoCheckpoint(f"there is no checkpoint in {path}: it has no {names.COMMIT_MARKER}")
    return {"step": DIRECTORY_STEP, "tier": STORAGE, "path": path}


def _wanted_step(context: Context, request: Request) -> int | None:
    if request.step is not None:
        return request.step
    return context.restore.step if context.restore.mode is RestoreMode.STEP else None


def _committed(context: Context) -> dict[int, Order]:
    context.watch.storage(f"list {context.root}")
    return reading.retried(context.root, lambda: _list(context.root))


def _list(root: str) -> dict[int, Order]:
    retention.put_back(root)
    catalog.finish_interrupted(root)
    return catalog.committed(root)


def missing(
    remembered: tuple[int, Order] | None, arena: Mapping[int, Order], committed: Mapping[int, Order]
) -> dict[str, str]:
    """
    The newest commit, when it is not on storage any more and nothing as new is in memory: refused, with the reason. Pure.

    So an older checkpoint is never taken in silence, and a start from nothing never follows a loss.
    """
    if remembered is None:
        return {}
    lost, at = remembered
    if lost in committed or any((order, step) >= (at, lost) for step, order in arena.items()):
        return {}
    return {f"storage:{lost}": "was committed as the newest, and is not there any more"}


def passed_over(memory: Memory, chosen: tuple[Order, int]) -> dict[str, str]:
    """Snapshots that are newer than what is loaded, and why they are not used. Pure."""
    newer = {step: why for step, (why, order) in memory.misfits.items() if (order, step) > chosen}
    return {f"arena:{step}": why for step, why in sorted(newer.items())}


def set_aside(committed: Mapping[int, Order], refused: Mapping[str, str], step: int) -> list[int]:
    """Committed steps ahead of the one that is loaded: of a branch that is left with it. Pure."""
    return sorted(each for each in committed if each > step and f"storage:{each}" not in refused)


def pick(
    *,
    memory: Memory,
    committed: Mapping[int, Order],
    refused: Mapping[str, str],
    step: int | None,
    fresh: bool,
    on_missing: OnMissing,
    root: str,
) -> tuple[int, str] | None:
    """
    Step and tier to load, or None for a fresh start. Pure.

    The newest by order and step; of one checkpoint the arena wins, as it is faster, unless it has less of what is wanted. What was refused
    is out; when only refused ones are left, or ones that do not fit, it is an error, never a fresh start.

    Raises:
        NoCheckpoint, CorruptCheckpoint, IncompatibleCheckpoint.
    """
    if fresh:
        return None
    candidates = [
        (order, s, -1 if s in memory.partial else 1, ARENA)
        for s, order in memory.whole.items()
        if f"arena:{s}" not in refused and s not in memory.misfits
    ]
    candidates += [(order, s, 0, STORAGE) for s, order in committed.items() if f"storage:{s}" not in refused]
    misfits = {s: why for s, (why, _) in memory.misfits.items()}
    if step is not None:
        candidates = [candidate for candidate in candidates if candidate[1] == step]
        misfits = {s: why for s, why in misfits.items() if s == step}
    if candidates:
        _, newest_step, _, tier = max(candidates)
        return newest_step, tier
    if refused:
        raise CorruptCheckpoint(
            f"every checkpoint of {root} that could be used is corrupt or lost: "
            + "; ".join(f"{where}: {why}" for where, why in refused.items()),
            reasons=refused,
        )
    if misfits:
        raise IncompatibleCheckpoint(
            f"nothing that could be loaded is committed in {root}, and what is in memory does not hold what was asked for: "
            + "; ".join(f"step {s}: {why}" for s, why in sorted(misfits.items()))
            + ". To start from nothing all the same, set restore.mode: None"
        )
    if step is not None:
        raise NoCheckpoint(f"there is no checkpoint of step {step} in {root}; committed are {sorted(committed)}")
    if on_missing is OnMissing.FAIL:
        raise NoCheckpoint(f"there is no checkpoint in {root}, and restore.onMissing is Fail")
    return None
