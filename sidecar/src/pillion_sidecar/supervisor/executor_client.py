"""
Sends requests to the executor, and manages its life: starts it early, opens the session in it, and replaces it when it dies.

Called from: the supervisor, one operation at a time. A lock keeps loads and saves apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

from pillion.errors import BarrierTimeout, ErrorDocument, LoadError, PillionError, SaveError
from pillion.wire import control
from pillion.wire.message import Message, Request
from pillion_sidecar import channel, settings
from pillion_sidecar.arena.pod_arena import PodArena, copies_of
from pillion_sidecar.arena.slots import Save
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.session import record as record_module
from pillion_sidecar.session.record import Record
from pillion_sidecar.session.state import State
from pillion_sidecar.status.metrics import Metrics
from pillion_sidecar.status.status import About
from pillion_sidecar.supervisor.executor_process import ExecutorDied, ExecutorProcess
from pillion_sidecar.waits import Wait, WaitKind

_log = logging.getLogger(__name__)
A = TypeVar("A", bound=channel.Answer)

LEAVE_TIMEOUT_S: Final = 3.0
"""Timeout for an executor to leave the work for a session that is over. A wait for other pods ends within a second
(`exchange.PIECE_S`). A write, or a connection to a store that never answers, does not end; then the executor is replaced."""


START_ATTEMPTS: Final = 5
"""Maximum attempts to start an executor."""
START_PAUSE_S: Final = 1.0
"""Pause between two attempts to start an executor. A lack of descriptors, processes or memory is mostly over within seconds."""
SHOW_TIMEOUT_S: Final = 2.0
"""Timeout for writing the session's state to its root, a small file. Without it, a later session waits until the owner looks dead."""


class SessionOver(PillionError):
    """The session of this request is over, and another one has begun."""


class ExecutorClient:
    """
    The supervisor's access to its executor. See the module.

    Args:
        own_settings: the sidecar's settings.
        metrics: counters of the sidecar.
        on_event: called with each event of `channel.EVENTS`, except the loss of a store whose session is over.
        on_wait: called after each ping with the wait that the executor is in. None: it does not wait.
        on_opened: called with each session that an executor has opened.
    """

    def __init__(
        self,
        own_settings: settings.Settings,
        metrics: Metrics,
        *,
        on_event: Callable[[Message], None],
        on_wait: Callable[[Wait | None], None] = lambda _: None,
        on_opened: Callable[[str, channel.Opened], None] = lambda _, __: None,
    ) -> None:
        self._settings = own_settings
        self._metrics = metrics
        self._pass_on = on_event
        self._on_wait, self._on_opened = on_wait, on_opened
        self._executor: ExecutorProcess | None = None
        self._pod: PodArena | None = None
        self.opened: str | None = None
        """Session that is open in the living executor. None: no session is open."""
        self._opening: channel.Opened | None = None
        self._working_for: str | None = None
        """Session of the request that the executor works on."""
        self._record: Record | None = None
        """Record of the session's progress. The executor's successor continues from it; otherwise its keys would differ from its peers'."""
        self.state = State.TRAINING
        """State of the session, as written on its root."""
        self._lock = asyncio.Lock()
        self._tasks = tasks.BackgroundTasks()

    @property
    def executor_pid(self) -> int | None:
        return self._executor.pid if self._executor is not None else None

    def _on_event(self, event: Message) -> None:
        if isinstance(event, channel.Heard):
            self._note(signals=event.number)
        if isinstance(event, channel.StoreLost):
            if self._record is None or event.session != self._record.session:
                return
            self.store_is_lost()
        self._pass_on(event)

    async def prestart(self) -> None:
        """Start the executor before the first session, so that the first save need not wait for its start."""
        async with self._lock:
            try:
                await self._running()
            except ExecutorDied as err:
                _log.warning("%s; the first session tries again", err)

    @property
    def store_lost(self) -> bool:
        """Whether the job's store is lost. Then the pods use the exchange on storage, and signals do not reach them."""
        return self._record is not None and self._record.counts.store_lost

    def store_is_lost(self) -> None:
        """Record that the job's store is lost. The executor and its successors use the exchange on storage from now on."""
        if self._record is not None:
            self._note(counts=dataclasses.replace(self._record.counts, store_lost=True))

    def _note(self, **changes: Any) -> None:
        if self._record is not None:
            changed = dataclasses.replace(self._record, **changes)
            if changed != self._record:
                self._record = changed
                record_module.write(self._settings.runtime_dir, changed)
            self._date()

    def _date(self) -> None:
        """Set the generation and epoch that the arena notes for its saves."""
        pod, record = self._pod, self._record
        if pod is not None and record is not None and record.generation and record.session == pod.identity.session:
            pod.date((record.generation, record.counts.epoch))

    def session(self, pod: PodArena, record: Record | None = None, *, succeeds: str = "") -> None:
        """
        Begin a session. The executor opens it beside the trainers' first steps. A failure shows at the first save.

        The executor's work for the previous session ends here. That session's trainers and store are gone, so the executor may wait for
        peers that wait for this pod. It is asked to leave such a wait. If it does not, it is replaced.

        Args:
            pod: the arena of the session.
            record: record of a session that an earlier sidecar served. None: the session is new.
            succeeds: the dead session that owned the root before. Empty: not known.
        """
        self._pod, self.state = pod, State.TRAINING
        if record is not None:
            self._record = record
        elif self._record is None or self._record.session != pod.identity.session:
            before = tuple(filter(None, (succeeds, *self.served())))[: record_module.KEPT_BEFORE]
            self._record = dataclasses.replace(pod.record(), before=before)
            record_module.write(self._settings.runtime_dir, self._record)
        self._date()
        if self._executor is not None and self._working_for not in (None, pod.identity.session):
            self._tasks.start(self._leave(self._executor, self._working_for), "leaving a session")
        self._tasks.start(self._open_ahead(pod), "opening a session")

    async def _leave(self, executor: ExecutorProcess, session: str) -> None:
        """Ask the executor to leave its work for a session that is over. If it does not, kill it. Blocks: for LEAVE_TIMEOUT_S."""
        asking = asyncio.create_task(executor.request(channel.Over(session=session)))
        try:
            await asyncio.sleep(LEAVE_TIMEOUT_S)
            if self._executor is executor and self._working_for == session:
                _log.warning("replacing the executor: it does not leave a session that has ended")
                executor.kill()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def _revive(self) -> None:
        """Start the successor of an executor that ended by itself, before the next save needs it."""
        hung = self._executor is not None and self._executor.hung_for == WaitKind.PEERS
        if hung and self._record is not None and self._record.session in (self._working_for, self.opened):
            # The store accepted a request and does not answer: its process is stopped, or the network is cut.
            self.store_is_lost()
        if self._pod is not None:
            self.session(self._pod)

    async def _open_ahead(self, pod: PodArena) -> None:
        try:
            await self.open(pod)
        except PillionError as err:
            _log.warning("the executor cannot open the session yet: %s", err)

    async def open(self, pod: PodArena) -> channel.Opened:
        """
        Open this pod's session in a running executor, if it is not open.

        Raises:
            PillionError: the session cannot be opened. The executor is ended, and the next call starts a new one.
        """
        async with self._lock:
            return await self._open(pod)

    async def _running(self) -> ExecutorProcess:
        if self._executor is not None and self._executor.pid is not None:
            return self._executor
        if self._executor is not None:
            await self._executor.stop()
            self._metrics.executor_restarts += 1
        self.opened = None
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._executor = await self._started()
                break
            except ExecutorDied as err:
                self._executor = None
                if attempt == START_ATTEMPTS:
                    raise
                _log.warning("%s (try %d of %d)", err, attempt, START_ATTEMPTS)
                await asyncio.sleep(START_PAUSE_S)
        assert self._executor is not None
        return self._executor

    async def _started(self) -> ExecutorProcess:
        executor = ExecutorProcess(
            log_level=self._settings.log_level,
            ping_timeout_s=self._settings.ping_timeout_s,
            patience_s=min(self._settings.storage_timeout_s, self._settings.store_timeout_s),
            on_wait=self._on_wait,
            on_event=self._on_event,
            on_exit=self._revive,
        )
        await executor.start()
        return executor

    async def _open(self, pod: PodArena) -> channel.Opened:
        session = pod.identity.session
        record = self._record
        if self._pod is not pod or record is None:
            raise SessionOver(f"session {session} is over")
        executor = await self._running()
        if self._pod is not pod:  # the start of a process takes time, and another session may have begun
            raise SessionOver(f"session {session} is over")
        if self.opened == session and self._opening is not None:
            return self._opening
        request = pod.opening(self._settings, record, self.state)
        modules = _modules(pod, record)
        try:
            if modules:
                # Not as part of opening the session. If the session ended before it was open, the import would be interrupted each time.
                await executor.request(channel.Warm(modules=modules))
            if self._pod is not pod:
                raise SessionOver(f"session {session} is over")
            opening = self._opening = await self._request(executor, session, request)
        except SessionOver:
            raise
        except PillionError as err:
            if self._pod is not pod:
                # The executor has left this session for the next one.
                raise SessionOver(f"session {session} is over: {err}") from err
            # The session may be half open, so the next save starts a new process.
            await executor.stop()
            raise
        self.opened = session
        self._on_opened(session, opening)
        signal_number = record.signals if record.signals is not None else opening.signals
        self._note(generation=opening.generation, signals=signal_number)
        return opening

    def writes_to_disk(self, pod: PodArena, save: Save) -> bool:
        """Whether a save goes to the node's disk first."""
        return save.local and bool(copies_of(self._settings, pod.policy, pod.identity.root))

    async def persist(
        self, pod: PodArena, save: Save, about: Callable[[int], About], *, repeated: bool = False
    ) -> channel.Persisted:
        """
        Run one save in the executor.

        Args:
            pod: the arena of the session.
            save: the complete save.
            about: returns further fields of a step's manifest (cause, times), and the journal.
            repeated: whether another executor may have begun this save.

        Raises:
            ExecutorDied: the executor died, and the outcome is not known. A successor may repeat the save.
            SaveError: the save failed.
        """
        try:
            await self.open(pod)  # the earlier attempts of the run are known after it
            at = about(save.step)
            request = channel.Persist(
                step=save.step,
                slot=save.slot,
                persist=save.persist,
                local=self.writes_to_disk(pod, save),
                destination=save.destination,
                sequence=save.step + 1 if save.destination is not None else 0,
                rescued=save.rescued,
                retention=pod.policy.retention,
                repeated=repeated,
                started_ns=at.started_ns,
                cause=at.cause,
                run=at.run if save.persist and save.destination is None else None,
            )
            return await self._run(pod, request)
        except SaveError:
            if save.destination is not None:
                # The caller of `pillion.dcp` gets the error, and decides. So the drain need not write this save.
                pod.table.keep_in_memory(save)
            raise

    async def upload(self, pod: PodArena, request: channel.Upload) -> channel.Persisted:
        """
        Bring a local copy to storage, beside the saves and loads of the executor.

        Raises:
            ExecutorDied: the executor died, and the outcome is not known.
            SaveError: the upload failed.
        """
        await self.open(pod)
        executor = self._executor
        if executor is None:
            raise ExecutorDied("the executor is not running")
        # Without the lock: an upload may take minutes.
        return await executor.request(request)

    @property
    def uploads(self) -> tuple[int, channel.LocalCopy | None]:
        """Number of the session's next upload, or of the running one, and its copy. None: the pods have not agreed on one."""
        record = self._record
        if record is None or record.uploading is None:
            return (record.uploads if record is not None else 0), None
        step, generation, epoch = record.uploading
        return record.uploads, channel.LocalCopy(step=step, order=(generation, epoch))

    def note_upload(self, number: int, copy: channel.LocalCopy) -> None:
        """Record which copy upload `number` brings to storage."""
        if self._record is not None and self._record.uploads == number:
            self._note(uploading=(copy.step, *copy.order))

    def upload_ended(self, number: int) -> None:
        """Record that upload `number` has ended, well or not."""
        self._note(uploads=number + 1, uploading=None)

    @property
    def persist_timeout_s(self) -> float:
        """Timeout for one pod to write its part of a checkpoint, seconds."""
        return self._settings.persist_timeout_s

    async def load(self, pod: PodArena, request: channel.Load) -> channel.Loaded:
        """
        Run one load in the executor. If the executor dies, its successor repeats the load once.

        Raises:
            LoadError: the load failed.
        """
        try:
            try:
                result = await self._run(pod, request)
            except ExecutorDied as err:
                _log.warning("repeating the load with a new executor: %s", err)
                result = await self._run(pod, request)
        except ExecutorDied as err:
            if self._record is not None:
                # The other pods have counted this load, and all pods must have the same count.
                counts = self._record.counts
                self._note(counts=dataclasses.replace(counts, loads=counts.loads + 1))
            raise LoadError(f"two executors in a row died while they loaded: {err}") from err
        except BarrierTimeout as err:
            raise LoadError(str(err)) from err
        except SaveError as err:
            # The executor has no word of its own for a load that failed before it began: its session could not be opened.
            raise LoadError(f"the load could not begin: {err}") from err
        return result

    @property
    def loads(self) -> int:
        """Number of loads of the session so far, the same in every pod."""
        return self._record.counts.loads if self._record is not None else 0

    async def rescue(
        self, pod: PodArena, held: list[Save], calls: list[str], *, owed: Callable[[int], bool]
    ) -> channel.Agreed:
        """
        Agree with the other pods on the snapshot that all of them persist. See `executor.save.rescue`.

        Args:
            pod: the arena of the session.
            held: the snapshots of this pod, oldest first.
            calls: ids of the calls that this rescue answers.
            owed: returns whether a step is on the local disks and on its way to storage, so that it needs no rescue.

        Raises:
            PillionError: a pod did not take part, this pod was too late, or the executor died.
        """
        request = channel.Rescue(
            held=tuple(save.step for save in held),
            persisted=tuple(save.step for save in held if save.persisted or owed(save.step)),
            born={save.step: save.born for save in held if save.born is not None},
            calls=tuple(calls),
        )
        return await self._run(pod, request)

    def joined(self, process: tuple[int, int]) -> None:
        """Record a trainer's process. A later sidecar that adopts the session waits for it to return."""
        if self._record is not None and process not in self._record.trainers:
            self._note(trainers=(*self._record.trainers, process))

    def served(self) -> tuple[str, ...]:
        """Return the sessions that this pod has served, newest first."""
        return (self._record.session, *self._record.before) if self._record is not None else ()

    async def show(self, state: State) -> None:
        """Write the session's state to its record on the root. Blocks: up to SHOW_TIMEOUT_S. Never raises."""
        self.state = state
        executor = self._executor
        if executor is None or executor.pid is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHOW_TIMEOUT_S):
                try:
                    await executor.request(channel.Show(state=state))
                except PillionError as err:
                    _log.info("could not write to the root that its session is %s: %s", state.value, err)

    async def retain(self, pod: PodArena, current: int, slice_s: float) -> channel.Retained:
        """
        (coordinator) Delete checkpoints that the policy does not keep after the commit of step `current`, for `slice_s` seconds.
        Raises: PillionError: the executor died or hangs. No save is lost.
        """
        request = channel.Retain(current=current, slice_s=slice_s, retention=pod.policy.retention)
        return await self._run(pod, request)

    async def withdraw(
        self, pod: PodArena, step: int, error: ErrorDocument, *, persist: bool, rescued: bool
    ) -> PillionError | None:
        """Report to the other pods that this pod writes no part of `step`. Return its error, with the failures of all pods; None: there is none."""
        request = channel.Withdraw(step=step, persist=persist, rescued=rescued, error=error.to_document())
        try:
            await self._run(pod, request)
        except PillionError as err:
            _log.info("step %d was withdrawn: %s", step, err)
            return err
        return None

    async def signal(self, pod: PodArena, message: Message) -> bool:
        """Send a signal to every pod of the job. Return whether it was sent. A lost signal is not repeated here; its sender sends it again."""
        try:
            if self.opened != pod.identity.session:
                await self.open(pod)
            if self._executor is not None:
                # Without the lock, which a save may hold for minutes.
                await self._executor.request(channel.Signal(message=message.to_document()))
                return True
        except PillionError as err:
            _log.warning("could not send %s to the other pods: %s", message, err)
        return False

    async def verify(self, pod: PodArena, save: Save) -> None:
        """Verify a snapshot whose trainers are gone, until the next request. Never raises: what is not verified now is verified in the load."""
        executor, request = self._executor, channel.Verify(session=pod.identity.session, step=save.step, slot=save.slot)
        if executor is not None and self.opened == pod.identity.session:
            with contextlib.suppress(PillionError):
                # Without the lock: the next request is to be seen by the executor, which then ends this one.
                self._metrics.snapshots_verified += (await executor.request(request)).whole

    async def _run(self, pod: PodArena, request: Request[A]) -> A:
        async with self._lock:
            await self._open(pod)
            executor = self._executor
            if executor is None:
                raise ExecutorDied("the executor is not running")
            return await self._request(executor, pod.identity.session, request)

    async def _request(self, executor: ExecutorProcess, session: str, request: Request[A]) -> A:
        self._working_for = session
        try:
            return await executor.request(request)
        finally:
            self._working_for = None
            counts = executor.counts
            if counts is not None and self._record is not None and self._record.session == session:
                lost = self._record.counts.store_lost
                self._note(counts=dataclasses.replace(counts, store_lost=counts.store_lost or lost))

    async def stop(self) -> None:
        self._pod = None
        # A task may be starting an executor. When it is stopped, it ends that process.
        await self._tasks.stop()
        if self._executor is not None:
            await self._executor.stop()


def _modules(pod: PodArena, record: Record) -> tuple[str, ...]:
    """Return the modules of `executor` that this session needs and that import torch. The import takes 3 s or more before the first save."""
    modules = []
    hosts = pod.identity.store_mode is control.MeetingStore.OWN and pod.identity.local_ranks[0] == 0
    if hosts and not record.counts.store_lost:
        modules.append("exchange.torch_store")
    if pod.policy.storage.writer is not None:
        modules.append("save.dcp_writer")
    return tuple(modules)
