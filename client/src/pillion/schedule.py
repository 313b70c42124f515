"""
When a save of a Checkpointer is due: the cadence of this rank, and the messages by which all ranks agree on a step.

Called from: `Checkpointer` (on the training thread), and the thread that listens to the sidecar (`events`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from pillion import cadence, rule_timeline
from pillion.session import Session
from pillion.wire import events, policy, save_messages
from pillion.wire.message import Message

_log = logging.getLogger(__name__)

LEAD_LOCAL_S: Final = 0.25
LEAD_PODS_S: Final = 2.0
"""Lead of an announced save, within a pod and across pods. The announcement must reach every rank before the step."""

NO_TRIGGER: Final = (
    "pillion: the policy asks for no saves, so due() will not either: give it trigger.periodSteps, periodSeconds or auto (the argument policy, or"
    " the file that PILLION_POLICY names). What the script saves without asking due() is saved"
)


class Schedule:
    """
    The saves that are due. See the module.

    Args:
        session: this rank's session.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._decides = session.group.rank == 0
        self._policy = session.policy
        self._cadence = cadence.Cadence(
            rule_timeline.Rule(self._policy.trigger, self._policy.suspend),
            decides=self._decides,
            lead_s=LEAD_LOCAL_S if len(session.group.pods) == 1 else LEAD_PODS_S,
        )
        self.warns_of_no_trigger = self._decides and not _has_trigger(self._policy.trigger)
        """Whether the next `due` warns that the policy asks for no saves. A caller that saves of its own accord sets it to False."""
        self.events: Mapping[type[Message], Callable[[Any], None]] = {
            events.Announced: self._announced,
            events.Declined: self._declined,
            events.SaveNow: lambda _: self._cadence.request_save(),
            events.PolicyChanged: self._policy_changed,
            events.ChangeAnnounced: self._change_announced,
            events.ChangeDeclined: self._change_declined,
        }
        """What each message of the sidecar does."""

    @property
    def drain_timeout_s(self) -> float:
        """How long a closing session waits for its saves, by the newest policy."""
        return self._policy.drain.timeout_seconds

    def due(self, step: int) -> bool:
        """Return whether a save is due at this step, and pass on what the other ranks must know for it. Blocks: never."""
        if self.warns_of_no_trigger:
            self.warns_of_no_trigger = False
            _log.warning(NO_TRIGGER)
        now_s = time.monotonic()
        answer = self._cadence.due(step, now_s)
        proposal = self._cadence.proposal(step, now_s)
        if proposal is not None:
            self._session.send(save_messages.Announce(step=proposal))
        recalled = self._cadence.recalled(step)
        if recalled is not None:
            self._session.send(save_messages.Decline(step=recalled))
        change = self._cadence.change_proposal(step, now_s)
        if change is not None:
            self._session.send(save_messages.AnnounceChange(step=change[0], policy=_rule_document(change[1])))
        return answer is not cadence.Due.NOT_DUE

    def tier(self, step: int) -> cadence.Due:
        """Return where a save at this step goes, if its caller does not say: to storage, unless the policy says memory or the local disk."""
        due = self._cadence.due(step, time.monotonic())
        return cadence.Due.PERSIST if due is cadence.Due.NOT_DUE else due

    def saved(self, step: int) -> None:
        """Note a save to storage."""
        self._cadence.saved(step, time.monotonic())

    def loaded(self, step: int) -> None:
        """Note a load."""
        self._cadence.loaded(step, time.monotonic())

    def _announced(self, event: events.Announced) -> None:
        if not self._cadence.announce(event.step):
            self._session.send(save_messages.Decline(step=event.step))

    def _declined(self, event: events.Declined) -> None:
        if self._decides:
            self._cadence.declined(event.step)
        else:
            self._cadence.withdraw(event.step)

    def _change_announced(self, event: events.ChangeAnnounced) -> None:
        rule = _rule(event.policy)
        # A rule that this release cannot read is declined, so that no rank follows it.
        if rule is None or not self._cadence.announce_change(event.step, rule):
            self._session.send(save_messages.DeclineChange(step=event.step))

    def _change_declined(self, event: events.ChangeDeclined) -> None:
        if self._decides:
            self._cadence.declined_change(event.step)
        else:
            self._cadence.withdraw_change(event.step)

    def _policy_changed(self, event: events.PolicyChanged) -> None:
        """Take over the sidecar's new policy. A new trigger holds from a step that rank 0 announces."""
        now = _read(event.policy)
        if now is None:
            return
        self._policy = dataclasses.replace(self._policy, drain=now.drain)
        if self._decides:
            self._cadence.request_change(rule_timeline.Rule(now.trigger, now.suspend))


def _has_trigger(trigger: policy.Trigger) -> bool:
    """Whether a trigger asks for any save by itself."""
    periods = (trigger.period_steps, trigger.period_seconds, trigger.auto, trigger.snapshot_steps, trigger.local_steps)
    return any(each is not None for each in periods)


def _read(document: Mapping[str, Any]) -> policy.Policy | None:
    try:
        return policy.parse(document, embedded=True)
    except policy.PolicyError as err:
        _log.warning("pillion: ignored a policy change that this release cannot use: %s", err)
        return None


def _rule(document: Mapping[str, Any]) -> rule_timeline.Rule | None:
    changed = _read(document)
    return None if changed is None else rule_timeline.Rule(changed.trigger, changed.suspend)


def _rule_document(rule: rule_timeline.Rule) -> dict[str, object]:
    whole = policy.dump(policy.Policy(trigger=rule.trigger, suspend=rule.suspended))
    return {name: whole[name] for name in ("trigger", "suspend")}
