"""
Which snapshot the pods of a job persist when a trainer is dead: the newest that all of them hold whole. Called from: `executor.worker`;
what it answers is read by `supervisor.executor_client`.

A trainer that dies takes what it was staging with it, and often the job's store as well; the pods then hold different steps. They
agree on one here, on storage when it must be (`context.with_failover`), and each persists it like any other save.

    every pod:    post the steps that it holds, oldest first, with their orders, which are on storage already, and the calls that it heard
    coordinator:  the newest of its own that every pod holds, and all the calls -> publish

A call reaches the pods at different times. All that any of them has heard are answered together, so that none waits for a rescue by itself.

A rescue counts once it is decided, also when some pod was missing: that pod finds the decision when it comes, and meets the others under
the next number if it calls them again (`supervisor.persister`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pillion import fault_points
from pillion.errors import BarrierTimeout
from pillion_sidecar.executor.exchange.watchdog import LOOK_S

if TYPE_CHECKING:
    from pillion_sidecar.executor.session import Context

PEERS_S: Final = 20.0
"""Bound for every pod to come to a rescue. All are called by one message, or by the loss of the store, which each notices within
`signals.POLL_S`; a pod that is gone with its memory would be waited for in vain, while a restart waits behind this."""

PEERS_SHARE: Final = 1 / 4
"""Of the bound for peers in general: a pod that has gone on to the next session is waited for in vain here, while it waits there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreements:
    """What every pod does next."""

    step: int | None
    """To persist. None: nothing is left to do."""
    persisted: list[int]
    """Steps that all pods hold and some pod knows to be committed."""
    calls: list[str]
    """Names of the calls that are answered with it."""

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Agreements:
        step = document["step"]
        return cls(
            step=None if step is None else int(step),
            persisted=[int(each) for each in document["persisted"]],
            calls=[str(call) for call in document["calls"]],
        )


def agree(
    context: Context,
    held: Sequence[int],
    persisted: Sequence[int],
    calls: Sequence[str],
    *,
    born: Mapping[int, Sequence[int]] | None = None,
) -> Agreements:
    """
    Agree with the other pods.

    Args:
        held: steps that this pod holds whole, oldest first.
        persisted: those of them that are committed.
        calls: names of the calls that it heard.
        born: step -> (generation, epoch) of each: one step of two branches is not one snapshot.

    Blocks: twice the bound.

    Raises:
        BarrierTimeout: some pod did not come; nothing can be persisted without it. It names this one when it came too late.
        exchange.StoreLost: see `context.with_failover`.
    """
    fault_points.reach(fault_points.FaultPoint.RESCUE)
    phase = f"rescue/{context.rescues}"
    bound_s = min(PEERS_S, context.peer_timeout_s * PEERS_SHARE)
    if context.store_lost:
        # Nobody could be called: who waited for a store that is silent notices it this much later than who asked it something.
        bound_s += LOOK_S
    offer = {"held": list(held), "persisted": list(persisted), "calls": list(calls)}
    context.exchange.post(
        f"{phase}/offer", offer | {"born": {str(step): list(at) for step, at in (born or {}).items()}}
    )
    if context.coordinator:
        try:
            offers = context.exchange.collect(f"{phase}/offer", bound_s)
            heard = sorted({call for offer in offers.values() for call in offer["calls"]})
            decision: dict[str, Any] = {
                "step": pick(held, offers),
                "persisted": on_storage(offers),
                "calls": heard,
                "missing": [],
            }
            # Every pod is here, so that every pod has left the rescues before.
            context.exchange.forget(context.rescue_phases(context.rescues))
            context.rescues_forgotten = context.rescues
        except BarrierTimeout as err:
            decision = {"missing": list(err.missing), "waited_s": err.waited_s}
        context.exchange.publish(f"{phase}/choice", decision)
        context.last_choice = (f"{phase}/choice", decision)
    decision = context.exchange.receive(f"{phase}/choice", bound_s * 2)
    context.rescues += 1
    if decision["missing"]:
        raise BarrierTimeout(phase=f"{phase}/offer", missing=decision["missing"], waited_s=decision["waited_s"])
    return Agreements.from_document(decision)


def on_storage(offers: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Steps that every pod holds and one, at least, knows to be committed. Pure."""
    return sorted(_everywhere(offers) & {step for offer in offers.values() for step in offer["persisted"]})


def pick(held: Sequence[int], offers: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The newest step, in the coordinator's order, that every pod holds; None when it is on storage already. Pure."""
    everywhere = _everywhere(offers)
    for step in reversed(held):
        if step in everywhere:
            # One pod that knows of the commit is enough: the others have not heard of it.
            return None if any(step in offer["persisted"] for offer in offers.values()) else step
    return None


def _everywhere(offers: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """Steps that every pod holds, of one branch; the coordinator's own offer is among them."""
    shared = set.intersection(*(set(offer["held"]) for offer in offers.values()))
    return {
        step
        for step in shared
        if len({tuple(offer.get("born", {}).get(str(step), ())) for offer in offers.values()}) == 1
    }
