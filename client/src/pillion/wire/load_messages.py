"""
The messages of a load on the control channel.

Producer and consumer: client and sidecar. Framing and compatibility: `wire.messages`. A `Request` names its answers.

A `Load` is answered with `LoadBegin` and `LoadProgress`, again from `LoadBegin` on where a checkpoint turns out corrupt, and with
`Loaded`; the client ends it with `LoadDone`. One that only looks is answered with `Loaded` at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pillion.wire.message import Message, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBegin(Message):
    """The checkpoint that is loaded from here on; what was copied before counts for nothing."""

    type: ClassVar[str] = "load_begin"
    tier: str = ""
    slot: int
    """Where the rank finds its items."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """FQN -> dtype in the slot, where it is another than the wanted one."""
    missing: tuple[str, ...] = ()
    """FQNs that the checkpoint does not have; they are left out of the layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress(Message):
    """Items that may be copied."""

    type: ClassVar[str] = "load_progress"
    upto: int
    """Number of items, in the order of the layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Message):
    """The load is done, or was a question and is answered."""

    type: ClassVar[str] = "loaded"
    step: int | None = None
    """None: there is nothing to load."""
    tier: str
    path: str = ""
    """Directory; a sidecar of before that loads from the root says so here."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Where a corrupt checkpoint was met -> why it was passed over."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """The same of newer ones that not all pods could use."""
    set_aside: tuple[int, ...] = ()
    """Committed steps that are ahead of what is loaded."""
    unexpected: tuple[str, ...] = ()
    """FQNs that the checkpoint has and nobody wants."""
    alike: bool = True
    """Whether all ranks of the checkpoint had the same values."""
    differing: tuple[str, ...] = ()
    """FQNs of which storage keeps one rank's value of several."""
    opaque: Mapping[str, Any] = field(default_factory=dict)
    """Where the opaque leaves are: `file`, `starts`, `lengths`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Request[LoadBegin | LoadProgress | Loaded]):
    """All ranks load together: nothing begins before each of them has asked."""

    type: ClassVar[str] = "load"
    step: int | None = None
    """None: the newest."""
    path: str | None = None
    """The one checkpoint in this directory."""
    layout: str
    """`wire.layout`: what the rank wants filled."""
    strict: bool = True
    """False: names may be missing."""
    find: bool = False
    """Only choose, and say what a load would take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDone(Message):
    """The rank has copied what it wanted: its slots may be used again."""

    type: ClassVar[str] = "load_done"
