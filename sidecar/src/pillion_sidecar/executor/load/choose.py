"""
The choice of the checkpoint that a load takes. Called from: `executor.load.restore`, in the pod of rank 0.

The newest checkpoint is the one that was committed (or sealed) last. Checkpoints are ordered by the generation of their session, then by the
number of loads in that session, then by step. So a rollback lasts: a later step of the abandoned branch is taken only when it is loaded by number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pillion.errors import (
    CorruptCheckpoint,
    ErrorDocument,
    IncompatibleCheckpoint,
    LoadError,
    NoCheckpoint,
    PillionError,
)
from pillion.wire.load_messages import Tier
from pillion.wire.policy import OnMissing, RestoreMode
from pillion.wire.remarks import Remarks
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog, milestones, retention
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.load import directory
from pillion_sidecar.executor.load.request import Request
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import reading
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.generation import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The snapshots that all pods hold in memory."""

    whole: Mapping[int, Order]
    """Steps that every pod can load from memory or from its disk -> their place in the order of seals."""
    on_disk: Collection[int] = ()
    """Steps of `whole` that some pod has on its disk only."""
    partial: Collection[int] = ()
    """Steps of `whole` that lack a part of the state. Only a load that is not strict has them."""
    misfits: Mapping[int, tuple[str, Order]]
    """Steps that some pod cannot use -> the reason, and their place in the order of seals."""


def gathered(offers: Mapping[int, Mapping[str, Any]]) -> Memory:
    """Combine the offers of all pods into one view of their memory. Pure."""
    every = [{int(step): entry for step, entry in offer["arena"].items()} for offer in offers.values()]
    shared = set.intersection(*(set(held) for held in every)) if every else set()
    # Two pods may hold one step of two branches: never mixed.
    alike = {step for step in shared if len({tuple(held[step]["order"]) for held in every}) == 1}
    misfits: dict[int, tuple[str, Order]] = {}
    for step in sorted(alike):
        if len({held[step].get("content", "") for held in every}) > 1:
            # Each pod has names of its own, so no pod has the whole state.
            alike.discard(step)
            misfits[step] = ("the pods hold different parts of the state in memory", _order(every[0][step]["order"]))
    for offer in offers.values():
        for step, entry in offer["misfits"].items():
            misfits.setdefault(int(step), (str(entry["why"]), _order(entry["order"])))
    return Memory(
        whole={step: _order(every[0][step]["order"]) for step in alike},
        on_disk={step for step in alike if any(held[step].get("disk") for held in every)},
        partial={step for step in alike if any(held[step]["partial"] for held in every)},
        misfits=misfits,
    )


def _order(entry: Any) -> Order:
    return int(entry[0]), int(entry[1])


def choose(context: Context, request: Request, phase: str, refused: Mapping[str, str]) -> dict[str, Any]:
    """
    (coordinator) Choose the checkpoint that every pod loads next. Return the choice as a document.

    Blocks: peer_timeout_s for the slowest pod's offer; for the listing of the root.

    Raises:
        exchange.StoreLost: the store is gone. Any other error is in the document.
    """
    choice: dict[str, Any] = {
        "step": None,
        "tier": Tier.FRESH,
        "path": "",
        "refused": dict(refused),
        "error": None,
        "arena": [],
        "passed_over": {},
        "set_aside": [],
        "order": [0, 0],
        "remarks": {},
        "elsewhere": False,
    }
    try:
        offers = context.exchange.collect(f"{phase}/offer", context.peer_timeout_s)
        not_shared = next((str(offer["not_shared"]) for offer in offers.values() if offer.get("not_shared")), "")
        if not_shared:
            raise LoadError(not_shared)
        for offer in offers.values():
            choice["refused"] |= {f"arena:{step}": str(why) for step, why in offer["torn"].items()}
        memory = gathered(offers)
        if request.path is not None:
            own = directory.own_steps(context, request, request.path)
            return choice | directory.choose(context, request, request.path, refused) | {"set_aside": sorted(own)}
        choice["arena"] = sorted(memory.whole)
        committed = _committed(context)
        remembered = milestones.remembered(context.root) if context.root is not None else None
        torn = any(offer["torn"] for offer in offers.values())
        if not (committed or memory.whole or memory.misfits or torn or remembered) and request.step is None:
            begun = directory.of_another_job(context, request, refused)
            if begun is not None:
                return choice | begun
        choice["refused"] |= missing(remembered, memory.whole, committed)
        picked = pick(
            memory=memory,
            committed=committed,
            refused=choice["refused"],
            step=_wanted_step(context, request),
            fresh=context.restore.mode is RestoreMode.NONE and request.step is None,
            on_missing=context.restore.on_missing,
            root=str(context.root or ""),
        )
    except protocol.StoreLost:
        raise
    except NoCheckpoint as err:
        # find(step) answers None for a missing step. A checkpoint that the policy demands is an error here too: a script whose find() answers
        # None starts from nothing, and would never call the load() that refuses.
        may_be_missing = request.find and request.step is not None
        choice["error"] = None if may_be_missing else ErrorDocument.from_exception(err).to_document()
    except PillionError as err:
        choice["error"] = ErrorDocument.from_exception(err).to_document()
    except OSError as err:
        choice["error"] = ErrorDocument("LoadError", f"cannot list {context.root}: {err}").to_document()
    else:
        if picked is not None:
            choice |= _described(context, request, *picked, memory, committed, choice["refused"])
    finally:
        context.watch.idle()
    return choice


def _described(
    context: Context,
    request: Request,
    step: int,
    tier: Tier,
    memory: Memory,
    committed: Mapping[int, Order],
    refused: Mapping[str, str],
) -> dict[str, Any]:
    """Return the part of the choice's document that describes the picked step."""
    order = committed[step] if tier is Tier.STORAGE else memory.whole[step]
    said, saved_ns = _remarks(context, request, step, tier)
    return {
        "step": step,
        "tier": tier,
        # Of a copy on the disks the path says that storage has it as well.
        "path": str(context.step_folder(step)) if tier is not Tier.ARENA and committed.get(step) == order else "",
        "order": list(order),
        "passed_over": passed_over(memory, (order, step)),
        "set_aside": set_aside(committed, refused, step),
        "remarks": said.to_document(),
        "saved_ns": saved_ns,
    }


def _remarks(context: Context, request: Request, step: int, tier: Tier) -> tuple[Remarks, int]:
    """Return what the script said about the save: the manifest's, or rank 0's in memory; and when the save began. 0: not known here."""
    if tier is Tier.STORAGE:
        described = catalog.manifest_of(context.step_folder(step))
        return (Remarks(), 0) if described is None else (described.remarks, described.started_ns)
    if step not in request.arena:
        # Rank 0's pod has it on its disk alone.
        return (Remarks() if context.disk is None else context.disk.remarks(step)), 0
    try:
        return context.reader.read(context.segments[context.first_rank], request.arena[step], step=step).remarks, 0
    except image.TornSlot:
        return Remarks(), 0  # the load finds the damage


def _wanted_step(context: Context, request: Request) -> int | None:
    if request.step is not None:
        return request.step
    return context.restore.step if context.restore.mode is RestoreMode.STEP else None


def _committed(context: Context) -> dict[int, Order]:
    root = context.root
    if root is None:
        return {}
    context.watch.storage(f"list {root}")
    return reading.retried(root, lambda: _list(root))


def _list(root: Folder) -> dict[int, Order]:
    retention.put_back(root)
    catalog.finish_interrupted(root)
    return catalog.committed(root)


def missing(
    remembered: tuple[int, Order] | None, arena: Mapping[int, Order], committed: Mapping[int, Order]
) -> dict[str, str]:
    """
    Refuse the newest commit if storage has lost it and memory holds no snapshot as new. Return it with the reason. Pure.

    So a load never takes an older checkpoint silently, and never starts from nothing after a loss.
    """
    if remembered is None:
        return {}
    lost, lost_order = remembered
    if lost in committed or any((order, step) >= (lost_order, lost) for step, order in arena.items()):
        return {}
    return {f"storage:{lost}": "was committed as the newest, and is not there any more"}


def passed_over(memory: Memory, chosen: tuple[Order, int]) -> dict[str, str]:
    """Return the snapshots that are newer than the chosen checkpoint, with the reason why each is not used. Pure."""
    newer = {step: why for step, (why, order) in memory.misfits.items() if (order, step) > chosen}
    return {f"arena:{step}": why for step, why in sorted(newer.items())}


def set_aside(committed: Mapping[int, Order], refused: Mapping[str, str], step: int) -> list[int]:
    """Return the committed steps ahead of the loaded one. They belong to the branch that this load abandons. Pure."""
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
) -> tuple[int, Tier] | None:
    """
    Pick the step and the tier to load, or None for a fresh start. Pure.

    The newest checkpoint by order and step wins. If it is in memory and on storage, memory wins, as it is faster, unless it lacks a part of the
    state. Refused checkpoints do not count. If only refused checkpoints are left, or ones that do not fit, that is an error, never a fresh start.

    Raises:
        NoCheckpoint, CorruptCheckpoint, IncompatibleCheckpoint.
    """
    if fresh:
        return None
    tiers = {s: Tier.LOCAL if s in memory.on_disk else Tier.ARENA for s in memory.whole}
    candidates = [
        (order, s, -1 if s in memory.partial else 1, tiers[s])
        for s, order in memory.whole.items()
        if f"{tiers[s]}:{s}" not in refused and s not in memory.misfits
    ]
    candidates += [(order, s, 0, Tier.STORAGE) for s, order in committed.items() if f"storage:{s}" not in refused]
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
