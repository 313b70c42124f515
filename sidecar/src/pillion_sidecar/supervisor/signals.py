"""
The whole of: what the sidecars of a job tell each other, each of them all: through the executors, over the job's store.

Producer and consumer: `supervisor.trainers`. What trainers have to know of it goes on to them as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pillion.wire import events
from pillion.wire.message import Message, by_type


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySent(Message):
    """The coordinator's sidecar has the policy from the controller: it holds in every pod from here on."""

    type: ClassVar[str] = "policy"
    generation: int
    policy: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueCalled(Message):
    """A pod cannot make another snapshot: all persist the newest one that all of them hold."""

    type: ClassVar[str] = "rescue"
    id: str
    """Of the call: it is answered once."""


SIGNALS: Final = by_type(
    (
        *(events.Announced, events.Declined, events.ChangeAnnounced, events.ChangeDeclined, events.SaveNow),
        *(PolicySent, RescueCalled),
    )
)
"""All of them, by type."""
