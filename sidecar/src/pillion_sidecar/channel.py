"""
The channel between supervisor and executor: one class for each of its messages. Framing: `pillion.wire.messages`; encoding: `pillion.wire.codec`.

Producer and consumer: the supervisor (`supervisor.executor_client`, `supervisor.executor_process`) and `executor.worker`. Both are processes of one
sidecar and of one release, so that no message has to be understood by another.

    taken at once, beside a running save:  Ping, Over, Show, Signal
    taken one at a time, in their order:   Warm, Open, Persist, Withdraw, Rescue, Retain, Load, Verify
    taken one at a time, beside these:     Upload

A request names its answer; or it is `Failed`. What the executor says unasked is one of `EVENTS`, which have no `id`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, cast

from pillion.wire import control, events, home, policy
from pillion.wire.load_messages import LoadBegin, LoadProgress, OpaqueLeaves, Tier
from pillion.wire.message import Message, Request, by_type
from pillion.wire.messages import BadFrame
from pillion.wire.save_messages import Destination
from pillion_sidecar.session.record import Counts
from pillion_sidecar.session.state import State
from pillion_sidecar.waits import Wait

Order = tuple[int, int]
"""Generation and epoch: see `checkpoint.commit.Order`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCopy:
    """A save that every local rank has on the node's disk: see `copies.head.Copy`."""

    step: int
    order: Order


# --- answers -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Message):
    """What answers a request."""

    counts: Counts | None = None
    """What a successor of this executor has to go on with. None: no session is open, or the answer came beside what the executor does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Answer):
    """The answer to any request that cannot be met."""

    type: ClassVar[str] = "failed"
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Answer):
    """It is done, and there is nothing to say of it."""

    type: ClassVar[str] = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong(Answer):
    """The executor lives."""

    type: ClassVar[str] = "pong"
    wait: Wait | None = None
    """Of all that it waits for, what is nearest to its bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Answer):
    """The session is open. `run` (coordinator): `journal`, the run's on the root; `seen_ns`, the last sign of life of the session before."""

    type: ClassVar[str] = "opened"
    generation: int
    store: tuple[str, int] | None = None
    """Host and port of the store that this executor hosts; None: it hosts none."""
    signals: int | None = None
    """Number of the last signal before the session was opened; None: there are no other pods to hear from."""
    run: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Persisted(Answer):
    """A save is on storage; or, for memory only, sealed on every rank."""

    type: ClassVar[str] = "persisted"
    step: int = -1
    """(an upload) Which save it is."""
    path: str = ""
    """Directory; empty where it stays in memory, or where a writer alone knows."""
    size_bytes: int = 0
    persist_s: float
    """Until this pod's bytes were durable."""
    commit_s: float = 0.0
    """From then until the checkpoint was visible."""
    order: Order | None = None
    """Under which it was committed; None: under that of its seal."""
    differing: tuple[str, ...] = ()
    """FQNs of which storage keeps one rank's value of several."""
    held: bool = False
    """Every pod has it on its local disk, and it is not on storage yet."""
    unheld: str = ""
    """Why it is not on the local disks although it should be. The save went on without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed(Answer):
    """What every pod does after a rescue was agreed on."""

    type: ClassVar[str] = "agreed"
    step: int | None = None
    """To persist. None: nothing is left to do."""
    persisted: tuple[int, ...] = ()
    """Steps that all pods hold and some pod knows to be committed."""
    calls: tuple[str, ...] = ()
    """Names of the calls that are answered with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained(Answer):
    """A slice of retention is over. `more`: something may be left. `over_quota`: why what stays has too many bytes; empty: it has not."""

    type: ClassVar[str] = "retained"
    more: bool
    over_quota: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified(Answer):
    """A verification has ended."""

    type: ClassVar[str] = "verified"
    whole: bool
    """Whether all of the snapshot matched its digests. False: it did not, has none, or another request came before the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Answer):
    """A load is done, or was a question and is answered."""

    type: ClassVar[str] = "loaded"
    step: int | None = None
    """None: there is nothing to load."""
    tier: Tier
    path: str = ""
    """Directory; empty for a snapshot in memory."""
    order: Order = (0, 0)
    """When it was committed, or sealed."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Tier and step of a corrupt checkpoint -> why it was passed over."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """The same of newer ones that not all pods could use."""
    set_aside: tuple[int, ...] = ()
    """Committed steps that are ahead of what is loaded."""
    opaque: Mapping[int, OpaqueLeaves] = field(default_factory=dict)
    """Local rank -> where it finds its opaque leaves."""
    unexpected: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Local rank -> FQNs that the checkpoint has and nobody wants."""
    alike: bool = True
    """Whether all ranks of the job have the same to say of their load."""
    differing: tuple[str, ...] = ()
    """FQNs of which storage keeps one rank's value of several."""
    remarks: Mapping[str, Any] = field(default_factory=dict)
    """What the script said about the save: the document of `wire.remarks`; and when the save began (0: nobody knows)."""
    saved_ns: int = 0
    content: str | None = None
    """For a question with `whole`: the encoded layout of what the checkpoint has; see `wire.load_messages`."""


# --- requests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping(Request[Pong]):
    """Do you live, and what do you wait for?"""

    type: ClassVar[str] = "ping"


@dataclass(frozen=True, slots=True, kw_only=True)
class Over(Request[Done]):
    """A session has ended: whatever is done for it leaves its waits for other pods."""

    type: ClassVar[str] = "over"
    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Show(Request[Done]):
    """Have the session's record on its root say what its trainers do."""

    type: ClassVar[str] = "show"
    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal(Request[Done]):
    """Tell every pod of the job, this one too."""

    type: ClassVar[str] = "signal"
    message: Mapping[str, Any]
    """The document of one of `supervisor.signals`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm(Request[Done]):
    """Import what the next session needs: torch takes seconds."""

    type: ClassVar[str] = "warm"
    modules: tuple[str, ...]
    """Below the package `executor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAt:
    """Where the pods of a session meet."""

    kind: control.MeetingStore
    host: str
    port: int
    """0: the kernel picks a free one, in the pod that hosts the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Request[Opened]):
    """Open this session, in the place of the one before."""

    type: ClassVar[str] = "open"
    session: str
    name: str = ""
    """Who trains here, for people."""
    owner: str = ""
    """In a cluster the object that the pods belong to."""
    owner_silent_s: float
    """How long the owner of the root may be silent before it is taken for dead."""
    run_id: str
    world_size: int
    pods: tuple[tuple[int, ...], ...]
    """The ranks of each pod."""
    local_ranks: tuple[int, ...]
    root: str
    """Where checkpoints go; empty: each save says it."""
    storage_ca: str
    """Path of the authorities that are trusted beside the system's, for a bucket; empty: none."""
    store: StoreAt | None
    """None: there is one pod."""
    local: str = ""
    """Directory of this job's copies on a disk of the node; empty: there is none."""
    segments: Mapping[int, str]
    """Local rank -> path of its segment."""
    limit_bytes: int
    """What the policy allows for all slots of the pod together."""
    policy: Mapping[str, Any]
    """The policy in force, as `pillion.wire.policy` dumps it."""
    peer_timeout_s: float
    persist_timeout_s: float
    storage_timeout_s: float
    store_timeout_s: float
    write_threads: int
    state: State = State.TRAINING
    before: tuple[str, ...] = ()
    """The sessions that this pod served before it, the last one first."""
    generation: int | None = None
    """What a predecessor of this executor had agreed on with the other pods; None: nobody has."""
    signals: int | None = None
    """Number of the last signal that a predecessor has passed on; None: what comes from now on is passed on."""
    counts: Counts = field(default_factory=Counts)
    """How far a predecessor has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist(Request[Persisted]):
    """Bring a sealed save to storage; or, for memory only, agree with the other pods that all of them hold it."""

    type: ClassVar[str] = "persist"
    step: int
    slot: int
    persist: bool
    """False: a snapshot, for memory only."""
    local: bool = False
    """Write it to the local disks. If all pods can, that is all: an `Upload` brings it to storage."""
    destination: Destination | None = None
    """None: the policy's."""
    sequence: int = 0
    """Distinguishes saves to one directory; 0 where each step has its own."""
    retention: policy.Retention
    """As it is now: it may have changed since the session was opened."""
    started_ns: int = 0
    """When the save began, wall clock; 0: nobody knows."""
    cause: home.Cause = home.Cause.PERIODIC
    """What made it due."""
    rescued: bool = False
    """It was a snapshot for memory only, and its trainers are gone."""
    run: Mapping[str, Any] | None = None
    repeated: bool = False
    """Another executor may have begun it: peers may be ahead by an attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload(Request[Persisted]):
    """Bring a local copy to storage, beside what else the executor does. All pods upload the copy that the coordinator chooses."""

    type: ClassVar[str] = "upload"
    session: str
    number: int
    """Number of the upload in the session. All pods have the same number, because they do all uploads together."""
    copy: LocalCopy | None
    """(coordinator) The copy. (other pods) None, or the copy that a predecessor of this executor was told."""
    repeated: bool = False
    """Another executor may have begun it."""
    retention: policy.Retention
    run: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw(Request[Done]):
    """This pod has no part in a save: tell the others. It is answered with the failures that all pods then know."""

    type: ClassVar[str] = "withdraw"
    step: int
    persist: bool
    rescued: bool
    error: Mapping[str, Any]
    """`pillion.errors.ErrorDocument`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescue(Request[Agreed]):
    """Agree with the other pods on the snapshot that all of them persist: see `executor.save.rescue`."""

    type: ClassVar[str] = "rescue"
    held: tuple[int, ...]
    """Steps that this pod holds whole, oldest first."""
    persisted: tuple[int, ...]
    """Those of them that are committed."""
    born: Mapping[int, Order]
    """Step -> when it was filled: one step of two branches is not one snapshot."""
    calls: tuple[str, ...]
    """Names of the calls that this pod has heard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retain(Request[Retained]):
    """(coordinator) Remove what the policy does not keep, for a while."""

    type: ClassVar[str] = "retain"
    current: int
    """The step whose commit it is owed for."""
    slice_s: float
    retention: policy.Retention


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """A whole snapshot of another world, left where it is until its slot is needed: trainers that start again find it again."""

    step: int
    world_size: int
    order: Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Request[Loaded]):
    """Fill what the local ranks want from the checkpoint that the pods agree on; or only say which one that would be."""

    type: ClassVar[str] = "load"
    step: int | None = None
    """None: the newest."""
    path: str | None = None
    """The one checkpoint in this directory."""
    below: bool = False
    """The directory may be the root of a run: then `step`, or the newest, in it."""
    strict: bool = True
    """False: names may be missing."""
    find: bool = False
    """Only choose: read nothing, fill nothing."""
    whole: bool = False
    """Whole tensors, from all local ranks together; nothing else changes by it."""
    prefixes: tuple[str, ...] = ()
    """Of a question with `whole`: the dotted names that are wanted; empty: all."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Tier and step of checkpoints that are corrupt already -> why."""
    layouts: Mapping[int, str] = field(default_factory=dict)
    """Local rank -> what it wants filled (`wire.layout`)."""
    arena: Mapping[int, int]
    """Step -> slot that every local rank has sealed."""
    orders: Mapping[int, Order]
    """Step -> when it was sealed, or committed."""
    strangers: tuple[Stranger, ...] = ()
    spare_slot: int
    """A slot that may be filled; `arena.slots.NO_SLOT`: one is taken once the pods have agreed on what to fill it with."""
    near: Mapping[int, int] = field(default_factory=dict)
    """Local rank -> process of its trainer, which memory for it is to be near to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify(Request[Verified]):
    """The trainers are gone: compare a snapshot with its digests until the next request comes. See `executor.checked`."""

    type: ClassVar[str] = "verify"
    session: str
    step: int
    slot: int


# --- events --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBegun(Message):
    """A rank finds what it wants in this slot: see `wire.load_messages`."""

    type: ClassVar[str] = "load_begun"
    rank: int
    begin: LoadBegin
    fills: bool = False
    """The slot is filled for this load: what it held is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMoved(Message):
    """A rank may copy more."""

    type: ClassVar[str] = "load_moved"
    rank: int
    progress: LoadProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLost(Message):
    """The store that the pods of a session met in is gone."""

    type: ClassVar[str] = "store_lost"
    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard(Message):
    """Some pod of the job has sent a signal to all."""

    type: ClassVar[str] = "heard"
    number: int
    """They come in the order of their numbers."""
    message: Mapping[str, Any]
    """The document of one of `supervisor.signals`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesFound(Message):
    """The node's disk has copies of this session that are to go to storage."""

    type: ClassVar[str] = "copies_found"
    session: str
    copies: tuple[LocalCopy, ...]
    """Oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadChosen(Message):
    """The pods have agreed on the copy that an upload brings to storage."""

    type: ClassVar[str] = "upload_chosen"
    number: int
    copy: LocalCopy


REQUESTS: Final = by_type(
    (Ping, Over, Show, Signal, Warm, Open, Persist, Upload, Withdraw, Rescue, Retain, Load, Verify)
)
EVENTS: Final = by_type((LoadBegun, LoadMoved, events.Persisting, StoreLost, Heard, CopiesFound, UploadChosen))


def read_request(body: Mapping[str, Any]) -> Request[Any]:
    """(executor) Return what the supervisor asks. Raises BadFrame: no request is of this type, or one of its fields is wrong."""
    return cast("Request[Any]", _read(REQUESTS, body))


def read_answer(request: Request[Any], body: Mapping[str, Any]) -> Answer:
    """(supervisor) Return what the executor answers to a request. Raises BadFrame, as `read_request` does."""
    return cast("Answer", _read({**request.answers(), Failed.type: Failed}, body))


def read_event(body: Mapping[str, Any]) -> Message:
    """(supervisor) Return what the executor says unasked. Raises BadFrame, as `read_request` does."""
    return _read(EVENTS, body)


def _read(kinds: Mapping[str, type[Message]], body: Mapping[str, Any]) -> Message:
    kind = kinds.get(body["type"])
    if kind is None:
        raise BadFrame(f"the message {body['type']!r:.80} is none of {', '.join(kinds)}")
    return kind.from_document(body)
