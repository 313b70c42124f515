"""
The whole of: which rule says when a save is due, at which step, as a policy changes while a job runs.

Called from: `cadence`, under its lock. Pure: one rank's standing; that the ranks agree is the cadence's business.

    (-inf, A)                    as the job began
    accept(100, B)   at step 90  (-inf, A) (100, B)            from step 100 on B holds
    withdraw(100)    at step 95  (-inf, A)                     another rank was past 100: nobody takes it
                     at step 105 (-inf, A) (100, B) (106, A)   the same, too late for 100 to 105, whose answers stand

Must never: change what holds at a step that was answered for.
"""

import math
from dataclasses import dataclass
from typing import Final, final

from pillion.wire import policy

_REMEMBERED: Final = 64
"""Changes that are kept; the oldest go. A step asked about again after a rollback is answered as before, that many changes back."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a save is due."""

    trigger: policy.Trigger
    suspended: bool = False
    """No save is due by a period; what somebody asks for is made all the same."""


@final
class RuleTimeline:
    """The rules of one rank, by the step from which each holds."""

    def __init__(self, first: Rule) -> None:
        self._changes: list[tuple[float, Rule]] = [(-math.inf, first)]
        """What was accepted and not withdrawn: what the steps ahead follow."""
        self._held: list[tuple[float, Rule]] = list(self._changes)
        """What holds at each step: behind, as it was answered for; ahead, as the changes say."""

    @property
    def newest(self) -> Rule:
        return self._held[-1][1]

    def at(self, step: int) -> Rule:
        """What holds at a step."""
        return _at(self._held, step)

    def holds(self, target: int, rule: Rule) -> bool:
        """Whether it is this rule, and no other, that holds from `target` on."""
        return self.at(target) == rule and all(each == rule for begins, each in self._held if begins > target)

    def accept(self, target: int, rule: Rule, highest: int | None) -> bool:
        """
        Let `rule` hold from `target` on. False: it cannot, as this rank has answered for a step behind `target` under another, or
        has not begun.

        Args:
            target: the step; of a later change a later one.
            rule: the rule.
            highest: the highest step that was answered for; None before the first.
        """
        if highest is None or target <= highest:
            return self.holds(target, rule)
        self._changes = [*(each for each in self._changes if each[0] < target), (target, rule)]
        del self._changes[1:-_REMEMBERED]
        self._look_ahead(highest)
        return True

    def withdraw(self, target: int, highest: int | None) -> None:
        """Take the change at `target` back: at once where this rank is not there yet, else from its next step on."""
        self._changes = [each for each in self._changes if each[0] != target]
        self._look_ahead(-1 if highest is None else highest)

    def _look_ahead(self, highest: int) -> None:
        self._held = [each for each in self._held if each[0] <= highest]
        ahead = _at(self._changes, highest + 1)
        if self._held[-1][1] != ahead:
            self._held.append((highest + 1, ahead))
        self._held += [each for each in self._changes if each[0] > highest + 1]
        del self._held[1:-_REMEMBERED]


def _at(entries: list[tuple[float, Rule]], step: int) -> Rule:
    return next((rule for begins, rule in reversed(entries) if begins <= step), entries[0][1])
