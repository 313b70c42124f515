"""
The whole of when a save is due, decided by each rank for itself, at the same step on all of them, without a collective.

Called from: the checkpointer, on the trainer's thread; what the control channel brings, on the thread that reads it.
It must never read a clock (time is passed in: monotonic seconds), wait for a peer, or talk to anyone.

Steps agree by arithmetic. Time does not: clocks and loops differ, so one rank decides (``decides=True``, rank 0) and
names a step ahead of all ranks. The ranks are told through the control channel:

    rank 0   due(97) ... period over: proposal(97) -> 101     lead_s 2.0, step 0.5 s: 4 steps ahead
             |  T=101 goes by the control channel to the coordinator's sidecar and on to every rank, rank 0 as well
    rank 0   announce(101) -> True    due(98) due(99) due(100) NOT_DUE    due(101) PERSIST    saved(101)
    rank 1   due(98)  announce(101) -> True                               due(101) PERSIST    saved(101)

    a rank that was too fast (the lead was too short):
    rank 2   due(101) NOT_DUE   announce(101) -> False: it declines, for it has passed 101 without saving
             |  the decline goes back: declined(101) on rank 0, withdraw(101) on each other rank
    rank 0   proposal(99) -> 107: the lead doubles with each failed proposal, and is as before after one that held

What holds: a rank's answer for a step never changes once given; at an announced step a rank persists only if its
``announce`` returned True; the deciding rank has at most one proposal out. When all ranks accepted T, all persist at T.
Save-now and drain are the same: ``request_save`` makes the next ``proposal`` immediate.

A proposal ends when the deciding rank takes the save at T, when T was declined, or when the deciding rank went past T
without having been told of it (the channel lost it). A decline that comes when the save at T is taken already means
that the save lacks a rank: the next proposal is immediate. A save that fails later waits for the next period.

A rule that changes while the job runs (`rules`) goes the same way: the deciding rank names a step T from which the new rule
holds, a rank that is past T declines, the others then take it back, and the next T is twice as far ahead:

    rank 0   request_change(B)   change_proposal(97) -> 101, B
    all      announce_change(101, B) -> True             due(100) by the old rule    due(101) by B
    rank 2   announce_change(101, B) -> False            -> declined_change(101) on rank 0, withdraw_change(101) on each other

What holds: ranks that all accepted the same changes, and saw the same ones withdrawn, answer alike at every step ahead of all of
them. A rank that missed a change (its sidecar was away) hears of it when it is told again: ``request_change`` of what holds
already makes the next ``change_proposal`` repeat it, and a rank that is past T then declines, so that a new T is found.
"""

import math
import threading
from enum import Enum
from typing import Final, final

from pillion.errors import UsageError
from pillion.rules import Rule, Rules

LEAST_LEAD_STEPS: Final = 2
"""Fewest steps between a proposal and its T: with one, a rank a single step ahead would always be too far."""

_MOST_DOUBLINGS: Final = 10
"""Of the lead, after proposals that failed in a row: 1024 leads are further than ranks of one job ever drift apart."""

_REMEMBERED: Final = 1024
"""Accepted steps that are kept, so that a step asked about again is answered as before; newest stay."""

_LEAST_STEP_S: Final = 1e-4
"""Below any training step; a clock too coarse for the loop must not put T out of reach."""

_FALLING: Final = 0.5
_RISING: Final = 0.1
"""Weights of a step time below and above the estimate. One that is too low makes the lead too long, which costs
nothing; one that is too high makes it too short, so one long step (a stall, an evaluation) counts at most double."""


class Due(Enum):
    """What a rank does at a step."""

    NOT_DUE = "not due"
    SNAPSHOT = "snapshot"
    """Stage it; it stays in memory."""
    PERSIST = "persist"
    """Stage it; the sidecar persists and commits it."""


@final
class Cadence:
    """
    One rank's decisions. Ranks: all, each with its own.

    Args:
        rule: The periods; the same on all ranks.
        decides: True on exactly one rank.
        lead_s: Seconds that a message takes from the deciding rank to the slowest rank, with room to spare.

    Raises:
        UsageError: ``lead_s`` is not a positive, finite number.
    """

    def __init__(self, rule: Rule, *, decides: bool, lead_s: float) -> None:
        if not (lead_s > 0 and math.isfinite(lead_s)):
            raise UsageError(f"lead_s is {lead_s!r}; it is a positive number of seconds")
        self._rules = Rules(rule)
        self._decides = decides
        self._lead_s = lead_s
        # `announce` decides by what `due` has answered; between its look and its note no answer may be given.
        self._lock = threading.Lock()
        self._highest: int | None = None
        self._accepted: dict[int, None] = {}
        # All below is the deciding rank's.
        self._last_s: float | None = None
        self._stride = 1
        self._step_s: float | None = None
        self._period_began_s: float | None = None
        self._requested_at: int | None = None
        self._proposed: int | None = None
        self._num_failed = 0
        self._taken: int | None = None
        self._num_failed_before_taken = 0
        self._wanted: Rule | None = None
        self._change: tuple[int, Rule] | None = None
        """The newest change that was announced, and not declined."""
        self._last_target = 0
        self._num_failed_changes = 0
        self._tell_again = False

    def due(self, step: int, now_s: float) -> Due:
        """What this rank does at ``step``. Called once or more per step, in the order of the loop. Blocks: never."""
        with self._lock:
            answer = self._answer(step)
            if self._highest is None or step > self._highest:
                self._learn(step, now_s)
                self._highest = step
            if step == self._proposed and answer is Due.PERSIST:
                self._took(step, now_s)
            elif self._proposed is not None and step >= self._proposed:
                self._failed()
            return answer

    def announce(self, target: int) -> bool:
        """
        Tells this rank to persist at ``target``. True: it will, or has; False: it declines, as it is past that step
        and did not persist there, or has not begun, so that it cannot know. Telling it twice changes nothing.
        """
        with self._lock:
            if self._highest is None:
                return False
            if target <= self._highest:
                return self._answer(target) is Due.PERSIST
            # Also where the step period names the same step: another rule may hold there by then.
            self._accepted[target] = None
            while len(self._accepted) > _REMEMBERED:
                del self._accepted[next(iter(self._accepted))]
            return True

    def withdraw(self, target: int) -> bool:
        """
        Takes an announcement back, as another rank declined it. False: too late, this rank persists at ``target`` or
        did, because it is there or by the step period; such a save may lack the ranks that declined.
        """
        with self._lock:
            if self._highest is not None and target > self._highest:
                self._accepted.pop(target, None)
            return self._answer(target) is not Due.PERSIST

    def proposal(self, step: int, now_s: float) -> int | None:
        """
        The step to announce to all ranks, when a save by time or by request is due; None otherwise, and always on
        ranks that do not decide. It is told once; then None until that proposal has ended. Call it after ``due``.
        """
        with self._lock:
            if not self._decides or self._proposed is not None or self._step_s is None:
                return None
            if self._requested_at is None and not self._period_is_over(step, now_s):
                return None
            self._proposed = self._ahead(step, self._step_s, self._num_failed)
            return self._proposed

    def _ahead(self, step: int, step_s: float, num_failed: int) -> int:
        """A step that a message reaches all ranks before."""
        lead_steps = max(LEAST_LEAD_STEPS, math.ceil(self._lead_s / max(step_s, _LEAST_STEP_S))) << num_failed
        # A loop that asks at every k-th step only must meet T; after a rollback T must be new to all ranks.
        at = step if self._highest is None else max(step, self._highest)
        return at + self._stride * lead_steps

    def request_save(self) -> None:
        """
        Makes the next ``proposal`` immediate. A proposal that is out already answers the request.

        Raises:
            UsageError: on a rank that does not decide.
        """
        if not self._decides:
            raise UsageError("request_save was called on a rank that does not decide; ask the deciding rank")
        with self._lock:
            self._requested_at = -1 if self._highest is None else self._highest

    def declined(self, target: int) -> None:
        """Tells the deciding rank that some rank declined ``target``: it proposes again, further ahead."""
        with self._lock:
            if target == self._proposed:
                self._failed()
            elif target == self._taken and self._proposed is None:
                self._taken = None
                self._num_failed = self._num_failed_before_taken
                self._requested_at = self._highest
                self._failed()

    def saved(self, step: int, now_s: float) -> None:
        """
        Tells that the persisted save of ``step``, whoever asked for it, was taken at ``now_s``: the period begins anew.
        May come late; a save older than a request or a proposal does not answer it.
        """
        with self._lock:
            self._took(step, now_s)

    # --- another rule ----------------------------------------------------------------------------------------------

    def request_change(self, rule: Rule) -> None:
        """
        Has the deciding rank bring all ranks under `rule`; of one that holds already, has it told again.

        Raises:
            UsageError: on a rank that does not decide.
        """
        if not self._decides:
            raise UsageError("request_change was called on a rank that does not decide; ask the deciding rank")
        with self._lock:
            self._wanted, self._tell_again = rule, True

    def change_proposal(self, step: int, now_s: float) -> tuple[int, Rule] | None:
        """
        The change to announce to all ranks, and the step from which it holds; None while there is nothing to tell, and
        always on ranks that do not decide. One is out at a time: until this rank has passed its step. Call it after ``due``.
        """
        with self._lock:
            wanted = self._wanted
            if wanted is None or self._step_s is None or self._highest is None:
                return None
            if self._change is not None:
                if self._highest < self._change[0]:
                    return None
                if self._rules.holds(*self._change):
                    self._num_failed_changes = 0
                else:
                    self._change_failed()
            tell_again, self._tell_again = self._tell_again, False
            if self._rules.newest == wanted:
                return self._change if tell_again else None
            # Each change has a step of its own: a decline names nothing else.
            target = self._ahead(step, self._step_s, self._num_failed_changes)
            self._last_target = target = max(target, self._last_target + self._stride)
            self._change = target, wanted
            return self._change

    def announce_change(self, target: int, rule: Rule) -> bool:
        """Tells this rank that `rule` holds from ``target`` on. False: it declines. Telling it twice changes nothing."""
        with self._lock:
            return self._rules.accept(target, rule, self._highest)

    def withdraw_change(self, target: int) -> None:
        """Takes the change at ``target`` back, as another rank declined it: for the steps that this rank has ahead of it."""
        with self._lock:
            self._rules.withdraw(target, self._highest)

    def declined_change(self, target: int) -> None:
        """Tells the deciding rank that some rank declined the change at ``target``: it proposes again, further ahead."""
        with self._lock:
            self._rules.withdraw(target, self._highest)
            if self._change is not None and self._change[0] == target:
                self._change_failed()

    def _change_failed(self) -> None:
        self._change = None
        self._num_failed_changes = min(self._num_failed_changes + 1, _MOST_DOUBLINGS)

    # --- deciding --------------------------------------------------------------------------------------------------

    def _answer(self, step: int) -> Due:
        """What ``due`` answers for a step: of nothing but the rules and the accepted announcements."""
        rule = self._rules.at(step)
        trigger = rule.trigger
        if step > 0 and step in self._accepted:
            return Due.PERSIST
        if rule.suspended:
            return Due.NOT_DUE
        if step > 0 and trigger.period_steps and step % trigger.period_steps == 0:
            return Due.PERSIST
        return Due.SNAPSHOT if trigger.snapshot_steps and step % trigger.snapshot_steps == 0 else Due.NOT_DUE

    def _learn(self, step: int, now_s: float) -> None:
        """Takes in the time since the step before."""
        if self._period_began_s is None:
            self._period_began_s = now_s
        if self._highest is not None:
            self._stride = step - self._highest
        if self._last_s is not None and now_s > self._last_s:
            took_s = now_s - self._last_s
            if self._step_s is None:
                self._step_s = took_s
            elif took_s < self._step_s:
                self._step_s += (took_s - self._step_s) * _FALLING
            else:
                self._step_s += (min(took_s, 2 * self._step_s) - self._step_s) * _RISING
        self._last_s = now_s

    def _period_is_over(self, step: int, now_s: float) -> bool:
        rule = self._rules.at(step)
        period_s = None if rule.suspended else rule.trigger.period_seconds
        return period_s is not None and self._period_began_s is not None and now_s - self._period_began_s >= period_s

    def _took(self, step: int, now_s: float) -> None:
        self._period_began_s = now_s if self._period_began_s is None else max(self._period_began_s, now_s)
        if self._requested_at is not None and step >= self._requested_at:
            self._requested_at = None
        if self._proposed is not None and step >= self._proposed:
            self._taken, self._num_failed_before_taken = self._proposed, self._num_failed
            self._proposed, self._num_failed = None, 0

    def _failed(self) -> None:
        self._proposed = None
        self._num_failed = min(self._num_failed + 1, _MOST_DOUBLINGS)
