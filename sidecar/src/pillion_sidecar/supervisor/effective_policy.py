"""
The policy in force in a sidecar: the policy that it was started with, overridden by the newest one that the controller has sent. Pure.

Called from: `supervisor.session_policy`.
Must never: change what a running pod cannot change: its arena, its store, its storage, its own container. The next pod is injected with
these fields of a new policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from pillion.wire import policy

LIVE: Final = ("trigger", "retention", "restore", "drain", "suspend")
"""Fields of a policy that a running job takes over. `restore` takes effect when its trainers start again, even within the same pod."""
DEFERRED: Final = ("staging", "store", "storage", "sidecar")
"""Fields that only the next pod takes over. (`failurePolicy` concerns the injection alone.)"""


class EffectivePolicy:
    """The newest policy from the controller, if there is one, and its effect on the policy of the start."""

    def __init__(self) -> None:
        self.policy_generation = 0
        """Generation of the CheckpointPolicy in force. 0: the policy of the start."""
        self.changed = False
        """True once the controller has sent a policy that differs from the one in force."""
        self._newest: policy.Policy | None = None
        self._differing: frozenset[str] = frozenset()
        self._first: policy.Policy | None = None

    def current(self, started_with: policy.Policy) -> policy.Policy:
        """Return the policy in force in a sidecar that was started with `started_with`."""
        sent = self._newest
        if sent is None:
            return started_with
        return dataclasses.replace(
            started_with,
            trigger=sent.trigger,
            retention=sent.retention,
            restore=sent.restore,
            drain=sent.drain,
            suspend=sent.suspend,
        )

    def apply(self, sent: policy.Policy, policy_generation: int, started_with: policy.Policy) -> bool:
        """Put a policy from the controller in force. Return whether a live field has changed."""
        before = self.current(started_with)
        self._newest, self.policy_generation = sent, policy_generation
        is_new = self.current(started_with) != before
        self.changed = self.changed or is_new
        return is_new

    def deferred_fields(self, sent: policy.Policy, started_with: policy.Policy) -> frozenset[str]:
        """
        Return the changed fields that only the next pod takes over.

        Empty if the result is the same as at the last call, so that each change is logged once.
        """
        # The pod's annotations may have set its resources and its arena's size. So these are compared with the first policy sent.
        if self._first is None:
            self._first = sent
        base = dataclasses.replace(started_with, sidecar=self._first.sidecar, staging=self._first.staging)
        differing = frozenset(name for name in DEFERRED if getattr(base, name) != getattr(sent, name))
        new_fields = differing if differing != self._differing else frozenset()
        self._differing = differing
        return new_fields


def document(whole_policy: policy.Policy) -> dict[str, Any]:
    """Return the live fields of a policy, as trainers and other pods get them."""
    whole = policy.dump(whole_policy)
    return {name: whole[name] for name in LIVE}


def for_trainers(whole: Mapping[str, Any], auto_steps: int | None = None) -> dict[str, Any]:
    """
    Return a policy's document without fields that only the sidecar uses. An older client would refuse such an unknown field.

    Args:
        whole: the document.
        auto_steps: the period that takes the place of `trigger.auto`. None: there is none yet, and trainers make no save by a period.
    """
    drain = {name: value for name, value in whole.get("drain", {}).items() if name != "endTrainer"}
    sidecar = {name: value for name, value in whole.get("sidecar", {}).items() if name == "resources"}
    trigger = {name: value for name, value in whole.get("trigger", {}).items() if name != "auto"}
    if auto_steps is not None and "auto" in whole.get("trigger", {}):
        trigger["periodSteps"] = auto_steps
    return {**whole, "trigger": trigger, "drain": drain, "sidecar": sidecar}
