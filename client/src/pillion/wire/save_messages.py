"""
The messages of a save on the control channel, and of what is to hold on all ranks from a step on.

Producer and consumer: client and sidecar. Framing and compatibility: `wire.messages`. A `Request` names its answers.

    Reserve (ahead of the first) -> Claim -> Sealed | Abandon; the outcome is an event: `wire.events`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pillion.wire.message import Message, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved(Message):
    """The slots of the rank are large enough."""

    type: ClassVar[str] = "reserved"
    capacities: tuple[int, ...]
    """Bytes of each slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve(Request[Reserved]):
    """Have every slot of the rank hold a state of this size, ahead of its first save."""

    type: ClassVar[str] = "reserve"
    room_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(Message):
    """No slot is free yet; the answer comes later."""

    type: ClassVar[str] = "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed(Message):
    """The slot that the rank may fill."""

    type: ClassVar[str] = "claimed"
    slot: int
    capacity_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(Request[Waiting | Claimed]):
    """The rank wants to stage its state."""

    type: ClassVar[str] = "claim"
    step: int
    room_bytes: int
    persist: bool
    """False: a snapshot, for memory only."""
    destination: Mapping[str, Any] | None = None
    """Of a save that names its own: path, writer, and what DCP's call says besides."""
    notices: bool = False
    """The client knows `Waiting`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed(Message):
    """The rank's slot is whole."""

    type: ClassVar[str] = "sealed"
    step: int
    stall_s: float = 0.0
    """How long that held training up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon(Message):
    """The rank will not seal this step."""

    type: ClassVar[str] = "abandon"
    step: int
    persist: bool = True
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""
    gathers: bool = False
    """The trainers wait for the failures of all ranks: `wire.events.SaveFailures`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce(Message):
    """Rank 0 names a step that all ranks have ahead of them, for a save."""

    type: ClassVar[str] = "announce"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decline(Message):
    """The rank is past an announced step; or rank 0 takes the step back."""

    type: ClassVar[str] = "decline"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceChange(Message):
    """Rank 0 names the step from which on saves are due by another rule: `pillion.cadence`."""

    type: ClassVar[str] = "announce_change"
    step: int
    policy: Mapping[str, Any]
    """Trigger and suspend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclineChange(Message):
    """The rank is past the step of a change, or does not know the rule."""

    type: ClassVar[str] = "decline_change"
    step: int
