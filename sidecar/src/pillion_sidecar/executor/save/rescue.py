"""
The agreement on a rescue: which snapshot the pods persist after a trainer's death. It is the newest that all pods hold whole.

Called from: `executor.worker`. A dead trainer has lost what it was staging, and often the job's store as well. Then the pods hold different
steps. Here they agree on one step, over storage if necessary (`context.with_failover`). Then each pod persists it like any other save.

    every pod:    post its steps, oldest first, with their orders; which of them are on storage; and the calls for a rescue that it knows
    coordinator:  choose the newest of its own steps that every pod holds; publish it with all calls

A call reaches the pods at different times. One rescue answers all calls that any pod knows. So no pod waits in a rescue alone.

A rescue counts once it is decided, even if a pod was missing. That pod reads the decision when it comes. If it calls the others again, all
meet under the next number (`supervisor.persister`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pillion import fault_points
from pillion.errors import BarrierTimeout
from pillion_sidecar import channel
from pillion_sidecar.executor.exchange.watchdog import LOOK_S
from pillion_sidecar.executor.session import Context

PEERS_S: Final = 20.0
"""Timeout for every pod to come to a rescue. One message calls all pods, or each notices the loss of the store within `signals.POLL_S`. The
bound is short because a restart waits for the rescue, and a pod that is gone with its memory never comes."""

PEERS_SHARE: Final = 1 / 4
"""Share of the timeout for peers that a rescue may take. A pod that is already in the next session never comes, and waits there meanwhile."""


def agree(context: Context, own_offer: channel.Rescue) -> channel.Agreed:
    """
    Agree on a rescue with the other pods. `own_offer` has the steps that this pod holds, and the calls that it knows.

    Blocks: twice the bound.

    Raises:
        BarrierTimeout: a pod did not come, and nothing can be persisted without it. The missing pod is this one if it came too late.
        exchange.StoreLost: see `context.with_failover`.
    """
    fault_points.reach(fault_points.FaultPoint.RESCUE)
    phase = f"rescue/{context.rescues}"
    bound_s = min(PEERS_S, context.peer_timeout_s * PEERS_SHARE)
    if context.store_lost:
        # No pod could be called. A pod that waits for a silent store notices the loss this much later than a pod that sends it a request.
        bound_s += LOOK_S
    offer = {"held": list(own_offer.held), "persisted": list(own_offer.persisted), "calls": list(own_offer.calls)}
    context.exchange.post(
        f"{phase}/offer", offer | {"born": {str(step): list(at) for step, at in own_offer.born.items()}}
    )
    if context.coordinator:
        try:
            offers = context.exchange.collect(f"{phase}/offer", bound_s)
            heard = sorted({call for offer in offers.values() for call in offer["calls"]})
            decision: dict[str, Any] = {
                "step": pick(own_offer.held, offers),
                "persisted": on_storage(offers),
                "calls": heard,
                "missing": [],
            }
            # Every pod is here, so every pod has left the earlier rescues.
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
    return channel.Agreed(step=decision["step"], persisted=tuple(decision["persisted"]), calls=tuple(decision["calls"]))


def on_storage(offers: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Return the steps that every pod holds, and that at least one pod knows to be committed. Pure."""
    return sorted(_everywhere(offers) & {step for offer in offers.values() for step in offer["persisted"]})


def pick(held: Sequence[int], offers: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the newest step, in the coordinator's order, that every pod holds; None: there is none, or it is on storage already. Pure."""
    everywhere = _everywhere(offers)
    for step in reversed(held):
        if step in everywhere:
            # One pod that knows of the commit is enough. The other pods do not know of it yet.
            return None if any(step in offer["persisted"] for offer in offers.values()) else step
    return None


def _everywhere(offers: Mapping[int, Mapping[str, Any]]) -> set[int]:
    """Return the steps that every pod holds, with the same order. `offers` contains the coordinator's own offer too."""
    shared = set.intersection(*(set(offer["held"]) for offer in offers.values()))
    return {
        step
        for step in shared
        if len({tuple(offer.get("born", {}).get(str(step), ())) for offer in offers.values()}) == 1
    }
