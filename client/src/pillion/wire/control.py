"""
The messages of the control channel that begin and end a session, or read the sidecar's state; and the list of all messages to a sidecar.

Producer and consumer: client and sidecar. `wire.messages` frames the messages and says what breaks the contract. The messages of saves and
loads are in `wire.save_messages` and `wire.load_messages`, the sidecar's events in `wire.events`. A `Request` names the classes of its
answers. Any request may be answered with `Failed` instead. Other messages have no answer.

A trainer's connection begins with `Hello`. Any other connection begins with a message of `OBSERVED`, and may send only those. Every process
that may open the socket may send them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final

from pillion import wire
from pillion.wire.load_messages import Load, LoadDone
from pillion.wire.message import Message, Request, by_type
from pillion.wire.save_messages import Abandon, Announce, AnnounceChange, Claim, Decline, DeclineChange, Reserve, Sealed


class MeetingStore(StrEnum):
    """Store that the sidecars of several pods use to agree."""

    PREFIX = "prefix"
    """A prefix of the job's own store."""
    OWN = "own"
    """A separate store, which the coordinator's sidecar hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Message):
    """Answers any request that failed."""

    type: ClassVar[str] = "failed"
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """Accepts a rank into the session, and names the file with its slots."""

    type: ClassVar[str] = "welcome"
    version: int = wire.PROTOCOL_VERSION
    policy: Mapping[str, Any]
    """The policy in force, without the fields that concern only the pod."""
    notices: bool = False
    """Whether a waiting claim is answered with `Waiting` every few seconds."""
    gathers: bool = False
    """Whether the sidecar understands `Abandon.gathers`."""
    segment: str
    """Path of the file with the rank's slots."""
    pid: int = 0
    executor_pid: int | None = None
    store: tuple[str, int] | None = None
    """Host and port of the store that this sidecar hosts, as the coordinator's. None: it hosts none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Request[Welcome]):
    """Introduces a trainer: its rank, its session, and the root of its checkpoints. It is the first message of the connection."""

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
    """Digest of which pod has which ranks, 32 hex digits. Empty: a client that does not send it."""
    pid: int = 0
    client: str = "an unknown place"
    """Directory of the client library."""
    root: str = ""
    policy: Mapping[str, Any] | str | None = None
    """Policy of a run without a cluster: a document, or the path of a file."""
    store_mode: MeetingStore | None = None
    """Store that the sidecars of several pods use. None: there is one pod."""
    store: tuple[str, int] | None = None
    """Host and port of the job's store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Farewell(Message):
    """Tells a rank that it may end."""

    type: ClassVar[str] = "farewell"
    drained: bool = True
    """Whether the outcome of each of its sealed saves is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye(Request[Farewell]):
    """Announces that a rank wants to end. The answer comes when its saves are done."""

    type: ClassVar[str] = "goodbye"
    drain_s: float = 0.0
    """Timeout for its saves, seconds."""
    clean: bool = True
    """False: an exception ends the rank. A restart may need the snapshots in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest(Message):
    """Names the newest committed checkpoint on storage."""

    type: ClassVar[str] = "latest"
    step: int | None = None
    """None: there is no checkpoint."""
    path: str = ""
    size_bytes: int = 0
    remarks: Mapping[str, Any] = field(default_factory=dict)
    """What rank 0's script said about the save: the document of `wire.remarks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FindLatest(Request[Latest]):
    """Requests the newest committed checkpoint on storage."""

    type: ClassVar[str] = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Untold(Message):
    """Has the commits that no script was told of."""

    type: ClassVar[str] = "untold"
    checkpoints: tuple[Latest, ...] = ()
    """Oldest commit first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FindUntold(Request[Untold]):
    """Requests the commits that no script was told of. Rank 0 sends it, if its script wants to be told."""

    type: ClassVar[str] = "untold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Message):
    """Confirms `Told`."""

    type: ClassVar[str] = "noted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told(Request[Noted]):
    """Reports that the script was told of the commit of a step. It is noted on the root."""

    type: ClassVar[str] = "told"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status(Message):
    """Has the sidecar's counters and its saves."""

    type: ClassVar[str] = "status"
    metrics: Mapping[str, Any]
    executor_pid: int | None
    pid: int
    draining: bool
    retaining: bool
    policy_generation: int
    saves: tuple[Mapping[str, Any], ...]
    root: str = ""
    """Root of the session's checkpoints. Empty: there is no session, or an older sidecar answers."""
    run_id: str = ""
    world_size: int = 0
    local_ranks: tuple[int, ...] = ()
    """Ranks of this pod."""
    connected_ranks: tuple[int, ...] = ()
    """Ranks of this pod whose trainers are connected now."""
    interval: str = ""
    """The automatic interval and its reason, for people. Empty: there is none."""
    problems: tuple[str, ...] = ()
    """What is wrong now with storage or memory, for people."""
    failures: tuple[str, ...] = ()
    """The last failures of saves and loads, for people, oldest first."""
    release: str = ""
    """Release of the sidecar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStatus(Request[Status]):
    """Requests the sidecar's counters and saves."""

    type: ClassVar[str] = "status"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong(Message):
    """Shows that the supervisor's event loop runs."""

    type: ClassVar[str] = "pong"
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping(Request[Pong]):
    """Asks whether the supervisor's event loop runs."""

    type: ClassVar[str] = "ping"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentPolicy(Message):
    """Has the policy in force in this sidecar. None before a session."""

    type: ClassVar[str] = "policy"
    policy: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPolicy(Request[CurrentPolicy]):
    """Requests the policy in force. Rank 0 sends it before it opens its session."""

    type: ClassVar[str] = "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notified(Message):
    """Confirms `Notify`, before the save begins."""

    type: ClassVar[str] = "notified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify(Request[Notified]):
    """Reports that the pod is terminating. The sidecar then requests a save from the trainers."""

    type: ClassVar[str] = "notify"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequested(Message):
    """Says how far a requested save is."""

    type: ClassVar[str] = "save_requested"
    progress: str
    """A `pillion.wire.home.Progress`."""
    step: int = -1
    """Step of the save. -1: none has begun."""
    message: str = ""
    """Why the request failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSave(Request[SaveRequested]):
    """Requests a save from the trainers; with the `request` of an earlier one, only asks how far that is."""

    type: ClassVar[str] = "request_save"
    request: str = ""
    """Id of the request, chosen by the asker. A sidecar keeps the last 64."""


TRAINERS: Final = by_type(
    (
        *(Goodbye, Reserve, Claim, Sealed, Abandon, Load, LoadDone),
        *(Announce, Decline, AnnounceChange, DeclineChange, FindLatest, FindUntold, Told, ReadStatus),
    )
)
"""Messages of a trainer after its `Hello`."""
OBSERVED: Final = by_type((Ping, ReadStatus, ReadPolicy, Notify, RequestSave))
"""Messages of a process that is not a trainer. They need no hello."""
