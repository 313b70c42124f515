"""
Requests to the executor, and the executor's life: started before it is needed, opened for the session, replaced when it dies.

Called from: the supervisor, one operation at a time (a lock keeps loads and saves apart).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from pillion.errors import BarrierTimeout, ErrorDocument, LoadError, PillionError, SaveError
from pillion.wire import messages, policy
from pillion.wire.message import Message
from pillion_sidecar import settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import Save
from pillion_sidecar.checkpoint import ownership
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.executor.save import rescue
from pillion_sidecar.session import record as record_module
from pillion_sidecar.session.record import Counts, Record
from pillion_sidecar.status.metrics import Metrics
from pillion_sidecar.supervisor.executor_process import ExecutorDied, ExecutorProcess
from pillion_sidecar.waits import WaitKind

_log = logging.getLogger(__name__)

LEAVE_TIMEOUT_S: Final = 3.0
"""Bound for an executor to leave what it does for a session that is over: waits for other pods are made in pieces of a second
(`exchange.PIECE_S`); a connection to a store that never answers, or a write, is not left."""


START_TRIES: Final = 5
START_PAUSE_S: Final = 1.0
"""Between two tries to start an executor: descriptors, processes or memory that are short at a moment are back in seconds mostly."""
SHOW_TIMEOUT_S: Final = 2.0
"""Bound for the state of a session to be written on its root: one small write. A later session then finds out by itself."""


class SessionOver(PillionError):
    """The trainers that asked for this are gone, and others are there."""


class ExecutorClient:
    """
    See the module.

    Args:
        on_event: called with events of the executor: load progress, messages of other pods, the loss of the store.
        on_wait: called after each ping with what the executor waits for; None: nothing.
    """

    def __init__(
        self,
        of: settings.Settings,
        metrics: Metrics,
        *,
        on_event: Callable[[messages.Message], None],
        on_wait: Callable[[Mapping[str, Any] | None], None] = lambda _: None,
    ) -> None:
        self._settings = of
        self._metrics = metrics
        self._pass_on = on_event
        self._on_wait = on_wait
        self._executor: ExecutorProcess | None = None
        self._pod: PodArena | None = None
        self.opened: str | None = None
        """The session that the living executor has open."""
        self._opening: dict[str, Any] = {}
        self._working_for: str | None = None
        """The session of the request that the executor has now."""
        self._record: Record | None = None
        """How far the session has come: the executor's successor goes on there, or it would never meet its peers."""
        self.state = ownership.State.TRAINING
        """Of the session, as its root is told."""
        self._lock = asyncio.Lock()
        self._tasks = tasks.BackgroundTasks()

    @property
    def executor_pid(self) -> int | None:
        return self._executor.pid if self._executor is not None else None

    def _on_event(self, event: messages.Message) -> None:
        if "number" in event:
            self._note(signals=event.pop("number"))
        if event["type"] == "store_lost":
            if self._record is None or event["session"] != self._record.session:
                return
            self.store_is_lost()
        self._pass_on(event)

    async def prestart(self) -> None:
        """Start the executor ahead of the first session, so that the first save finds it warm."""
        async with self._lock:
            try:
                await self._running()
            except ExecutorDied as err:
                _log.warning("%s; the first session tries again", err)

    @property
    def store_lost(self) -> bool:
        """Whether the pods of the session meet on storage: messages to all of them reach nobody."""
        return self._record is not None and self._record.counts.store_lost

    def store_is_lost(self) -> None:
        """The executor, or its successor, meets the other pods on storage from now on."""
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
        """Let the arena know which generation and epoch its saves are of."""
        pod, record = self._pod, self._record
        if pod is not None and record is not None and record.generation and record.session == pod.identity.session:
            pod.date((record.generation, record.counts.epoch))

    def session(self, pod: PodArena, record: Record | None = None, *, succeeds: str = "") -> None:
        """
        A new session: the executor opens it beside the trainer's first steps. A failure shows at the first save.

        What the executor still does for the session before ends here: its trainers are gone, and their store with them, so that it
        may be waiting for peers who do the same, while those wait for this pod. It leaves such a wait when it is told; where it does
        not, it is replaced, and its successor has torch to import.

        Args:
            record: how far a session has come that a sidecar before this one served; None: it begins.
            succeeds: the session that owned the root and was found dead; empty: none was looked for.
        """
        self._pod, self.state = pod, ownership.State.TRAINING
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
        """What the executor does for a session that is over ends, or else the executor."""
        told = asyncio.create_task(executor.request({"type": "over", "session": session}))
        try:
            await asyncio.sleep(LEAVE_TIMEOUT_S)
            if self._executor is executor and self._working_for == session:
                _log.warning("replacing the executor: it does not leave a session that has ended")
                executor.kill()
        finally:
            told.cancel()
            await asyncio.gather(told, return_exceptions=True)

    def _revive(self) -> None:
        """The executor ended by itself: its successor is ready before the next save needs it."""
        hung = self._executor is not None and self._executor.hung_for == WaitKind.PEERS
        if hung and self._record is not None and self._record.session in (self._working_for, self.opened):
            # The store took a question and does not answer: its process is stopped, or the network between is cut.
            self.store_is_lost()
        if self._pod is not None:
            self.session(self._pod)

    async def _open_ahead(self, pod: PodArena) -> None:
        try:
            await self.open(pod)
        except PillionError as err:
            _log.warning("the executor cannot open the session yet: %s", err)

    async def open(self, pod: PodArena) -> dict[str, Any]:
        """
        Have a running executor with this pod's session open; what it said (generation, store address).

        Raises:
            PillionError: why it could not; the executor is ended, and the next call starts a fresh one.
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
        for attempt in range(1, START_TRIES + 1):
            try:
                self._executor = await self._started()
                break
            except ExecutorDied as err:
                self._executor = None
                if attempt == START_TRIES:
                    raise
                _log.warning("%s (try %d of %d)", err, attempt, START_TRIES)
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

    async def _open(self, pod: PodArena) -> dict[str, Any]:
        session = pod.identity.session
        record = self._record
        if self._pod is not pod or record is None:
            raise SessionOver(f"session {session} is over")
        executor = await self._running()
        if self._pod is not pod:  # a process takes its time to start
            raise SessionOver(f"session {session} is over")
        if self.opened == session:
            return self._opening
        document = pod.session_document(self._settings)
        document |= {
            "state": self.state.value,
            "before": list(record.before),
            "generation": record.generation,
            "signals": record.signals,
            **dataclasses.asdict(record.counts),
        }
        modules = _modules(pod, record)
        try:
            if modules:
                # Not in the session's name: what ends the session before it is open would end the import with it, each time anew.
                await executor.request({"type": "warm", "modules": modules})
            if self._pod is not pod:
                raise SessionOver(f"session {session} is over")
            self._opening = await self._request(executor, session, {"type": "open", "session": document})
        except SessionOver:
            raise
        except PillionError as err:
            if self._pod is not pod:
                # It was left, and the next session takes its place in the executor.
                raise SessionOver(f"session {session} is over: {err}") from err
            # Half open is not open: the next save starts from a fresh process.
            await executor.stop()
            raise
        self.opened = session
        heard = record.signals if record.signals is not None else self._opening.get("signals")
        self._note(generation=int(self._opening["generation"]), signals=heard)
        return self._opening

    async def persist(
        self, pod: PodArena, save: Save, about: Mapping[str, Any], *, repeated: bool = False
    ) -> dict[str, Any]:
        """
        Run one save.

        Args:
            pod: of the session.
            save: what to persist.
            about: what its manifest says besides.
            repeated: another executor may have begun it.

        Raises:
            ExecutorDied: nothing is known of the save; a successor may repeat it.
            SaveError: it failed.
        """
        request = {
            "step": save.step,
            "slot": save.slot,
            "persist": save.persist,
            "destination": save.destination,
            "sequence": save.step + 1 if save.destination else 0,
            "rescued": save.rescued,
            # As the policy is now: it may have changed since the session was opened.
            "retention": policy.dump(pod.policy)["retention"],
            "repeated": repeated,
            **about,
        }
        try:
            return await self._run(pod, {"type": "persist", "save": request})
        except SaveError:
            if save.destination is not None:
                # Its caller was told, and decides; nobody comes back to this arena for it, so that it is not owed to
                # storage at the drain.
                pod.table.keep_in_memory(save)
            raise

    async def load(self, pod: PodArena, request: dict[str, Any]) -> dict[str, Any]:
        """
        Run one load; when the executor dies with it, once more by its successor.

        Raises:
            LoadError.
        """
        message = {"type": "load", "load": request}
        try:
            try:
                result = await self._run(pod, message)
            except ExecutorDied as err:
                _log.warning("repeating the load with a new executor: %s", err)
                result = await self._run(pod, message)
        except ExecutorDied as err:
            if self._record is not None:
                # The other pods have counted it.
                counts = self._record.counts
                self._note(counts=dataclasses.replace(counts, loads=counts.loads + 1))
            raise LoadError(f"two executors in a row died while they loaded: {err}") from err
        except BarrierTimeout as err:
            raise LoadError(str(err)) from err
        return result

    @property
    def loads(self) -> int:
        """Loads of the session that were begun; the same number in every pod."""
        return self._record.counts.loads if self._record is not None else 0

    async def rescue(self, pod: PodArena, held: list[Save], calls: list[str]) -> rescue.Agreements:
        """
        Agree with the other pods on the snapshot that all of them persist: see `executor.save.rescue`.

        Raises:
            PillionError: some pod did not come, this one came too late, or the executor died.
        """
        message = {
            "type": "rescue",
            "held": [save.step for save in held],
            "persisted": [save.step for save in held if save.persisted],
            "born": {str(save.step): save.born for save in held if save.born},
            "calls": calls,
        }
        return rescue.Agreements.from_document(await self._run(pod, message))

    def joined(self, process: tuple[int, int]) -> None:
        """A trainer's process is in the session: a sidecar after this one waits for it to come back."""
        if self._record is not None and process not in self._record.trainers:
            self._note(trainers=(*self._record.trainers, process))

    def served(self) -> tuple[str, ...]:
        """The sessions that this pod has served, the last one first."""
        return (self._record.session, *self._record.before) if self._record is not None else ()

    async def show(self, state: ownership.State) -> None:
        """Have the session's record on its root say what it is in. Blocks: up to SHOW_TIMEOUT_S. Never raises."""
        self.state = state
        executor = self._executor
        if executor is None or executor.pid is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHOW_TIMEOUT_S):
                try:
                    await executor.request({"type": "state", "state": state.value})
                except PillionError as err:
                    _log.info("could not write to the root that its session is %s: %s", state.value, err)

    async def retain(self, pod: PodArena, current: int, slice_s: float) -> bool:
        """
        (coordinator) Remove for `slice_s` what the policy does not keep after the commit of `current`; whether something may be left.

        Raises:
            PillionError: the executor died, or hangs in it; nothing else is lost.
        """
        about = {"current": current, "slice_s": slice_s, "retention": policy.dump(pod.policy)["retention"]}
        return bool((await self._run(pod, {"type": "retain", **about}))["more"])

    async def withdraw(
        self, pod: PodArena, step: int, error: ErrorDocument, *, persist: bool, rescued: bool
    ) -> PillionError | None:
        """Tell the other pods that this one has no part in `step`; what all of them then know of it."""
        about = {"step": step, "persist": persist, "rescued": rescued, "error": error.to_document()}
        try:
            await self._run(pod, {"type": "withdraw", **about})
        except PillionError as err:
            _log.info("step %d was withdrawn: %s", step, err)
            return err
        return None

    async def signal(self, pod: PodArena, message: Message) -> bool:
        """Tell every pod of the job; whether it was told. Lost when there is no way now: whoever needs it asks again."""
        try:
            if self.opened != pod.identity.session:
                await self.open(pod)
            if self._executor is not None:
                # Not under the lock: a save may hold it for minutes.
                await self._executor.request({"type": "signal", "message": message.to_document()})
                return True
        except PillionError as err:
            _log.warning("could not send %s to the other pods: %s", message, err)
        return False

    async def _run(self, pod: PodArena, message: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            await self._open(pod)
            executor = self._executor
            if executor is None:
                raise ExecutorDied("the executor is not running")
            return await self._request(executor, pod.identity.session, message)

    async def _request(self, executor: ExecutorProcess, session: str, message: dict[str, Any]) -> dict[str, Any]:
        self._working_for = session
        try:
            return await executor.request(message)
        finally:
            self._working_for = None
            state = executor.session_state
            if state and self._record is not None and self._record.session == session:
                lost = self._record.counts.store_lost
                counts = Counts.from_document(state)
                self._note(counts=dataclasses.replace(counts, store_lost=counts.store_lost or lost))

    async def stop(self) -> None:
        self._pod = None
        # One may be in the middle of starting a process, which it ends.
        await self._tasks.stop()
        if self._executor is not None:
            await self._executor.stop()


def _modules(pod: PodArena, record: Record) -> list[str]:
    """Of `executor`, those that import torch, 3 s and more: ahead of the first save, and only what this session needs."""
    modules = []
    if pod.identity.store_mode is not None and not record.counts.store_lost:
        modules.append("exchange.tcpstore")
    if pod.policy.storage.writer is not None:
        modules.append("save.dcp_writer")
    return modules
