"""
The events of the control channel: what a sidecar says to its trainers unasked.

Producer: the sidecar. Consumer: `pillion.session`, and what opened it. Framing and compatibility: `wire.messages`. An event of a type that
the client does not know is passed over.

When a rank cannot stage a save, the sidecar sends `SaveFailed` to the other ranks at once. If that rank's `Abandon` has `gathers`, the event has
`more`, and `SaveFailures` follows within seconds: to all ranks, with the failures of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pillion.wire.message import Message, by_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Message):
    """A save is on storage, or, for memory only, sealed on every rank."""

    type: ClassVar[str] = "committed"
    step: int
    path: str
    size_bytes: int = 0
    persist_s: float = 0.0
    commit_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Message):
    """A save made no checkpoint."""

    type: ClassVar[str] = "save_failed"
    step: int
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""
    more: bool = False
    """Other ranks may have failed, too: `SaveFailures` tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailures(Message):
    """The failures of all ranks that could not stage a step."""

    type: ClassVar[str] = "save_failures"
    step: int
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveNow(Message):
    """To rank 0: somebody wants a save, at a step that all ranks have ahead of them."""

    type: ClassVar[str] = "save_now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced(Message):
    """Rank 0 has named a step for a save."""

    type: ClassVar[str] = "announced"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Declined(Message):
    """A rank is past an announced step: no rank saves at it."""

    type: ClassVar[str] = "declined"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChanged(Message):
    """The policy has changed: trigger, retention, drain and suspend as they are now."""

    type: ClassVar[str] = "policy"
    policy: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeAnnounced(Message):
    """Rank 0 has named the step from which on saves are due by another rule."""

    type: ClassVar[str] = "change_announced"
    step: int
    policy: Mapping[str, Any]
    """Trigger and suspend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeDeclined(Message):
    """A rank is past the step of a change, or does not know the rule: it holds on no rank."""

    type: ClassVar[str] = "change_declined"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Message):
    """A text for the trainer's log."""

    type: ClassVar[str] = "notice"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Message):
    """The pod ends and the last save is on storage: a trainer without a SIGTERM handler of its own ends (`pillion.stopping`)."""

    type: ClassVar[str] = "end"


EVENTS: Final = by_type(
    (
        *(Committed, SaveFailed, SaveFailures, SaveNow, Announced, Declined),
        *(PolicyChanged, ChangeAnnounced, ChangeDeclined, Notice, End),
    )
)
"""All of them, by type."""
