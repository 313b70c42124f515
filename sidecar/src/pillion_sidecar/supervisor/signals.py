"""
The signals: messages that one sidecar of a job sends to all sidecars of the job, through the executors and the job's store.

Producer and consumer: `supervisor.trainers`, which forwards events to the trainers of its pod.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pillion.wire import events
from pillion.wire.message import Message, by_type


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySent(Message):
    """Puts a policy from the controller in force in every pod. The coordinator's sidecar sends it."""

    type: ClassVar[str] = "policy"
    policy_generation: int
    policy: Mapping[str, Any]
    """The live fields; see `effective_policy`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueCalled(Message):
    """Calls all pods to a rescue, because a pod cannot make another snapshot. They persist the newest one that all of them hold."""

    type: ClassVar[str] = "rescue"
    id: str
    """Id of the call. One rescue answers it."""


SIGNALS: Final = by_type(
    (
        *(events.Announced, events.Declined, events.ChangeAnnounced, events.ChangeDeclined, events.SaveNow),
        *(PolicySent, RescueCalled),
    )
)
"""All signals, by type."""
