"""
The executor's state of its session: ranks, pods, segments, the exchange, the generation; and opening that session.

Called from: `executor.worker` (opens it), `executor.save.persist`, `executor.load.restore` (use it). The executor has one session at a time. A
new session replaces it.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeVar

from pillion import fault_points
from pillion.errors import BarrierTimeout, SidecarError
from pillion.wire import control, events, names, policy
from pillion_sidecar import channel
from pillion_sidecar.arena import image
from pillion_sidecar.arena.growth import Growth
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.checkpoint import facts, milestones, ownership
from pillion_sidecar.executor.agreements import Agreements
from pillion_sidecar.executor.checked import Checked
from pillion_sidecar.executor.exchange import protocol, storage, store_client, tcpstore
from pillion_sidecar.executor.exchange.watchdog import Watchdog, WatchedExchange
from pillion_sidecar.executor.local_disk import LocalDisk
from pillion_sidecar.storage import opening
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.waits import WaitKind

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Context:
    """The state of one session in this executor. See the module."""

    session: str
    run_id: str
    world_size: int
    pods: tuple[tuple[int, ...], ...]
    local_ranks: tuple[int, ...]
    root: Folder | None
    """Folder with a folder for each step. None: each save names its own destination (`pillion.dcp`)."""
    segments: Mapping[int, Segment]
    """Rank -> its segment."""
    exchange: protocol.Exchange
    generation: int
    retention: policy.Retention
    restore: policy.Restore
    opener: opening.Opener
    """Opens folders with what the policy says of their kind. It has opened the root too, so that a folder in the root's bucket shares its clients."""
    peer_timeout_s: float
    persist_timeout_s: float
    write_threads: int
    watch: Watchdog
    limit_bytes: int = sys.maxsize
    """Maximum bytes of all slots of the pod together."""
    store_address: tuple[str, int] | None = None
    """Host and port of the store that this executor hosts. None: it hosts none."""
    agreed: Agreements = field(default_factory=Agreements)
    """Layouts and plans of this session."""
    metadata: dict[object, bytes] = field(default_factory=dict)
    """Coordinator: the last `.metadata`. It stays the same while plan and lengths stay the same."""
    finished_phases: list[str] = field(default_factory=list)
    """Phases of the last save. Their documents are deleted when every pod has arrived at the next save (`forget_finished`)."""
    finished_names: list[str] = field(default_factory=list)
    """Names of the last save under which nothing was posted, and a document published. It is deleted with the phases."""
    finished_loads: list[str] = field(default_factory=list)
    """Phases of the last load, which are deleted in the same way."""
    signal_store: store_client.Store | None = None
    """Separate store client for `broadcast`. None for a job of one pod."""
    stores: tuple[store_client.Store, ...] = ()
    """The store clients of this context, which `close` closes."""
    loads: int = 0
    """Number of loads that have begun. All ranks load together, so it is the same in every pod."""
    epoch: int = 0
    """Number of loads that have succeeded. The pods agree on each, so it is the same in every pod, even in one that missed a load."""
    rescues: int = 0
    """Number of rescues that were decided, even without some pod. The next rescue uses this number in its phases."""
    rescues_forgotten: int = 0
    """Coordinator: number of the first rescues whose documents are deleted from the exchange."""
    last_choice: tuple[str, dict[str, Any]] | None = None
    """Coordinator: phase and decision of the last rescue, as a pod may not have received it."""
    owner: str = ""
    """In a cluster: the object that owns the pods. It is written into the session's record and into each manifest."""
    lease: ownership.Lease | None = None
    """Coordinator: the sign of life of this session on the root."""
    not_shared: str = ""
    """Why nothing can be saved: this pod has another root than the coordinator. Empty: it has the same root."""
    known: facts.Known = field(default_factory=facts.Known)
    """Coordinator: what retention has seen of the root."""
    storage_refuses: bool = False
    """Coordinator: True if the last save failed after all its attempts. The next save then has one attempt."""
    store_lost: bool = False
    """True once the job's store is lost, so that the pods use the exchange on storage."""
    checked: Checked = field(default_factory=Checked)
    """What is verified of the snapshots in the arena. The executor's own, over its sessions."""
    disk: LocalDisk | None = None
    """The local disk of this pod, for copies of saves. None: the policy has none."""
    object_bytes: int | None = None
    """Size at which the current save cuts its files, as the coordinator has decided; see `Folder.object_bytes`."""
    sampled: str = ""
    """Id of the plan whose replicas this pod has already sent for a comparison with the other pods."""
    differing: tuple[str, list[str]] = ("", [])
    """Coordinator: id of the last compared plan, and the names whose values differed from pod to pod."""
    run: Mapping[str, Any] | None = None
    """Coordinator: the run's journal that was on the root when the session was opened. None: there was none."""
    seen_before_ns: int = 0
    """Coordinator: last sign of life of the session that owned the root before. 0: not known."""
    say: Callable[[events.Persisting], None] = lambda _: None
    """Tells the supervisor how far a long save is."""
    begun: tuple[tuple[str, str], set[str]] = (("", ""), set())
    """The last save of this executor (directory, generation in its file names), and the files that it has begun to write."""

    def __post_init__(self) -> None:
        self.growth = Growth(self.segments, self.limit_bytes)
        self.reader = image.Reader(num_ranks=len(self.segments))

    @property
    def first_rank(self) -> int:
        return self.local_ranks[0]

    @property
    def coordinator(self) -> bool:
        return self.first_rank == 0

    def close(self) -> None:
        """Close the store clients. The segments and the lease are closed by the worker, as `open_beside` shares them."""
        for each in self.stores:
            each.close()

    def forget_finished(self) -> None:
        """(coordinator) Delete what the last save has left in the exchange. Every pod has arrived at the next save."""
        self.exchange.forget(self.finished_phases)
        self.exchange.unpublish(self.finished_names)
        self.finished_phases, self.finished_names = [], []

    def phases_left(self) -> list[str]:
        """(coordinator) Return the phases that still have documents in the exchange at the end of the session."""
        return [*self.finished_phases, *self.finished_loads, "before", *self.rescue_phases(self.rescues + 1)]

    def published_left(self) -> list[str]:
        """(coordinator) Return the names that are still published at the end of the session."""
        return ["generation", *self.finished_names, *self.agreed.published()]

    def rescue_phases(self, end: int) -> list[str]:
        """(coordinator) Return the phases of rescues before number `end` whose documents are not deleted yet."""
        numbers = range(self.rescues_forgotten, end)
        return [f"rescue/{number}/{part}" for number in numbers for part in ("offer", "choice")]

    def begun_files(self, directory: str, generation: str) -> set[str]:
        """
        Return the set of files that this executor has begun to write for a save, and which it may write again and remove.

        The set lasts over several attempts, because a save whose store is lost begins again (`with_failover`).
        """
        if self.begun[0] != (directory, generation):
            self.begun = ((directory, generation), set())
        return self.begun[1]

    def own_root(self) -> Folder:
        """Return the root. Raises: SidecarError: this session has none."""
        if self.root is None:
            raise SidecarError("this session has no root: each of its saves and loads says where")
        return self.root

    def step_folder(self, step: int) -> Folder:
        """Return the folder of a step in the root. Raises: as `own_root`."""
        return self.own_root().below(names.step_directory(step))

    def open_folder(self, path_or_url: str) -> Folder:
        """Return a folder by its path or URL. Raises: SettingsError."""
        return self.opener.open(path_or_url)


def open_context(
    asked: channel.Open,
    watch: Watchdog,
    say: Callable[[events.Persisting], None] = lambda _: None,
    earlier: Mapping[int, Segment] = MappingProxyType({}),
) -> Context:
    """
    Open the session that the supervisor requests.

    If a predecessor of this executor had opened it, and the job's store does not answer any more, the pods use the exchange on storage.

    Args:
        asked: the supervisor's request.
        watch: watches the waits of the session.
        say: called with the progress of long saves.
        earlier: rank -> the segment that this executor had open for it in the session before.

    Blocks: up to tcpstore.CONNECT_TIMEOUT_S for the job's store, and the peer timeout for the coordinator's generation.

    Raises:
        OSError: a segment or the root does not exist.
        RuntimeError: the store does not answer (`store_client.StoreGone`).
        BarrierTimeout: the coordinator did not publish its generation in time.
    """
    session = asked.session
    session_policy = policy.parse(asked.policy, embedded=True)
    opener = opening.Opener(session_policy.storage.object_store, asked.storage_ca)
    root = opener.open(asked.root) if asked.root else None
    between, stores, address = _meet(asked, root, watch)
    lost = isinstance(between, storage.StorageExchange)
    segments = {rank: Segment.attach(path, earlier.get(rank)) for rank, path in asked.segments.items()}
    context = Context(
        session=session,
        run_id=asked.run_id,
        world_size=asked.world_size,
        pods=asked.pods,
        local_ranks=asked.local_ranks,
        root=root,
        segments=segments,
        exchange=WatchedExchange(
            between, watch, lambda: root is not None and not lost and storage.is_used(root, session)
        ),
        generation=0,
        retention=session_policy.retention,
        restore=session_policy.restore,
        opener=opener,
        peer_timeout_s=asked.peer_timeout_s,
        persist_timeout_s=asked.persist_timeout_s,
        write_threads=asked.write_threads,
        watch=watch,
        limit_bytes=asked.limit_bytes,
        store_address=address,
        signal_store=stores[-1] if stores else None,
        stores=stores,
        loads=asked.counts.loads,
        epoch=asked.counts.epoch,
        rescues=asked.counts.rescues,
        store_lost=lost,
        owner=asked.owner,
        disk=LocalDisk.open(asked) if asked.local and root is not None else None,
        say=say,
    )
    fault_points.serving(asked.local_ranks)
    # A hosted store has no clients yet: the welcome of rank 0 names its address, and that welcome waits for this function.
    context.generation = _agree_on_generation(context, asked)
    return context


_Meeting = tuple[protocol.SlicedExchange, tuple[store_client.Store, ...], tuple[str, int] | None]
"""The exchange; the store clients, the last one of which is for `broadcast`; and the address of the hosted store (None: none is hosted)."""


def _meet(asked: channel.Open, root: Folder | None, watch: Watchdog) -> _Meeting:
    """Return the exchange of this session: within one pod, in the job's store, or on storage if that store is lost."""
    first_rank = asked.local_ranks[0]
    if asked.store is None:
        return protocol.LocalExchange(first_rank), (), None
    if root is None or not asked.counts.store_lost:
        prefix = names.store_prefix(asked.run_id, asked.session)
        is_successor = asked.generation is not None
        try:
            return _meet_in_store(asked.store, prefix, asked.pods, first_rank, is_successor, watch)
        except RuntimeError as err:
            if not is_successor or root is None:
                raise
            _log.warning(
                "the job's store is lost, and the pods coordinate through storage from now on: %s",
                str(err).splitlines()[0],
            )
    return storage.StorageExchange(root, asked.session, asked.pods, first_rank), (), None


def _meet_in_store(
    store: channel.StoreAt,
    prefix: str,
    pods: Sequence[Sequence[int]],
    first_rank: int,
    is_successor: bool,
    watch: Watchdog,
) -> _Meeting:
    # The store of a new session may still be starting. A store that existed before answers at once, or is lost.
    timeout_s = min(tcpstore.CONNECT_TIMEOUT_S, watch.store_timeout_s) if is_successor else tcpstore.CONNECT_TIMEOUT_S
    # Watched, so that the pings name a store that does not answer, and for how long.
    watch.store("connect to the job's store", timeout_s)
    where = (store.host, store.port)
    own = store.kind is control.MeetingStore.OWN and first_rank == 0
    keep: Any = None
    if own:
        keep, view = tcpstore.host(where[0], prefix)
        where = (where[0], keep.port)
    else:
        view = tcpstore.connect(*where, prefix, timeout_s=timeout_s, look=watch.look)
    try:
        signal_store = tcpstore.connect(*where, prefix, timeout_s=timeout_s, look=watch.look)
    except BaseException:  # also a request to stop: nobody else has the first connection
        view.close()
        raise
    return tcpstore.StoreExchange(view, keep, pods, first_rank), (view, signal_store), where if own else None


def _agree_on_generation(context: Context, asked: channel.Open) -> int:
    """
    Return the session's generation. The coordinator claims one on the root, and publishes it; the other pods receive it.

    The successor of a dead executor takes its predecessor's, because its peers may be unreachable.
    """
    generation, before = asked.generation or 0, list(asked.before)
    if not context.coordinator:
        if generation:
            return generation  # without the store, which may be lost
        context.exchange.post("before", {"sessions": before})
        return _learn_generation(context, asked.name)
    if context.root is None:
        generation = generation or time.time_ns()
        context.exchange.publish("generation", {"generation": generation})
        return generation
    context.root.make()
    owners = ownership.rhythm(context.root, asked.owner_silent_s)
    own = ownership.Record(session=context.session, name=asked.name, root=str(context.root), owner=context.owner)
    if generation:
        record = ownership.read(context.root, generation) or own
    else:
        bound_s = context.watch.storage_timeout_s + owners.silent_s + ownership.MAX_DRAIN_S
        context.watch.begins(WaitKind.STORAGE, f"look who owns {context.root}", bound_s)
        generation, record = ownership.claim(
            context.root,
            own,
            before=before,
            silent_s=asked.owner_silent_s,
            succeeds=lambda owner: _served_before(context, owner),
        )
        context.watch.idle()
        storage.forget_sessions(context.root, but=context.session)
    context.watch.storage(f"read the journal of {context.root}")
    context.run = milestones.journal_of(context.root)
    context.seen_before_ns = ownership.seen_ns(context.root, generation - 1)
    context.watch.idle()
    context.lease = ownership.Lease(
        context.root,
        generation,
        record,
        beat_s=owners.beat_s,
        state=asked.state,
    )
    about = {"nonce": record.nonce, "root": str(context.root), "name": record.name}
    if context.disk is not None:
        about |= {"line": record.line}
        context.disk.take_up(record.line)
    context.exchange.publish("generation", {"generation": generation, **about})
    return generation


ASK_SHARE: Final = 1 / 4
"""Fraction of the peer timeout in which the other pods must name the sessions that they have served before."""


def _served_before(context: Context, owner: ownership.Record) -> bool:
    """(coordinator) Whether another pod of this job has served the owner of the root. Then the owner is an older attempt of this job."""
    if len(context.pods) == 1 or context.store_address is not None:
        return False  # there are no other pods, or they cannot connect before this executor hosts the store
    context.exchange.post("before", {"sessions": []})
    try:
        before = context.exchange.collect("before", context.peer_timeout_s * ASK_SHARE)
    except BarrierTimeout:
        return False
    return any(owner.session in document["sessions"] for document in before.values())


def _learn_generation(context: Context, name: str) -> int:
    """
    Return the generation that the coordinator has claimed.

    If this pod cannot read the coordinator's record on its root, it has another root; then `not_shared` is set.
    """
    answer = context.exchange.receive("generation", context.peer_timeout_s)
    generation, nonce = int(answer["generation"]), str(answer.get("nonce", ""))
    if nonce and context.root is not None:
        context.watch.storage(f"look for the record of the session on {context.root}")
        if not ownership.find_shared(context.root, generation, nonce):
            context.not_shared = (
                f"the pods do not share one root: {name or 'this pod'} (ranks {list(context.local_ranks)}) does not find at"
                f" {context.root} what {answer.get('name')} (rank 0) has written at {answer.get('root')}"
            )
            _log.error("%s", context.not_shared)
        context.watch.idle()
    if nonce and context.disk is not None:
        context.disk.take_up(str(answer.get("line", "")))
    return generation


def open_beside(context: Context, asked: channel.Open, watch: Watchdog) -> Context:
    """
    Return a context for what the executor does beside the operations of a session (`Upload`), with an exchange and agreements of its own.

    Args:
        context: the open session.
        asked: what it was opened with.
        watch: watches the work in the new context.

    Blocks: tcpstore.CONNECT_TIMEOUT_S for the job's store.

    Raises:
        RuntimeError: the store does not answer (`store_client.StoreGone`).
    """
    between: protocol.SlicedExchange
    stores: tuple[store_client.Store, ...] = ()
    session = f"{context.session}-{BESIDE}"
    lost = context.store_lost
    if asked.store is None:
        between = protocol.LocalExchange(context.first_rank)
    elif lost:
        between = storage.StorageExchange(context.own_root(), session, context.pods, context.first_rank)
    else:
        host, port = context.store_address or (asked.store.host, asked.store.port)
        watch.store("connect to the job's store", tcpstore.CONNECT_TIMEOUT_S)
        prefix = names.store_prefix(context.run_id, session)
        view = tcpstore.connect(host, port, prefix, timeout_s=tcpstore.CONNECT_TIMEOUT_S, look=watch.look)
        stores = (view,)
        between = tcpstore.StoreExchange(view, None, context.pods, context.first_rank)
        watch.idle()
    root = context.root
    return dataclasses.replace(
        context,
        session=session,
        exchange=WatchedExchange(
            between, watch, lambda: root is not None and not lost and storage.is_used(root, session)
        ),
        watch=watch,
        agreed=Agreements(),
        metadata={},
        finished_phases=[],
        finished_names=[],
        finished_loads=[],
        signal_store=None,
        stores=stores,
        lease=None,
        sampled="",
        differing=("", []),
        begun=(("", ""), set()),
        store_address=None,
    )


BESIDE: Final = "beside"
"""Suffix of the session's name in the exchange of `open_beside`: its phases are no other's."""


def with_failover(context: Context, operation: Callable[[], T]) -> T:
    """
    Run an operation. If the job's store is lost meanwhile, run it again from its start, with the exchange on storage.

    The store lives in one process of the job, so every pod loses it, and comes here by itself. If only one pod cannot reach the store, the
    others follow when their waits for that pod have failed (`WatchedExchange`).

    Raises:
        exchange.StoreLost: there is no root for the exchange (`pillion.dcp`).
    """
    try:
        return operation()
    except protocol.StoreLost as err:
        if context.store_lost or context.root is None:
            raise
        _log.warning("the job's store is lost, and the pods coordinate through storage from now on: %s", err)
        between = storage.StorageExchange(context.root, context.session, context.pods, context.first_rank)
        context.exchange = WatchedExchange(between, context.watch)
        context.store_lost = True
        context.finished_phases, context.finished_names, context.finished_loads = [], [], []
        # Values that are published once a session are published here again, for a pod whose executor is replaced later.
        context.agreed.move()
        if context.coordinator:
            context.exchange.publish("generation", {"generation": context.generation})
            if context.last_choice is not None:
                context.exchange.publish(*context.last_choice)
        return operation()


Progress = Callable[[channel.LoadBegun | channel.LoadMoved], None]
"""Function that reports the progress of a load to the supervisor."""
