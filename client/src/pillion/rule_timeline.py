"""
Which rule makes a save due at which step, while a policy changes during a job.

Called from: `cadence`, under its lock, which also makes the ranks agree. Pure: the timeline of one rank.

    (-inf, A)                    as the job began
    accept(100, B)   at step 90  (-inf, A) (100, B)            from step 100 on B holds
    withdraw(100)    at step 95  (-inf, A)                     another rank was past 100: no rank takes it
                     at step 105 (-inf, A) (100, B) (106, A)   the same, too late for 100 to 105, whose answers stand

Must never: change the rule of a step that has an answer.
"""

import math
from dataclasses import dataclass
from typing import Final, final

from pillion.wire import policy

_MAX_REMEMBERED: Final = 64
"""Maximum changes that are kept; the oldest are dropped. A step gets the same answer again, that many changes back."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a save is due."""

    trigger: policy.Trigger
    suspended: bool = False
    """True: no save is due by a period. Requested saves are still made."""


@final
class RuleTimeline:
    """The rules of one rank, by the step from which each holds."""

    def __init__(self, first: Rule) -> None:
        self._changes: list[tuple[float, Rule]] = [(-math.inf, first)]
        """Accepted changes that were not withdrawn. The steps ahead follow them."""
        self._held: list[tuple[float, Rule]] = list(self._changes)
        """The rule of each step: behind, the rule that was answered by; ahead, the rule by the changes."""

    @property
    def newest(self) -> Rule:
        return self._held[-1][1]

    def at(self, step: int) -> Rule:
        """Return the rule of a step."""
        return _at(self._held, step)

    def holds(self, target: int, rule: Rule) -> bool:
        """Whether `rule`, and no other, holds from `target` on."""
        return self.at(target) == rule and all(each == rule for begins, each in self._held if begins > target)

    def accept(self, target: int, rule: Rule, highest: int | None) -> bool:
        """
        Let `rule` hold from `target` on. False: it cannot, because this rank has already answered for a step at or behind `target` by
        another rule, or has not begun.

        Args:
            target: the step. A later change has a later step.
            rule: the rule.
            highest: the highest step that has an answer. None before the first.
        """
        if highest is None or target <= highest:
            return self.holds(target, rule)
        self._changes = [*(each for each in self._changes if each[0] < target), (target, rule)]
        del self._changes[1:-_MAX_REMEMBERED]
        self._look_ahead(highest)
        return True

    def withdraw(self, target: int, highest: int | None) -> None:
        """Withdraw the change at `target`: entirely if this rank has not reached it, else from its next step on."""
        self._changes = [each for each in self._changes if each[0] != target]
        self._look_ahead(-1 if highest is None else highest)

    def _look_ahead(self, highest: int) -> None:
        self._held = [each for each in self._held if each[0] <= highest]
        ahead = _at(self._changes, highest + 1)
        if self._held[-1][1] != ahead:
            self._held.append((highest + 1, ahead))
        self._held += [each for each in self._changes if each[0] > highest + 1]
        del self._held[1:-_MAX_REMEMBERED]


def _at(entries: list[tuple[float, Rule]], step: int) -> Rule:
    return next((rule for begins, rule in reversed(entries) if begins <= step), entries[0][1])
