"""
When a save is due. Each rank decides for itself, and all ranks get the same step, without a collective.

Called from: the checkpointer, on the trainer's thread. Messages of the control channel come on the thread that reads it.
Must never: read a clock (time is passed in: monotonic seconds), wait for a peer, or send a message.

Ranks agree on steps by arithmetic. They cannot agree on time, as clocks and loops differ. So one rank decides (``decides=True``,
rank 0), and names a step that all ranks have ahead of them. The control channel announces the step to the ranks:

    rank 0   due(97) ... period over: proposal(97) -> 101     lead_s 2.0, step 0.5 s: 4 steps ahead
             |  T=101 travels through the control channel to the coordinator's sidecar, and on to every rank, including rank 0
    rank 0   announce(101) -> True    due(98) due(99) due(100) NOT_DUE    due(101) PERSIST    saved(101)
    rank 1   due(98)  announce(101) -> True                               due(101) PERSIST    saved(101)

    a rank that was too fast (the lead was too short):
    rank 2   due(101) NOT_DUE   announce(101) -> False: it declines, because it has passed 101 without saving
             |  the decline goes back: declined(101) on rank 0, withdraw(101) on each other rank
    rank 0   proposal(99) -> 107: each failed proposal doubles the lead; a successful one resets it

Invariants: a rank never changes its answer for a step. At an announced step a rank persists only if its ``announce`` returned
True. The deciding rank has at most one open proposal. If all ranks accepted T, all persist at T.
Save-now and drain use the same way: ``request_save`` makes the next ``proposal`` immediate.

A proposal ends when the deciding rank takes the save at T, when a rank declines T, or when the deciding rank passes T without its
announcement (the channel lost it). A decline may arrive after the save at T was taken. Then that save lacks a rank, and the next
proposal is immediate. A save that fails later waits for the next period.

The distance to T is the lead, divided by the duration of the newest steps. If the pace changes (skipped data, then training), T may be
thousands of steps away. Then the deciding rank also names a nearer step, once the lead is over. After the save at the nearer step, it
recalls the far one (`recalled`). A recall is the same message as a decline, and is sent only while T is more than a lead ahead.

A loop need not call ``due`` at every step. A save that is due at a step is due at the first step, at or behind it, that has a call:

    periodSteps 10, called at 7 14 21 28 35    PERSIST at 14 21 35 (for 10, 20 and 30)

A rule that changes while the job runs (`rule_timeline`) is announced in the same way. The deciding rank names a step T from which the
new rule holds. A rank that is past T declines; the others then withdraw the change, and the next T is twice as far ahead:

    rank 0   request_change(B)   change_proposal(97) -> 101, B
    all      announce_change(101, B) -> True             due(100) by the old rule    due(101) by B
    rank 2   announce_change(101, B) -> False            -> declined_change(101) on rank 0, withdraw_change(101) on each other

Invariant: ranks that accepted the same changes, and withdrew the same ones, give the same answer at every step ahead of all of them.
A rank may miss a change while its sidecar is away. ``request_change`` of the rule that already holds repeats the last change in the
next ``change_proposal``. A rank that is past T then declines, which leads to a new T.
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

MIN_LEAD_STEPS: Final = 2
"""Minimum steps between a proposal and its T. With one step, a rank that is a single step ahead would always decline."""

_MAX_DOUBLINGS: Final = 5
"""Maximum doublings of the lead after proposals that failed in a row. 32 leads are 8 s in a pod and a minute across pods, which bounds
the wait of a requested save. The sidecar forwards a message within seconds."""

_MAX_REMEMBERED: Final = 1024
"""Maximum accepted steps that are kept; the oldest are dropped. A repeated call for a step must give the same answer."""

_MIN_STEP_S: Final = 1e-6
"""Minimum duration of a step, shorter than a call of `due`: no loop is faster."""

_RECENT_STEPS: Final = 5
"""Number of newest steps whose median is the pace of the loop. Two evaluations or stalls among them change nothing, and a new pace shows
after three steps."""

_NEARER_RATIO: Final = 2
"""Minimum ratio of the open proposal's distance to that of a nearer step, for the nearer step to be announced as well."""


class Due(Enum):
    """What a rank does at a step."""

    NOT_DUE = "not due"
    SNAPSHOT = "snapshot"
    """Stage it; it stays in memory."""
    LOCAL = "local"
    """Stage it; the sidecar writes it to the node's disk as well."""
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
        # `announce` depends on the answers of `due`, so both must not run at the same time.
        self._lock = threading.Lock()
        self._highest: int | None = None
        """The highest step that has an answer, since the newest load."""
        self._previous: int | None = None
        """The newest step that has an answer or was loaded. A save due behind it is due at the next step."""
        self._gaps: dict[int, int] = {}
        """Step -> the previous step with a call of `due`, if there are steps between them."""
        self._accepted: list[int] = []
        """Announced steps, in order."""
        # Only the deciding rank uses the attributes below.
        self._last_s: float | None = None
        self._steps_s: collections.deque[float] = collections.deque(maxlen=_RECENT_STEPS)
        self._strides: collections.deque[int] = collections.deque(maxlen=_RECENT_STEPS)
        self._period_began_s: float | None = None
        self._requested_at: int | None = None
        self._proposed: int | None = None
        self._proposed_s = 0.0
        self._superseded: collections.deque[int] = collections.deque(maxlen=_RECENT_STEPS)
        """Announced steps that a nearer step replaced, until they are recalled."""
        self._num_failed = 0
        self._taken: int | None = None
        self._num_failed_before_taken = 0
        self._wanted: Rule | None = None
        self._change: tuple[int, Rule] | None = None
        """The newest announced change that no rank declined."""
        self._last_target = 0
        self._num_failed_changes = 0
        self._tell_again = False

    def due(self, step: int, now_s: float) -> Due:
        """Return what this rank does at ``step``. Called once or more per step, in the order of the loop. Blocks: never."""
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
        Accept an announced save at ``target``, or decline it. Idempotent.

        True: this rank will persist at ``target``, or has. False: this rank declines. It is past that step without a save, or has not
        begun and cannot know.
        """
        with self._lock:
            if self._highest is None:
                return False
            if target <= self._highest:
                return self._answer(target) is Due.PERSIST
            # Noted even if the step period includes this step: another rule may hold at that step later.
            if target not in self._accepted:
                bisect.insort(self._accepted, target)
                del self._accepted[:-_MAX_REMEMBERED]
            return True

    def withdraw(self, target: int) -> bool:
        """
        Withdraw an announcement that another rank declined.

        False: too late. This rank persists or has persisted at ``target``, because it is past it or by the step period. Such a save may
        lack the ranks that declined.
        """
        with self._lock:
            self._take_back(target)
            return self._answer(target) is not Due.PERSIST

    def proposal(self, step: int, now_s: float) -> int | None:
        """
        Return the step to announce to all ranks, if a save by time or by request is due. Otherwise None, and always None on ranks that
        do not decide.

        A proposal is returned once. Then None, until that proposal has ended, or a much nearer step is possible because the pace has
        changed. Call it after ``due``.
        """
        with self._lock:
            if not self._decides or not self._steps_s:
                return None
            nearest = self._ahead(step, self._num_failed)
            if self._proposed is not None:
                at = self._at(step)
                if now_s - self._proposed_s < self._lead_s or self._proposed - at <= (nearest - at) * _NEARER_RATIO:
                    return None
            elif self._requested_at is None and not self._period_is_over(step, now_s):
                return None
            if self._proposed is not None:
                self._superseded.append(self._proposed)
            self._proposed, self._proposed_s = nearest, now_s
            return self._proposed

    def recalled(self, step: int) -> int | None:
        """
        (deciding rank) Return a step to decline for all ranks, because a nearer step replaced it and that save was taken. None if there is
        none. Steps within one lead stay, as a rank may reach them before the recall. Call it after ``proposal``.
        """
        with self._lock:
            while self._superseded and self._proposed is None:
                target = self._superseded.popleft()
                if target > self._ahead(step, 0):
                    self._take_back(target)
                    return target
            return None

    def _at(self, step: int) -> int:
        # If a loop goes back without a load, T must still be new to all ranks.
        return step if self._highest is None else max(step, self._highest)

    def _ahead(self, step: int, num_failed: int) -> int:
        """Return a step that no rank reaches before a message does."""
        step_s = max(statistics.median_low(self._steps_s), _MIN_STEP_S)
        lead_steps = max(MIN_LEAD_STEPS, math.ceil(self._lead_s / step_s)) << num_failed
        return self._at(step) + self._stride * lead_steps

    @property
    def _stride(self) -> int:
        return statistics.median_low(self._strides) if self._strides else 1

    def request_save(self) -> None:
        """
        Make the next ``proposal`` immediate. An open proposal already answers the request.

        Raises:
            UsageError: on a rank that does not decide.
        """
        if not self._decides:
            raise UsageError("request_save was called on a rank that does not decide; call it on the deciding rank")
        with self._lock:
            self._requested_at = -1 if self._highest is None else self._highest

    def declined(self, target: int) -> None:
        """(deciding rank) A rank declined ``target``: propose again, further ahead."""
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
        Note that the persisted save of ``step`` was taken at ``now_s``. The period begins again, whatever made the save due.

        The call may come late. A save older than a request or a proposal does not answer it.
        """
        with self._lock:
            self._took(step, now_s)

    def loaded(self, step: int, now_s: float) -> None:
        """
        Note that all ranks have loaded the checkpoint of ``step`` and train on from there. The period begins again.

        After a rollback, the steps ahead of ``step`` are new again. An open request stays open.
        """
        with self._lock:
            self._previous, self._last_s = step, None
            self._gaps = {each: before for each, before in self._gaps.items() if each <= step}
            if self._highest is not None:
                self._highest = step
            self._period_began_s = now_s
            # A save from before the load does not answer the request.
            self._requested_at = None if self._requested_at is None else step + 1
            self._proposed = self._taken = None
            self._superseded.clear()
            self._num_failed = 0
            self._change, self._last_target, self._num_failed_changes = None, 0, 0

    # --- another rule ----------------------------------------------------------------------------------------------

    def request_change(self, rule: Rule) -> None:
        """
        (deciding rank) Announce `rule` to all ranks. If `rule` holds already, repeat its announcement.

        Raises:
            UsageError: on a rank that does not decide.
        """
        if not self._decides:
            raise UsageError("request_change was called on a rank that does not decide; call it on the deciding rank")
        with self._lock:
            self._wanted, self._tell_again = rule, True

    def change_proposal(self, step: int, now_s: float) -> tuple[int, Rule] | None:
        """
        Return the change to announce to all ranks, and the step from which it holds. None if there is none, and always None on ranks that
        do not decide.

        At most one change is open at a time, until this rank has passed its step. Call it after ``due``.
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
            # Each change needs its own step, because a decline names only the step.
            target = self._ahead(step, self._num_failed_changes)
            self._last_target = target = max(target, self._last_target + self._stride)
            self._change = target, wanted
            return self._change

    def announce_change(self, target: int, rule: Rule) -> bool:
        """Accept an announced `rule` that holds from ``target`` on. False: this rank declines. Idempotent."""
        with self._lock:
            return self._rules.accept(target, rule, self._highest)

    def withdraw_change(self, target: int) -> None:
        """Withdraw the change at ``target`` that another rank declined, for the steps ahead of this rank."""
        with self._lock:
            self._rules.withdraw(target, self._highest)

    def declined_change(self, target: int) -> None:
        """(deciding rank) A rank declined the change at ``target``: propose again, further ahead."""
        with self._lock:
            self._rules.withdraw(target, self._highest)
            if self._change is not None and self._change[0] == target:
                self._change_failed()

    def _change_failed(self) -> None:
        self._change = None
        self._num_failed_changes = min(self._num_failed_changes + 1, _MAX_DOUBLINGS)

    # --- deciding --------------------------------------------------------------------------------------------------

    def _answer(self, step: int) -> Due:
        """The answer of ``due`` for a step. It depends only on the rules, the accepted announcements, and the previous step with a call."""
        rule = self._rules.at(step)
        trigger = rule.trigger
        before = self._gaps.get(step, step - 1)
        if step > 0 and bisect.bisect(self._accepted, before) < bisect.bisect(self._accepted, step):
            return Due.PERSIST
        if rule.suspended:
            return Due.NOT_DUE
        if step > 0 and trigger.period_steps and step // trigger.period_steps > before // trigger.period_steps:
            return Due.PERSIST
        if step > 0 and trigger.local_steps and step // trigger.local_steps > before // trigger.local_steps:
            return Due.LOCAL
        if trigger.snapshot_steps and step // trigger.snapshot_steps > before // trigger.snapshot_steps:
            return Due.SNAPSHOT
        return Due.NOT_DUE

    def _move(self, step: int, now_s: float) -> None:
        """Move to a step that is new to this rank. Note the distance and the time since the previous step."""
        if self._period_began_s is None:
            self._period_began_s = now_s
        before = self._previous
        if before is not None and before < step:
            self._strides.append(step - before)
            if step - before > 1:
                self._gaps[step] = before
                while len(self._gaps) > _MAX_REMEMBERED:
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
        self._num_failed = min(self._num_failed + 1, _MAX_DOUBLINGS)
