"""
What the pods have agreed on and use again: layouts by digest and plans by id. The newest few: a state that changes with each save (a list
that grows) must not fill the memory of the executors, nor the job's store.

Called from: `executor.save.persist` and `executor.save.dcp_writer`. Pure but for `Agreements.decision`.

    every pod:    publishes a layout that is not among `layouts` ahead of its "plan", under `layout_name`
    coordinator:  settle(digests) once all are here, which drops what was not used for KEPT_PLANS saves; notice() goes with the decision
    every pod:    hear(decision): drops the same, and publishes it once more when it comes again

What is dropped leaves the store one save later, when every pod has heard of it. A pod that may have missed a decision forgets all layouts, and
one whose coordinator was replaced as well: they are published once more, and nobody waits for what is gone.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from pillion.wire import layout
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange.protocol import Exchange

KEPT_PLANS: Final = 4
"""Plans remembered a session: layouts change rarely (frozen layers, a partial save), and then go back and forth."""


def layout_name(digest: str) -> str:
    """What a layout is published as."""
    return f"layout/{digest}"


def plan_name(plan_id: str) -> str:
    """What a plan is published as."""
    return f"plan/{plan_id}"


class Agreements:
    """See the module."""

    def __init__(self) -> None:
        self.layouts: dict[str, layout.Layout] = {}
        """By digest: this pod's, and on the coordinator those of all pods. What is here is published."""
        self._plans: dict[str, plan_module.Plan] = {}
        self._used: dict[str, frozenset[str]] = {}
        """(coordinator) id of a plan -> its layouts; the one used last is the last."""
        self._leaving: set[str] = set()
        """(coordinator) Names that go from the store with the next save."""
        self._drops = (secrets.token_hex(4), 0)
        """(coordinator) Who drops, and how often it has."""
        self._dropped: list[str] | None = None
        """(coordinator) What the next decision has to say of it."""
        self._heard: tuple[str, int] | None = None

    def plan(self, plan_id: str) -> plan_module.Plan | None:
        return self._plans.get(plan_id)

    def remember(self, plan: plan_module.Plan) -> None:
        self._plans.pop(plan.plan_id, None)
        self._plans[plan.plan_id] = plan
        while len(self._plans) > KEPT_PLANS:
            del self._plans[next(iter(self._plans))]

    def settle(self, digests: Mapping[int, str]) -> list[str]:
        """(coordinator) These layouts are used now; names that no pod looks for any more."""
        used, plan_id = frozenset(digests.values()), plan_module.plan_id(digests)
        self._used.pop(plan_id, None)
        self._used[plan_id] = used
        gone = self._leaving - {plan_name(plan_id), *map(layout_name, used)}
        self._leaving = set()
        dropped: set[str] = set()
        while len(self._used) > KEPT_PLANS:
            oldest = next(iter(self._used))
            dropped |= self._used.pop(oldest)
            self._plans.pop(oldest, None)
            self._leaving.add(plan_name(oldest))
        dropped -= frozenset[str]().union(*self._used.values())
        if dropped:
            self._drops = (self._drops[0], self._drops[1] + 1)
            self._dropped = sorted(dropped)
            self._leaving |= set(map(layout_name, dropped))
            self._drop(dropped)
        return sorted(gone)

    def notice(self) -> dict[str, Any]:
        """(coordinator) What a decision says besides."""
        dropped, self._dropped = self._dropped, None
        return {"drops": [*self._drops, dropped]}

    def hear(self, decision: Mapping[str, Any]) -> None:
        """A decision has come: drop what the coordinator has dropped; all, where this pod may have missed some."""
        name, number, dropped = decision["drops"]
        before, self._heard = self._heard, (str(name), int(number))
        if before in (None, self._heard):
            return
        if before == (name, int(number) - 1) and dropped is not None:
            self._drop(dropped)
        else:
            self.layouts.clear()

    def forget(self) -> None:
        """Nothing is known to be published any more."""
        self.layouts.clear()
        self._plans.clear()

    def move(self) -> None:
        """The pods meet elsewhere from now on, where nothing is published yet."""
        self.forget()
        self._used.clear()
        self._leaving.clear()

    def published(self) -> list[str]:
        """(coordinator) Names that are still published."""
        digests = frozenset(self.layouts).union(*self._used.values())
        return sorted({*map(layout_name, digests), *map(plan_name, self._used), *self._leaving})

    def _drop(self, digests: set[str] | list[str]) -> None:
        for digest in digests:
            self.layouts.pop(digest, None)

    def decision(self, exchange: Exchange, phase: str, bound_s: float) -> dict[str, Any]:
        """
        Wait for what the coordinator has decided on a plan, and hear it.

        Blocks: up to `bound_s`.

        Raises:
            BarrierTimeout: it did not come within `bound_s`.
        """
        try:
            decided = exchange.receive(f"{phase}/plan", bound_s)
        except BaseException:  # whatever ends the wait: what was dropped with it is not known
            self.forget()
            raise
        self.hear(decided)
        return decided
