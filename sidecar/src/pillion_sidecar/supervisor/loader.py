"""
Loads of one pod: waits for the requests of all local ranks, reserves a slot, runs the executor's load, and forwards its progress.

Called from: the supervisor. A load is collective. If a rank does not request it in time, the load fails on all ranks, and the error names
that rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging

from pillion.errors import ErrorDocument, LoadError, PillionError, UsageError
from pillion.wire import load_messages
from pillion.wire.load_messages import Tier
from pillion_sidecar import channel
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import NO_SLOT, Save
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.settings import Settings
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import destinations
from pillion_sidecar.supervisor.executor_client import ExecutorClient, SessionOver
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.trainers import Trainers
from pillion_sidecar.supervisor.uploader import Uploader

_log = logging.getLogger(__name__)
LoadRequest = tuple[TrainerConnection, load_messages.Load]
"""A rank's request, and the connection to answer it on."""


class Loader:
    """The loads of this pod, one at a time. See the module."""

    def __init__(
        self,
        own_settings: Settings,
        trainers: Trainers,
        executor_client: ExecutorClient,
        persister: Persister,
        uploader: Uploader,
        sidecar_status: SidecarStatus,
    ) -> None:
        self._settings = own_settings
        self._trainers = trainers
        self._executor_client = executor_client
        self._persister = persister
        self._uploader = uploader
        self._sidecar_status = sidecar_status
        self._requests: dict[int, LoadRequest] = {}
        """Requests of the next load, by rank, until all ranks have sent one."""
        self._running: dict[int, LoadRequest] = {}
        """Requests of the load that the executor works on."""
        self._reading: set[int] = set()
        """Ranks that still copy from a slot."""
        self._pinned: list[Save] = []
        self._lent: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._slot_free = asyncio.Event()
        self._tasks = tasks.BackgroundTasks()

    async def ask(self, client: TrainerConnection, load: load_messages.Load) -> None:
        """
        Take a rank's request. The load begins with the request of the last rank.

        Raises:
            UsageError: the request differs from those of other ranks, or names a directory that is not allowed.
        """
        for peer, request in self._requests.values():
            if _words(request) != _words(load):
                raise UsageError(
                    f"rank {client.rank} calls {_words(load)}, rank {peer.rank} {_words(request)}: all ranks make the same call"
                )
        pod = self._trainers.pod
        if pod is None:
            raise UsageError("no session is open")
        if load.path is not None and not self._settings.embedded:
            source = pod.policy.restore.source
            destinations.check_source(load.path, root=pod.identity.root, below=load.below, source=source)
        self._requests[client.rank] = (client, load)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._settings.peer_timeout_s, self._timeout)
        if set(self._requests) == set(pod.segments):
            self._timer.cancel()
            self._timer = None
            requests, self._requests = self._requests, {}
            self._tasks.start(self._run(requests), "loading")

    def _timeout(self) -> None:
        self._timer = None
        pod = self._trainers.pod
        requests, self._requests = self._requests, {}
        missing = sorted(set(pod.segments if pod is not None else ()) - set(requests))
        waited = self._settings.peer_timeout_s
        error = LoadError(f"ranks {missing} did not ask to load within {waited:.1f} s; load is called on all ranks")
        for client, load in requests.values():
            client.refuse(load.id, error)

    def rank_lost(self, rank: int) -> None:
        """Drop the request of a rank whose trainer is gone, and release its slot."""
        self._requests.pop(rank, None)
        if not self._requests and self._timer is not None:
            # The timeout begins with the first request, so the next load needs a new timer.
            self._timer.cancel()
            self._timer = None
        self.done(rank)

    def done(self, rank: int) -> None:
        """Note that a rank has copied its items. After the last rank, the slots are released."""
        self._reading.discard(rank)
        if not self._reading:
            self._release()

    def slot_released(self) -> None:
        self._slot_free.set()

    def begun(self, event: channel.LoadBegun) -> None:
        """Forward to a rank in which slot it finds its items."""
        pod = self._trainers.pod
        if event.fills and pod is not None:
            # The reserved slot. If none was reserved, the executor has chosen one.
            self._lent = event.begin.slot
            pod.table.take(event.begin.slot)
        self._forward(event.rank, event.begin)

    def moved(self, event: channel.LoadMoved) -> None:
        """Forward to a rank how many items it may copy."""
        self._forward(event.rank, event.progress)

    def _forward(self, rank: int, answer: load_messages.LoadBegin | load_messages.LoadProgress) -> None:
        if rank in self._running:
            client, load = self._running[rank]
            client.answer(load.id, answer)

    async def _run(self, requests: dict[int, LoadRequest]) -> None:
        pod = self._trainers.pod
        try:
            if pod is None:
                raise UsageError("no session is open")
            # A save in flight may become the newest checkpoint, so it is finished first.
            await self._persister.quiet(self._settings.persist_timeout_s, uploads=False)
            self._release()
            # Snapshots in the arena can be ordered only after the session has its generation; see PodArena.date. The load itself reports
            # a failure.
            with contextlib.suppress(PillionError):
                await self._executor_client.open(pod)
            first = next(iter(requests.values()))[1]
            if first.find:
                await self._find(pod, requests, first)
                return
            # The slot comes before the pins. The only pod of a job, with two slots, may give up its older snapshot for the load.
            self._lent = await self._lend()
            self._pinned = pod.table.pin()
            if not first.whole:
                pod.table.forget_doomed()
            if self._lent is not None:
                pod.reset(self._lent)
            if not first.whole:
                self._sidecar_status.run.loading()
            self._running = requests
            self._reading = set(requests)
            request = dataclasses.replace(
                self._request(pod, first),
                layouts={rank: load.layout for rank, (_, load) in requests.items()},
                spare_slot=NO_SLOT if self._lent is None else self._lent,
            )
            loaded = await self._executor_client.load(pod, request)
            changes = loaded.step is not None and not first.whole
            if loaded.step is not None and changes and request.path is None:
                pod.set_aside((loaded.order, loaded.step))
            if loaded.step is not None and changes and loaded.tier is Tier.ARENA and len(pod.identity.pods) > 1:
                pod.held_by_all(loaded.step, persisted=False)
                # Queued before any rank can save again, so that this rescue comes first in every pod.
                self._persister.rescue_in_turn(pod, self._executor_client.loads)
            if loaded.step is not None and loaded.tier is Tier.LOCAL and not loaded.path:
                # It was never committed, and only these disks have it.
                self._uploader.held(pod, channel.LocalCopy(step=loaded.step, order=loaded.order))
            if not first.whole:
                self._note(pod, loaded, elsewhere=request.path is not None)
            self._answer(requests, loaded)
        except PillionError as err:
            self._fail(requests, ErrorDocument.from_exception(err))
        except Exception as err:  # a boundary: the trainers wait for an answer
            _log.exception("a load failed")
            self._fail(requests, ErrorDocument("LoadError", f"{type(err).__name__}: {err}"))
        finally:
            self._running = {}

    @staticmethod
    def _request(pod: PodArena, first: load_messages.Load) -> channel.Load:
        """Return the executor's request without the layouts of the ranks: the call, and the content of the arena."""
        return channel.Load(
            step=first.step,
            strict=first.strict,
            find=first.find,
            path=first.path,
            below=first.below,
            whole=first.whole,
            prefixes=first.prefixes,
            refused=first.refused,
            arena=pod.table.restorable(),
            near=dict(pod.near),
            orders={save.step: save.born for save in pod.table.saves.values() if save.born is not None},
            strangers=tuple(pod.strangers.values()),
            spare_slot=NO_SLOT,
        )

    async def _find(self, pod: PodArena, requests: dict[int, LoadRequest], first: load_messages.Load) -> None:
        """Send every rank the checkpoint that a load would take. No slot is reserved or filled, and no snapshot is dropped."""
        self._pinned = pod.table.pin()
        try:
            found = await self._executor_client.load(pod, self._request(pod, first))
        finally:
            self._release()
        for where, why in found.refused.items() if first.whole else ():
            # Only a read has looked into the checkpoint.
            _log.error("refused the checkpoint %s: %s", where, why)
            self._sidecar_status.refused(where, why)
        answer = load_messages.Loaded(
            step=found.step,
            tier=found.tier,
            path=found.path,
            refused=found.refused,
            passed_over=found.passed_over,
            differing=found.differing,
            remarks=found.remarks,
            content=found.content,
        )
        for client, load in requests.values():
            client.answer(load.id, answer)

    async def _lend(self) -> int | None:
        """
        Reserve a slot to load into.

        Returns:
            The slot. None if every slot holds a snapshot that the load may need: the executor then chooses a slot, if the pods agree on a
            checkpoint on storage.

        Raises:
            LoadError: no slot became free in time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.peer_timeout_s):
                while self._trainers.pod is not None:
                    self._slot_free.clear()
                    slot = self._trainers.pod.table.lend()
                    if slot is not None or self._trainers.pod.table.crowded():
                        return slot
                    await self._slot_free.wait()
        raise LoadError(f"no slot became free to load into within {self._settings.peer_timeout_s:.1f} s")

    def _note(self, pod: PodArena, loaded: channel.Loaded, *, elsewhere: bool) -> None:
        """Count and log a load. `elsewhere`: it was one of a directory by its name."""
        metrics = self._sidecar_status.metrics
        metrics.loads_arena += loaded.tier is Tier.ARENA
        metrics.loads_local += loaded.tier is Tier.LOCAL
        metrics.loads_storage += loaded.tier is Tier.STORAGE
        if loaded.step is not None:
            self._sidecar_status.loaded_from(loaded.step, loaded.tier)
        save = pod.table.saves.get(loaded.step) if loaded.step is not None and loaded.tier is not Tier.STORAGE else None
        saved_ns = loaded.saved_ns or (save.sealed_ns if save is not None else 0)
        self._sidecar_status.run.loaded(loaded.step, loaded.tier, saved_ns, len(loaded.refused))
        for where, why in loaded.refused.items():
            _log.error("refused the checkpoint %s: %s", where, why)
            self._sidecar_status.refused(where, why)
        for where, why in loaded.passed_over.items():
            _log.warning("%s is newer than the loaded checkpoint, and was not used: %s", where, why)
        if loaded.set_aside and elsewhere:
            _log.warning("loaded %s, although this run has steps %s of its own", loaded.path, list(loaded.set_aside))
        elif loaded.set_aside:
            _log.warning(
                "committed steps %s are newer than the loaded step; they stay on storage and are loaded only by number",
                list(loaded.set_aside),
            )
        _log.info("loaded step %s from %s", loaded.step, loaded.tier, extra={"step": loaded.step})

    def _answer(self, requests: dict[int, LoadRequest], loaded: channel.Loaded) -> None:
        for rank, (client, load) in requests.items():
            client.answer(
                load.id,
                load_messages.Loaded(
                    step=loaded.step,
                    tier=loaded.tier,
                    path=loaded.path,
                    refused=loaded.refused,
                    passed_over=loaded.passed_over,
                    set_aside=loaded.set_aside,
                    unexpected=loaded.unexpected.get(rank, ()),
                    alike=loaded.alike,
                    differing=loaded.differing,
                    remarks=loaded.remarks,
                    opaque=loaded.opaque.get(rank, load_messages.OpaqueLeaves()),
                ),
            )

    def _fail(self, requests: dict[int, LoadRequest], error: ErrorDocument) -> None:
        self._release()
        first = next(iter(requests.values()))[1]
        connected = self._trainers.clients
        if error.kind == SessionOver.__name__ or not any(
            connected.get(rank) is client for rank, (client, _) in requests.items()
        ):
            _log.info("abandoned a load because its trainers have ended: %s", error.message)
        elif first.whole:
            # The run does not wait for a checkpoint: the script has asked about one.
            _log.warning("a read failed: %s", error.message)
        else:
            self._sidecar_status.load_failed(first.step, error.kind, error.message)
        for client, load in requests.values():
            client.refuse(load.id, error)

    def _release(self) -> None:
        pod = self._trainers.pod
        if pod is None:
            return
        pod.table.unpin(self._pinned)
        self._pinned = []
        if self._lent is not None:
            pod.table.give_back(self._lent)
            self._lent = None


def _words(load: load_messages.Load) -> str:
    """Return a rank's call as the training script writes it. Equal calls have equal texts."""
    if load.whole:
        what = f", prefix={list(load.prefixes)}" if load.prefixes else ""
        return f"read(step={load.step}{what}{_place(load)})" if load.find else f"read of {load.path or load.step}"
    if load.find:
        return f"find(step={load.step}{_place(load)})"
    strict = "" if load.strict else ", strict=False"
    if load.path is not None and not load.below:
        return f"load(checkpoint_id={load.path!r}{strict})"
    return f"load(step={load.step}{_place(load)}{strict})"


def _place(load: load_messages.Load) -> str:
    return "" if load.path is None else f", path={load.path!r}"
