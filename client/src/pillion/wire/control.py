"""
The control channel: who a trainer is, what a process may ask, and all types that a sidecar takes.

Producer and consumer: client and sidecar. `wire.messages` frames the messages and says what breaks the contract; those of saves and loads are in
`wire.save_messages` and `wire.load_messages`, what a sidecar says unasked in `wire.events`. A `Request` names its answers; each may be answered
with `Failed` instead. A message that is no request has no answer.

A connection begins with `Hello`, and is then a trainer's, or with a message of `OBSERVED`, and may then send more of those only.
Whoever may open the socket may send them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pillion import wire
from pillion.wire.load_messages import Load, LoadDone
from pillion.wire.message import Message, Request, by_type
from pillion.wire.save_messages import Abandon, Announce, AnnounceChange, Claim, Decline, DeclineChange, Reserve, Sealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """The answer to any request that cannot be met."""

    type: ClassVar[str] = "failed"
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """The rank is one of the session's; where its memory is."""

    type: ClassVar[str] = "welcome"
    version: int = wire.PROTOCOL_VERSION
    policy: Mapping[str, Any]
    """The policy in force, without what concerns the pod only."""
    notices: bool = False
    """A claim that waits is answered with `Waiting` every few seconds."""
    gathers: bool = False
    """`Abandon.gathers` is understood."""
    segment: str
    """Path of the file that holds the rank's slots."""
    pid: int = 0
    executor_pid: int | None = None
    store: tuple[str, int] | None = None
    """Of the store that the coordinator's sidecar hosts; None: it hosts none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Request[Welcome]):
    """The first message of a trainer: who it is, and where its checkpoints go."""

    type: ClassVar[str] = "hello"
    version: int = wire.PROTOCOL_VERSION
    session: str
    """32 hex digits, the same on all ranks."""
    run_id: str
    attempt: int = 0
    rank: int
    world_size: int
    pods: tuple[tuple[int, ...], ...]
    """The ranks of each pod."""
    placement: str = ""
    """Which pod has which ranks, as 32 hex digits; empty: the client does not say."""
    pid: int = 0
    client: str = "an unknown place"
    """Where the client library lies."""
    root: str = ""
    policy: Mapping[str, Any] | str | None = None
    """Of a run without a cluster: the document, or the file's path."""
    store_mode: str | None = None
    """Which store the sidecars of several pods meet in; None: there is one pod."""
    store: tuple[str, int] | None = None
    """Host and port of the job's store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Farewell(Message):
    """The rank may end."""

    type: ClassVar[str] = "farewell"
    drained: bool = True
    """Whether all that it had sealed is done with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye(Request[Farewell]):
    """The rank ends; it is answered when its saves are done."""

    type: ClassVar[str] = "goodbye"
    drain_s: float = 0.0
    """How long that may take."""
    clean: bool = True
    """False: an exception ends it, and a restart may come for what is in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest(Message):
    """The newest committed checkpoint on storage."""

    type: ClassVar[str] = "latest"
    step: int | None = None
    """None: there is none."""
    path: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FindLatest(Request[Latest]):
    """What is the newest checkpoint on storage?"""

    type: ClassVar[str] = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status(Message):
    """The sidecar's counters and saves."""

    type: ClassVar[str] = "status"
    metrics: Mapping[str, Any]
    executor_pid: int | None
    pid: int
    draining: bool
    retaining: bool
    policy_generation: int
    saves: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStatus(Request[Status]):
    """How does the sidecar stand?"""

    type: ClassVar[str] = "status"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong(Message):
    """The supervisor's loop runs."""

    type: ClassVar[str] = "pong"
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping(Request[Pong]):
    """Does the supervisor's loop run?"""

    type: ClassVar[str] = "ping"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentPolicy(Message):
    """The policy in force in this sidecar."""

    type: ClassVar[str] = "policy"
    policy: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPolicy(Request[CurrentPolicy]):
    """Asked by ranks that are about to agree on who they are."""

    type: ClassVar[str] = "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notified(Message):
    """Said at once, before anything is done about it."""

    type: ClassVar[str] = "notified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify(Request[Notified]):
    """The pod is terminating: the trainers are asked for a save."""

    type: ClassVar[str] = "notify"


TRAINERS: Final = by_type(
    (
        *(Goodbye, Reserve, Claim, Sealed, Abandon, Load, LoadDone),
        *(Announce, Decline, AnnounceChange, DeclineChange, FindLatest, ReadStatus),
    )
)
"""What a trainer says after its `Hello`."""
OBSERVED: Final = by_type((Ping, ReadStatus, ReadPolicy, Notify))
"""What a process that is no trainer may say, without a hello."""
