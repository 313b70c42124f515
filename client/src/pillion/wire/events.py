"""
The events of the control channel: messages from a sidecar to its trainers that answer no request.

Producer: the sidecar. Consumer: `pillion.session`, and the opener of the session. Framing and compatibility: `wire.messages`. The client ignores
events of an unknown type.

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
    """Reports that a save is committed on storage. For a snapshot: that every rank has sealed it."""

    type: ClassVar[str] = "committed"
    step: int
    path: str
    size_bytes: int = 0
    persist_s: float = 0.0
    commit_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held(Message):
    """Reports that every pod has a save on its node's disk. Its commit follows."""

    type: ClassVar[str] = "held"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Persisting(Message):
    """Reports how far a long save is. At most one in `pillion.progress.AGAIN_S` for each save."""

    type: ClassVar[str] = "persisting"
    step: int
    written_bytes: int
    """Bytes of this pod that are on their way to storage or there."""
    size_bytes: int
    """Bytes of this pod's share."""
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Message):
    """Reports that a save failed: it made no checkpoint."""

    type: ClassVar[str] = "save_failed"
    step: int
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""
    more: bool = False
    """True: other ranks may have failed as well. `SaveFailures` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailures(Message):
    """Has the failures of all ranks that could not stage a step."""

    type: ClassVar[str] = "save_failures"
    step: int
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveNow(Message):
    """Requests a save from rank 0, which chooses a step that all ranks have ahead of them."""

    type: ClassVar[str] = "save_now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced(Message):
    """Reports that rank 0 has announced a save at a step."""

    type: ClassVar[str] = "announced"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Declined(Message):
    """Reports that a rank is past an announced step. No rank saves at it."""

    type: ClassVar[str] = "declined"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChanged(Message):
    """Has the new trigger, retention, drain and suspend of a changed policy."""

    type: ClassVar[str] = "policy"
    policy: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeAnnounced(Message):
    """Reports that rank 0 has announced another rule for saves, and the step from which it holds."""

    type: ClassVar[str] = "change_announced"
    step: int
    policy: Mapping[str, Any]
    """The rule: `trigger` and `suspend` of a policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeDeclined(Message):
    """Reports that a rank declined a change, because it is past the step or cannot read the rule. No rank follows the change."""

    type: ClassVar[str] = "change_declined"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Message):
    """Has a text for the trainer's log."""

    type: ClassVar[str] = "notice"
    text: str
    routine: bool = False
    """True: information. False: a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Message):
    """
    Reports that the pod ends and the last save is on storage.

    A trainer without its own SIGTERM handler then ends (`pillion.stopping`).
    """

    type: ClassVar[str] = "end"


EVENTS: Final = by_type(
    (
        *(Committed, Held, Persisting, SaveFailed, SaveFailures, SaveNow, Announced, Declined),
        *(PolicyChanged, ChangeAnnounced, ChangeDeclined, Notice, End),
    )
)
"""All events, by type."""
