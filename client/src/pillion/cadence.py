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

T is as many steps ahead as the lead takes, by the pace of the newest steps. Where the pace changes (data that is skipped, then training)
T may be thousands of steps away: then a nearer step is named as well, once the lead is over. When the save at the nearer one is taken,
the deciding rank recalls the far one (`recalled`): by the same message as a decline, and only while it is more than a lead ahead.

A loop need not ask at every step. What is due at a step is due at the first step at or behind it that the loop asks about:

    periodSteps 10, asked at 7 14 21 28 35    PERSIST at 14 21 35 (for 10, 20 and 30)

A rule that changes while the job runs (`rule_timeline`) goes the same way: the deciding rank names a step T from which the new rule
holds, a rank that is past T declines, the others then take it back, and the next T is twice as far ahead:

    rank 0   request_change(B)   change_proposal(97) -> 101, B
    all      announce_change(101, B) -> True             due(100) by the old rule    due(101) by B
    rank 2   announce_change(101, B) -> False            -> declined_change(101) on rank 0, withdraw_change(101) on each other

What holds: ranks that all accepted the same changes, and saw the same ones withdrawn, answer alike at every step ahead of all of
them. A rank that missed a change (its sidecar was away) hears of it when it is told again: ``request_change`` of what holds
already makes the next ``change_proposal`` repeat it, and a rank that is past T then declines, so that a new T is found.
"""

import bisect
import collections
import math
import statistics
import threading
from enum import Enum
from typing import Final, final

from pillion.errors import UsageError
from pillion.rule_timeline import Rule, RuleTimeline

LEAST_LEAD_STEPS: Final = 2
"""Fewest steps between a proposal and its T: with one, a rank a single step ahead would always be too far."""

_MOST_DOUBLINGS: Final = 5
"""Doublings of the lead after proposals that failed in a row: 32 leads are 8 s in a pod and a minute across pods. A save that somebody asks
for does not wait longer, and the sidecar passes a message on within seconds."""

_REMEMBERED: Final = 1024
"""Accepted steps that are kept, so that a step asked about again is answered as before; newest stay."""

_LEAST_STEP_S: Final = 1e-6
"""Shorter than a call of `due`: no loop is faster."""

_RECENT: Final = 5
"""Newest steps that tell the pace of the loop, by their median: two evaluations or stalls among them change nothing, and a loop that
has become slower or faster is known by its third step."""

_MUCH_NEARER: Final = 2
"""A nearer step is named where the one that is out is further away than so many times the way to the nearer one."""


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
            raise UsageError(f"lead_s is {lead_s!r}; it must be a positive number of seconds")
        self._rules = RuleTimeline(rule)
        self._decides = decides
        self._lead_s = lead_s
        # `announce` decides by what `due` has answered; between its look and its note no answer may be given.
        self._lock = threading.Lock()
        self._highest: int | None = None
        """The highest step that was answered for, since the newest load."""
        self._previous: int | None = None
        """The newest step that was answered for or loaded: what is due behind it is due at the next step."""
        self._gaps: dict[int, int] = {}
        """Step -> the step that was asked about before it, where there are others between."""
        self._accepted: list[int] = []
        """Announced steps, in order."""
        # All below is the deciding rank's.
        self._last_s: float | None = None
        self._steps_s: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._strides: collections.deque[int] = collections.deque(maxlen=_RECENT)
        self._period_began_s: float | None = None
        self._requested_at: int | None = None
        self._proposed: int | None = None
        self._proposed_s = 0.0
        self._superseded: collections.deque[int] = collections.deque(maxlen=_RECENT)
        """Announced steps that a nearer one took the place of, until they are recalled."""
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
            if self._highest is None or step > self._highest:
                self._move(step, now_s)
            answer = self._answer(step)
            if self._proposed is not None and step >= self._proposed:
                if answer is Due.PERSIST:
                    self._took(step, now_s)
                else:
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
            if target not in self._accepted:
                bisect.insort(self._accepted, target)
                del self._accepted[:-_REMEMBERED]
            return True

    def withdraw(self, target: int) -> bool:
        """
        Takes an announcement back, as another rank declined it. False: too late, this rank persists at ``target`` or
        did, because it is there or by the step period; such a save may lack the ranks that declined.
        """
        with self._lock:
            self._take_back(target)
            return self._answer(target) is not Due.PERSIST

    def proposal(self, step: int, now_s: float) -> int | None:
        """
        The step to announce to all ranks, when a save by time or by request is due; None otherwise, and always on
        ranks that do not decide. It is told once; then None until that proposal has ended, or a much nearer step would do since
        the pace has changed. Call it after ``due``.
        """
        with self._lock:
            if not self._decides or not self._steps_s:
                return None
            nearest = self._ahead(step, self._num_failed)
            if self._proposed is not None:
                at = self._at(step)
                if now_s - self._proposed_s < self._lead_s or self._proposed - at <= (nearest - at) * _MUCH_NEARER:
                    return None
            elif self._requested_at is None and not self._period_is_over(step, now_s):
                return None
            if self._proposed is not None:
                self._superseded.append(self._proposed)
            self._proposed, self._proposed_s = nearest, now_s
            return self._proposed

    def recalled(self, step: int) -> int | None:
        """
        (deciding rank) A step to decline for all ranks: a nearer one took its place, and that save was taken. None: there is none, or
        all of them stand, as some rank could be at them before it hears. Call it after ``proposal``.
        """
        with self._lock:
            while self._superseded and self._proposed is None:
                target = self._superseded.popleft()
                if target > self._ahead(step, 0):
                    self._take_back(target)
                    return target
            return None

    def _at(self, step: int) -> int:
        # Where a loop goes back without a load, T must be new to all ranks.
        return step if self._highest is None else max(step, self._highest)

    def _ahead(self, step: int, num_failed: int) -> int:
        """A step that a message reaches all ranks before."""
        step_s = max(statistics.median_low(self._steps_s), _LEAST_STEP_S)
        lead_steps = max(LEAST_LEAD_STEPS, math.ceil(self._lead_s / step_s)) << num_failed
        return self._at(step) + self._stride * lead_steps

    @property
    def _stride(self) -> int:
        return statistics.median_low(self._strides) if self._strides else 1

    def request_save(self) -> None:
        """
        Makes the next ``proposal`` immediate. A proposal that is out already answers the request.

        Raises:
            UsageError: on a rank that does not decide.
        """
        if not self._decides:
            raise UsageError("request_save was called on a rank that does not decide; call it on the deciding rank")
        with self._lock:
            self._requested_at = -1 if self._highest is None else self._highest

    def declined(self, target: int) -> None:
        """Tells the deciding rank that some rank declined ``target``: it proposes again, further ahead."""
        with self._lock:
            self._take_back(target)
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

    def loaded(self, step: int, now_s: float) -> None:
        """
        Tells that all ranks have loaded the checkpoint of ``step``, and train on from there: the period begins, and the steps ahead
        of it are new again, also where a rollback went back behind them. A request that is out stands.
        """
        with self._lock:
            self._previous, self._last_s = step, None
            self._gaps = {each: before for each, before in self._gaps.items() if each <= step}
            if self._highest is not None:
                self._highest = step
            self._period_began_s = now_s
            # No save of an older pass answers it.
            self._requested_at = None if self._requested_at is None else step + 1
            self._proposed = self._taken = None
            self._superseded.clear()
            self._num_failed = 0
            self._change, self._last_target, self._num_failed_changes = None, 0, 0

    # --- another rule ----------------------------------------------------------------------------------------------

    def request_change(self, rule: Rule) -> None:
        """
        Has the deciding rank bring all ranks under `rule`; of one that holds already, has it told again.

        Raises:
            UsageError: on a rank that does not decide.
        """
        if not self._decides:
            raise UsageError("request_change was called on a rank that does not decide; call it on the deciding rank")
        with self._lock:
            self._wanted, self._tell_again = rule, True

    def change_proposal(self, step: int, now_s: float) -> tuple[int, Rule] | None:
        """
        The change to announce to all ranks, and the step from which it holds; None while there is nothing to tell, and
        always on ranks that do not decide. One is out at a time: until this rank has passed its step. Call it after ``due``.
        """
        with self._lock:
            wanted = self._wanted
            if wanted is None or not self._steps_s or self._highest is None:
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
            target = self._ahead(step, self._num_failed_changes)
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
        """What ``due`` answers for a step: of nothing but the rules, the accepted announcements, and the step that was asked about before."""
        rule = self._rules.at(step)
        trigger = rule.trigger
        before = self._gaps.get(step, step - 1)
        if step > 0 and bisect.bisect(self._accepted, before) < bisect.bisect(self._accepted, step):
            return Due.PERSIST
        if rule.suspended:
            return Due.NOT_DUE
        if step > 0 and trigger.period_steps and step // trigger.period_steps > before // trigger.period_steps:
            return Due.PERSIST
        if trigger.snapshot_steps and step // trigger.snapshot_steps > before // trigger.snapshot_steps:
            return Due.SNAPSHOT
        return Due.NOT_DUE

    def _move(self, step: int, now_s: float) -> None:
        """To a step that is new to this rank; takes in the way from the step before, and its time."""
        if self._period_began_s is None:
            self._period_began_s = now_s
        before = self._previous
        if before is not None and before < step:
            self._strides.append(step - before)
            if step - before > 1:
                self._gaps[step] = before
                while len(self._gaps) > _REMEMBERED:
                    del self._gaps[next(iter(self._gaps))]
        if self._last_s is not None and now_s > self._last_s:
            self._steps_s.append(now_s - self._last_s)
        self._previous = self._highest = step
        self._last_s = now_s

    def _take_back(self, target: int) -> None:
        if target in self._accepted and (self._highest is None or target > self._highest):
            self._accepted.remove(target)

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
