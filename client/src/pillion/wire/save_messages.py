"""
The messages of a save on the control channel; and the announcements of rank 0, which all ranks follow from a step on.

Producer and consumer: client and sidecar. Framing and compatibility: `wire.messages`. A `Request` names the classes of its answers.

    Reserve (before the first save) -> Claim -> Sealed | Abandon; the outcome is an event: `wire.events`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pillion.wire.message import Message, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWriter:
    """A third-party DCP `StorageWriter`, which the executor makes as ``Class(**arguments)``."""

    name: str
    """``module:Class``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Destination of a save that does not go to the root."""

    path: str | None = None
    """Directory, or an address that the writer understands. None: the writer's arguments have it."""
    writer: NamedWriter | None = None
    """None: Pillion's own writer."""
    overwrite: bool = True
    """False: the save fails if `path` has a checkpoint already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved(Message):
    """Reports that the rank's slots are large enough."""

    type: ClassVar[str] = "reserved"
    capacities: tuple[int, ...]
    """Bytes of each slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve(Request[Reserved]):
    """Requests that every slot of the rank has room for a state of this size, before its first save."""

    type: ClassVar[str] = "reserve"
    room_bytes: int
    """Bytes of each slot, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Message):
    """Reports that no slot is free yet. Another answer follows."""

    type: ClassVar[str] = "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed(Message):
    """Grants a slot, which the rank may fill."""

    type: ClassVar[str] = "claimed"
    slot: int
    capacity_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Request[Waiting | Claimed]):
    """Requests a slot for the rank's state."""

    type: ClassVar[str] = "claim"
    step: int
    room_bytes: int
    """Bytes that the state needs in the slot."""
    persist: bool
    """False: a snapshot, which stays in memory."""
    local: bool = False
    """True: also to the nodes' disks, for a snapshot. A save that is persisted goes there anyway, if the policy has a local disk."""
    destination: Destination | None = None
    """Destination of a save by `pillion.dcp`. None: the root."""
    notices: bool = False
    """Whether the client understands `Waiting`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed(Message):
    """Reports that the rank has sealed its slot."""

    type: ClassVar[str] = "sealed"
    step: int
    stall_s: float = 0.0
    """Seconds that the save held up training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon(Message):
    """Reports that the rank will not seal this step."""

    type: ClassVar[str] = "abandon"
    step: int
    persist: bool = True
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""
    gathers: bool = False
    """Whether the trainers wait for the failures of all ranks (`wire.events.SaveFailures`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce(Message):
    """Announces a save at a step that all ranks have ahead of them. Rank 0 sends it."""

    type: ClassVar[str] = "announce"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decline(Message):
    """Declines an announced save, because the rank is past its step. Rank 0 sends it to recall the announcement."""

    type: ClassVar[str] = "decline"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceChange(Message):
    """Announces another rule for saves, and the step from which it holds (`pillion.cadence`). Rank 0 sends it."""

    type: ClassVar[str] = "announce_change"
    step: int
    policy: Mapping[str, Any]
    """The rule: `trigger` and `suspend` of a policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclineChange(Message):
    """Declines an announced rule, because the rank is past its step or cannot read the rule."""

    type: ClassVar[str] = "decline_change"
    step: int
