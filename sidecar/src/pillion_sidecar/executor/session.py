"""
What one executor knows of its session: ranks, pods, segments, the exchange, the generation.

Called from: `executor.worker` (opens it), `executor.save.persist`, `executor.load.restore` (use it). One session at a time; a new one replaces it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from pillion import fault_points
from pillion.errors import BarrierTimeout
from pillion.wire import names, policy
from pillion_sidecar.arena import image
from pillion_sidecar.arena.growth import Growth
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.checkpoint import ownership
from pillion_sidecar.executor.agreements import Agreements
from pillion_sidecar.executor.exchange import protocol, storage
from pillion_sidecar.executor.exchange.watchdog import Watchdog, WatchedExchange
from pillion_sidecar.storage import folders
from pillion_sidecar.waits import WaitKind

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Context:
    """See the module."""

    session: str
    run_id: str
    world_size: int
    pods: tuple[tuple[int, ...], ...]
    local_ranks: tuple[int, ...]
    root: str
    segments: Mapping[int, Segment]
    """rank -> its segment."""
    exchange: protocol.Exchange
    generation: int
    retention: policy.Retention
    restore: policy.Restore
    peer_timeout_s: float
    persist_timeout_s: float
    write_threads: int
    watch: Watchdog
    limit_bytes: int = sys.maxsize
    """What the policy allows for all slots of the pod together."""
    store_address: tuple[str, int] | None = None
    """Where our own store listens; None when there is none or it is the job's."""
    agreed: Agreements = field(default_factory=Agreements)
    """Layouts and plans of this session."""
    metadata: dict[object, bytes] = field(default_factory=dict)
    """Coordinator: the last `.metadata`, which is the same as long as plan and lengths are."""
    finished_phases: list[str] = field(default_factory=list)
    """Phases of the last save, forgotten when every pod has arrived at the next one."""
    finished_loads: list[str] = field(default_factory=list)
    """Phases of the last load, likewise."""
    signal_store: Any = None
    """A client of its own for `signals`; None within one pod."""
    loads: int = 0
    """Loads of this session that were begun: all ranks load together, so the number is the same in every pod."""
    epoch: int = 0
    """Loads that ended well: the pods agreed on each, so this is the same in every pod even after a load that one never joined."""
    rescues: int = 0
    """Rescues that were decided, also those that some pod was missing from: the number to meet under in the next one."""
    rescues_forgotten: int = 0
    """Coordinator: of these, the first ones whose keys are gone from the exchange."""
    last_choice: tuple[str, dict[str, Any]] | None = None
    """Coordinator: what the last rescue decided, and under which phase: a pod may not have heard it."""
    owner: str = ""
    """In a cluster the object that the pods belong to; it goes into the record of the session and into each manifest."""
    lease: ownership.Lease | None = None
    """Coordinator: what shows on the root that this session lives."""
    not_shared: str = ""
    """Why nothing can be saved: this pod has another root than the coordinator."""
    storage_refuses: bool = False
    """Coordinator: the last save was given up after all its tries; the next one gets one."""
    store_lost: bool = False
    """The pods meet on storage."""
    sampled: str = ""
    """The plan whose replicas this pod has sent for a comparison with the other pods'."""
    differing: tuple[str, list[str]] = ("", [])
    """Coordinator: the plan that was compared last, and the names whose values differed from pod to pod then."""
    begun: tuple[tuple[str, str], set[str]] = (("", ""), set())
    """The save that this executor wrote last (directory, what its file names carry), and the names that it has begun to write."""

    def __post_init__(self) -> None:
        self.growth = Growth(self.segments, self.limit_bytes)
        self.reader = image.Reader(num_ranks=len(self.segments))

    @property
    def first_rank(self) -> int:
        return self.local_ranks[0]

    @property
    def coordinator(self) -> bool:
        return self.first_rank == 0

    def phases_left(self) -> list[str]:
        """(coordinator) Where the pods still have documents in the exchange when the session ends."""
        return [*self.finished_phases, *self.finished_loads, "before", *self.rescue_phases(self.rescues + 1)]

    def published_left(self) -> list[str]:
        """(coordinator) What is still published then."""
        return ["generation", *self.agreed.published()]

    def rescue_phases(self, end: int) -> list[str]:
        """(coordinator) Those of the rescues before number `end` whose keys are still there."""
        numbers = range(self.rescues_forgotten, end)
        return [f"rescue/{number}/{part}" for number in numbers for part in ("offer", "choice")]

    def begun_files(self, directory: str, generation: str) -> set[str]:
        """
        Names of the files that this executor has begun to write for a save: what it may write again, and remove.

        Kept from one try to the next: a save whose store is lost begins again from its start (`with_failover`).
        """
        if self.begun[0] != (directory, generation):
            self.begun = ((directory, generation), set())
        return self.begun[1]

    def step_path(self, step: int) -> str:
        return os.path.join(self.root, names.step_directory(step))


def open_context(document: Mapping[str, Any], watch: Watchdog) -> Context:
    """
    Open a session from the supervisor's document.

    The successor of an executor that had opened it meets the other pods on storage when the job's store does not answer any more.

    Blocks: up to stores.CONNECT_TIMEOUT_S for the job's store, and the peer timeout for the coordinator's generation.

    Raises:
        OSError: a segment or the root is not there.
        RuntimeError: the store does not answer (torch.distributed.DistError).
        BarrierTimeout: the coordinator's pod did not come.
    """
    pods = tuple(tuple(int(rank) for rank in pod) for pod in document["pods"])
    local_ranks = tuple(int(rank) for rank in document["local_ranks"])
    root, session = str(document["root"]), str(document["session"])
    between, signal_store, address = _meet(document, pods, local_ranks[0], watch)
    lost = isinstance(between, storage.StorageExchange)
    segments = {int(rank): Segment.attach(str(path)) for rank, path in document["segments"].items()}
    session_policy = policy.parse(document["policy"], embedded=True)
    context = Context(
        session=session,
        run_id=str(document["run_id"]),
        world_size=int(document["world_size"]),
        pods=pods,
        local_ranks=local_ranks,
        root=root,
        segments=segments,
        exchange=WatchedExchange(between, watch, lambda: not lost and storage.is_used(root, session)),
        generation=0,
        retention=session_policy.retention,
        restore=session_policy.restore,
        peer_timeout_s=float(document["peer_timeout_s"]),
        persist_timeout_s=float(document["persist_timeout_s"]),
        write_threads=int(document["write_threads"]),
        watch=watch,
        limit_bytes=int(document["limit_bytes"]),
        store_address=address,
        signal_store=signal_store,
        loads=int(document.get("loads", 0)),
        epoch=int(document.get("epoch", 0)),
        rescues=int(document.get("rescues", 0)),
        store_lost=lost,
        owner=str(document.get("owner", "")),
    )
    fault_points.serving(local_ranks)
    # An own store has no peers yet when it opens: its address travels with the welcome that waits for this.
    context.generation = _agree_on_generation(context, document)
    return context


_Meeting = tuple[protocol.SlicedExchange, Any, tuple[str, int] | None]
"""The exchange, the client of messages to all pods, and where our own store listens."""


def _meet(document: Mapping[str, Any], pods: Sequence[Sequence[int]], first_rank: int, watch: Watchdog) -> _Meeting:
    """The way in which the pods of this session agree: within one pod, in the job's store, or on storage when that store is lost."""
    store, root, session = document["store"], str(document["root"]), str(document["session"])
    if store is None:
        return protocol.LocalExchange(first_rank), None, None
    if not (document.get("store_lost") and root):
        prefix = names.store_prefix(str(document["run_id"]), session)
        is_successor = document.get("generation") is not None
        try:
            return _meet_in_store(store, prefix, pods, first_rank, is_successor, watch)
        except RuntimeError as err:
            if not is_successor or not root:
                raise
            _log.warning(
                "the job's store is lost, and the pods coordinate through storage from now on: %s",
                str(err).splitlines()[0],
            )
    return storage.StorageExchange(root, session, pods, first_rank), None, None


def _meet_in_store(
    store: Mapping[str, Any],
    prefix: str,
    pods: Sequence[Sequence[int]],
    first_rank: int,
    is_successor: bool,
    watch: Watchdog,
) -> _Meeting:
    from pillion_sidecar.executor.exchange import tcpstore  # torch: 3 s and 300 MB that a single pod does not pay

    # A new session's store may still be on its way; one that was there answers, or is lost.
    timeout_s = min(tcpstore.CONNECT_TIMEOUT_S, watch.store_timeout_s) if is_successor else tcpstore.CONNECT_TIMEOUT_S
    # torch's own bound does not hold when the store's process is stopped: the kernel takes the connection, and nobody greets.
    watch.store("connect to the job's store", timeout_s)
    where = (str(store["host"]), int(store["port"]))
    own = store["mode"] == "own" and first_rank == 0
    keep: Any
    if own:
        keep, view = tcpstore.host(where[0], prefix)
        where = (where[0], keep.port)
    else:
        keep, view = tcpstore.connect(*where, prefix, timeout_s=timeout_s)
    _, signal_store = tcpstore.connect(*where, prefix, timeout_s=timeout_s)
    return tcpstore.StoreExchange(view, keep, pods, first_rank), signal_store, where if own else None


def _agree_on_generation(context: Context, document: Mapping[str, Any]) -> int:
    """The coordinator's, or, for a successor of an executor that died, its predecessor's: one that may have lost touch with the others."""
    predecessor = document.get("generation")
    generation = predecessor if isinstance(predecessor, int) and predecessor > 0 else 0
    before = [str(each) for each in document.get("before", [])]
    if not context.coordinator:
        if generation:
            return generation  # nothing is asked of a store that may be lost
        context.exchange.post("before", {"sessions": before})
        return _learn_generation(context, str(document.get("name", "")))
    if not context.root:
        generation = generation or time.time_ns()
        context.exchange.publish("generation", {"generation": generation})
        return generation
    folders.make(context.root)
    silent_s = float(document["owner_silent_s"])
    ours = ownership.Record(session=context.session, name=str(document["name"]), root=context.root, owner=context.owner)
    if generation:
        record = ownership.read(context.root, generation) or ours
    else:
        bound_s = context.watch.storage_timeout_s + silent_s + ownership.DRAIN_MOST_S
        context.watch.begins(WaitKind.STORAGE, f"look who owns {context.root}", bound_s)
        generation, record = ownership.claim(
            context.root, ours, before=before, silent_s=silent_s, succeeds=lambda owner: _was_ours(context, owner)
        )
        context.watch.idle()
        storage.forget_sessions(context.root, but=context.session)
    context.lease = ownership.Lease(
        context.root,
        generation,
        record,
        beat_s=silent_s / ownership.BEATS_WITHIN_SILENCE,
        state=ownership.State(document.get("state", ownership.State.TRAINING)),
    )
    about = {"nonce": record.nonce, "root": context.root, "name": record.name}
    context.exchange.publish("generation", {"generation": generation, **about})
    return generation


ASK_SHARE: Final = 1 / 4
"""Of the bound for peers: how long the other pods may take to say which session they served before."""


def _was_ours(context: Context, owner: ownership.Record) -> bool:
    """(coordinator) Whether another pod of this job has served the owner of the root: it is an older attempt, which is fenced off."""
    if len(context.pods) == 1 or context.store_address is not None:
        return False  # nobody to ask, or nobody yet: they come when our own store is there
    context.exchange.post("before", {"sessions": []})
    try:
        before = context.exchange.collect("before", context.peer_timeout_s * ASK_SHARE)
    except BarrierTimeout:
        return False
    return any(owner.session in document["sessions"] for document in before.values())


def _learn_generation(context: Context, name: str) -> int:
    """What the coordinator claimed; this pod reads its record back, or has another root than the coordinator."""
    answer = context.exchange.receive("generation", context.peer_timeout_s)
    generation, nonce = int(answer["generation"]), str(answer.get("nonce", ""))
    if nonce and context.root:
        context.watch.storage(f"look for the record of the session on {context.root}")
        if not ownership.find_shared(context.root, generation, nonce):
            context.not_shared = (
                f"the pods do not share one root: {name or 'this pod'} (ranks {list(context.local_ranks)}) does not find at"
                f" {context.root} what {answer.get('name')} (rank 0) has written at {answer.get('root')}"
            )
            _log.error("%s", context.not_shared)
        context.watch.idle()
    return generation


def with_failover(context: Context, operation: Callable[[], T]) -> T:
    """
    Run an operation; when the job's store is lost meanwhile, once more from its start with the pods meeting on storage.

    The store lives in one process of the job, so that it is lost for every pod: each of them comes here by itself. One that
    alone cannot reach it any more is followed by the others, when they have waited for it in vain (`WatchedExchange`).

    Raises:
        exchange.StoreLost: there is no root to meet on (`pillion.dcp`).
    """
    try:
        return operation()
    except protocol.StoreLost as err:
        if context.store_lost or not context.root:
            raise
        _log.warning("the job's store is lost, and the pods coordinate through storage from now on: %s", err)
        between = storage.StorageExchange(context.root, context.session, context.pods, context.first_rank)
        context.exchange = WatchedExchange(between, context.watch)
        context.store_lost = True
        context.finished_phases, context.finished_loads = [], []
        # What was published once a session lies in the store: a pod whose executor is replaced will look for it here.
        context.agreed.move()
        if context.coordinator:
            context.exchange.publish("generation", {"generation": context.generation})
            if context.last_choice is not None:
                context.exchange.publish(*context.last_choice)
        return operation()


Progress = Callable[[Mapping[str, Any]], None]
"""Sends an event of the running operation to the supervisor."""
