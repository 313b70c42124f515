"""
The whole of: the policy that a sidecar goes by: what it was started with, and over it what the controller has said since.

Called from: the supervisor. Pure.
Must never: change what a running pod cannot change: its arena, its store, its storage, its own container. Those parts of a new policy
wait for the next pod, which is injected with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from pillion.wire import policy

LIVE: Final = ("trigger", "retention", "restore", "drain", "suspend")
"""Fields of a policy that a running job takes up; `restore` at the next start of its trainers, also within the pod."""
LATER: Final = ("staging", "store", "storage", "sidecar")
"""Fields that the next pod takes up. `failurePolicy` is about the injection itself."""


class EffectivePolicy:
    """See the module."""

    def __init__(self) -> None:
        self.generation = 0
        """Of the CheckpointPolicy that holds; 0: as the sidecar was started."""
        self.changed = False
        """Whether the controller has ever said another one than before."""
        self._told: policy.Policy | None = None
        self._differing: frozenset[str] = frozenset()
        self._first_told: policy.Policy | None = None

    def over(self, started_with: policy.Policy) -> policy.Policy:
        """The policy in force, for a session that begins or goes on."""
        sent = self._told
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

    def take(self, sent: policy.Policy, generation: int, started_with: policy.Policy) -> bool:
        """A policy as it is now; whether anything that is taken up is other than it was."""
        before = self.over(started_with)
        self._told, self.generation = sent, generation
        is_new = self.over(started_with) != before
        self.changed = self.changed or is_new
        return is_new

    def later(self, sent: policy.Policy, started_with: policy.Policy) -> frozenset[str]:
        """Fields that wait for the next pod, when they are others than at the call before; else none."""
        # The pod's annotations may have changed its resources and its arena's size: there only a later change counts.
        if self._first_told is None:
            self._first_told = sent
        base = dataclasses.replace(started_with, sidecar=self._first_told.sidecar, staging=self._first_told.staging)
        differing = frozenset(name for name in LATER if getattr(base, name) != getattr(sent, name))
        news = differing if differing != self._differing else frozenset()
        self._differing = differing
        return news


def document(whole_policy: policy.Policy) -> dict[str, Any]:
    """What trainers and other pods are told of a policy."""
    whole = policy.dump(whole_policy)
    return {name: whole[name] for name in LIVE}


def for_trainers(whole: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's document without what is no trainer's business: a client of before would refuse a field that it does not know."""
    drain = {name: value for name, value in whole.get("drain", {}).items() if name != "endTrainer"}
    sidecar = {name: value for name, value in whole.get("sidecar", {}).items() if name == "resources"}
    return {**whole, "drain": drain, "sidecar": sidecar}
