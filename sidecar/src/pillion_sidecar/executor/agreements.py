"""
The layouts and plans that the pods have agreed on, kept for later saves: layouts by digest, plans by id.

Only the newest few are kept. A state whose layout changes with each save (a list that grows) must fill neither the memory of the executors nor
the job's store.

Called from: `executor.save.persist` and `executor.save.dcp_writer`. Pure, except for `Agreements.decision`.

    every pod:    publishes a layout that is not in `layouts`, under `layout_name`, before its "plan"
    coordinator:  settle(digests) when all layouts are known: drops layouts unused for KEPT_PLANS saves; notice() goes with the decision
    every pod:    hear(decision): drops the same layouts, and publishes one again if it is used again

Dropped layouts are deleted from the store one save later, when every pod has dropped them. A pod that may have missed a decision, or whose
coordinator was replaced, forgets all layouts and publishes them again. So no pod waits for a deleted layout.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from pillion.wire import layout
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange.protocol import Exchange

KEPT_PLANS: Final = 4
"""Maximum plans that are kept in a session. Layouts change rarely (frozen layers, a partial save), and then alternate."""


def layout_name(digest: str) -> str:
    """Return the name under which a layout is published."""
    return f"layout/{digest}"


def plan_name(plan_id: str) -> str:
    """Return the name under which a plan is published."""
    return f"plan/{plan_id}"


class Agreements:
    """The kept layouts and plans of one session. See the module."""

    def __init__(self) -> None:
        self.layouts: dict[str, layout.Layout] = {}
        """Published layouts by digest: this pod's; on the coordinator those of all pods."""
        self._plans: dict[str, plan_module.Plan] = {}
        self._used: dict[str, frozenset[str]] = {}
        """(coordinator) Id of a plan -> its layouts. The most recently used plan is the last entry."""
        self._leaving: set[str] = set()
        """(coordinator) Names that the next save deletes from the store."""
        self._drops = (secrets.token_hex(4), 0)
        """(coordinator) Random id of this executor, and the number of its drops."""
        self._dropped: list[str] | None = None
        """(coordinator) Dropped layouts that the next decision must name."""
        self._last_drop: tuple[str, int] | None = None
        """`_drops` of the coordinator in the last decision."""

    def plan(self, plan_id: str) -> plan_module.Plan | None:
        return self._plans.get(plan_id)

    def remember(self, plan: plan_module.Plan) -> None:
        self._plans.pop(plan.plan_id, None)
        self._plans[plan.plan_id] = plan
        while len(self._plans) > KEPT_PLANS:
            del self._plans[next(iter(self._plans))]

    def settle(self, digests: Mapping[int, str]) -> list[str]:
        """(coordinator) Note the layouts of this save. Return the published names that no pod needs any more."""
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
        """(coordinator) Return the part of a decision that names dropped layouts."""
        dropped, self._dropped = self._dropped, None
        return {"drops": [*self._drops, dropped]}

    def hear(self, decision: Mapping[str, Any]) -> None:
        """Drop the layouts that the coordinator has dropped. If this pod may have missed a decision, forget all layouts."""
        name, number, dropped = decision["drops"]
        before, self._last_drop = self._last_drop, (str(name), int(number))
        if before in (None, self._last_drop):
            return
        if before == (name, int(number) - 1) and dropped is not None:
            self._drop(dropped)
        else:
            self.layouts.clear()

    def forget(self) -> None:
        """Forget all layouts and plans, because it is not known whether they are still published."""
        self.layouts.clear()
        self._plans.clear()

    def move(self) -> None:
        """Forget everything, because the pods use another exchange from now on, where nothing is published yet."""
        self.forget()
        self._used.clear()
        self._leaving.clear()

    def published(self) -> list[str]:
        """(coordinator) Return the names that are still published."""
        digests = frozenset(self.layouts).union(*self._used.values())
        return sorted({*map(layout_name, digests), *map(plan_name, self._used), *self._leaving})

    def _drop(self, digests: set[str] | list[str]) -> None:
        for digest in digests:
            self.layouts.pop(digest, None)

    def decision(self, exchange: Exchange, phase: str, bound_s: float) -> dict[str, Any]:
        """
        Wait for the coordinator's decision on a plan, and apply its drops.

        Blocks: up to `bound_s`.

        Raises:
            BarrierTimeout: the decision did not come within `bound_s`.
        """
        try:
            decided = exchange.receive(f"{phase}/plan", bound_s)
        except BaseException:  # this pod then does not know which layouts the decision has dropped
            self.forget()
            raise
        self.hear(decided)
        return decided
