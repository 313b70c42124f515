"""
The messages of a load on the control channel.

Producer and consumer: client and sidecar. Framing and compatibility: `wire.messages`. A `Request` names the classes of its answers.

The answers to a `Load` are `LoadBegin`, `LoadProgress` (several) and `Loaded`. If a checkpoint is corrupt, they begin again with another
`LoadBegin`. The client ends the load with `LoadDone`. A `Load` with `find` is answered with `Loaded` only.

A read without a state dict is several loads: one with `find` and `whole`, whose answer has the content of the checkpoint, then one load
with `whole` for each part of that content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from pillion.wire.message import Message, Request


class Tier(StrEnum):
    """Source of a load."""

    ARENA = "arena"
    """A snapshot in the memory of the pods."""
    LOCAL = "local"
    """Copies on the disks of the nodes. Some of the pods may have read it from their memory."""
    STORAGE = "storage"
    """A committed checkpoint."""
    FRESH = "fresh"
    """There is no checkpoint: the training starts from nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaqueLeaves:
    """Location of a rank's opaque leaves, in the order of its layout."""

    file: str = ""
    """Path. Empty if the rank has no opaque leaf."""
    starts: tuple[int, ...] = ()
    """Offset of each leaf in the file, in bytes."""
    lengths: tuple[int, ...] = ()
    """Length of each leaf, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBegin(Message):
    """Begins the load of a checkpoint. Earlier copies of this load do not count."""

    type: ClassVar[str] = "load_begin"
    tier: Tier
    slot: int
    """Index of the slot in which the rank finds its items."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """FQN -> dtype in the slot, if it differs from the requested dtype."""
    missing: tuple[str, ...] = ()
    """FQNs that the checkpoint lacks. The layout of the slot does not have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress(Message):
    """Reports which items the trainer may copy."""

    type: ClassVar[str] = "load_progress"
    upto: int
    """Number of complete items, in the order of the layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Message):
    """Ends a load: everything is verified. For a `Load` with `find`: names the checkpoint that a load would take."""

    type: ClassVar[str] = "loaded"
    step: int | None = None
    """None: there is nothing to load."""
    tier: Tier
    path: str = ""
    """Directory of the checkpoint on storage. A sidecar of an earlier release ignores `Load.path`, which shows here."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Corrupt checkpoints that were skipped: location -> reason."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Newer snapshots in memory that not all pods could use: location -> reason."""
    set_aside: tuple[int, ...] = ()
    """Committed steps ahead of the loaded one."""
    unexpected: tuple[str, ...] = ()
    """FQNs in the checkpoint that no rank requested."""
    alike: bool = True
    """Whether the load has the same differences on all ranks."""
    differing: tuple[str, ...] = ()
    """FQNs whose values differed from rank to rank at the save. Storage has the lowest rank's value."""
    opaque: OpaqueLeaves = OpaqueLeaves()
    remarks: Mapping[str, Any] = field(default_factory=dict)
    """What rank 0's script said about the save: the document of `wire.remarks`."""
    content: str | None = None
    """For `find` with `whole`: the encoded `wire.layout` of all that the checkpoint has below `Load.prefixes`, each tensor as one item.
    None: not asked for, or there is no checkpoint, or the sidecar is of an earlier release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Request[LoadBegin | LoadProgress | Loaded]):
    """Requests a load. All ranks load together, so the load begins when each of them has sent this message."""

    type: ClassVar[str] = "load"
    step: int | None = None
    """None: the newest checkpoint."""
    path: str | None = None
    """Directory of the checkpoint to load. None: a checkpoint of the root, or of memory."""
    below: bool = False
    """True: `path` may also be the root of a run. Then `step`, or the newest checkpoint below it, is loaded."""
    layout: str
    """Encoded `wire.layout` of the rank's load targets."""
    strict: bool = True
    """False: the checkpoint may lack requested names."""
    find: bool = False
    """True: only choose and name the checkpoint that a load would take."""
    whole: bool = False
    """True: the layout has whole tensors, whatever ranks hold them. The load changes nothing: not the newest checkpoint, not its branch."""
    prefixes: tuple[str, ...] = ()
    """For `find` with `whole`: the dotted names whose content is wanted. Empty: all."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """For `find` with `whole`: checkpoints that earlier reads have found corrupt: location -> reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDone(Message):
    """Reports that the rank has copied its items. Saves may use its slots again."""

    type: ClassVar[str] = "load_done"
