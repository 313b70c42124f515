"""
The back half of a save in this pod: complete saves go to the executor, one at a time, and their outcome to everybody.

Called from: `supervisor.staging` (wake, withdraw), the supervisor (start, rescue, quiet), `supervisor.loader` (quiet). Never imports torch, never touches user
data; the executor's ping bounds what it waits for.

    complete saves, withdrawals --> _work: one at a time --> executor
                                      outcome --> every local rank, metrics, slots
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from pillion.errors import (
    BarrierTimeout,
    ErrorDocument,
    PersistError,
    PillionError,
    RemoteFailure,
    SaveError,
    SaveSkipped,
)
from pillion.wire import arena, events, policy
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import Phase, Save
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import failures, signals
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.executor_process import ExecutorDied, ExecutorHung
from pillion_sidecar.supervisor.trainers import Trainers
from pillion_sidecar.waits import WaitKind

_log = logging.getLogger(__name__)

PERSIST_ATTEMPTS: Final = 2
"""How often one snapshot is handed to an executor that dies with it: a snapshot that kills two would kill a third."""
RESCUES_REPEATED: Final = 3
"""How often in a session a pod that others waited for in vain calls them again: an executor that dies each time dies of the rescue."""
RETENTION_SLICE_S: Final = 1.0
"""How long retention works before saves and loads get their turn; one file may take longer."""
NAMES_SHOWN: Final = 20
"""Names in a warning; the checkpoint's manifest has more."""
REMEMBERED_RESCUES: Final = 64
"""Calls to a rescue that were answered: each is heard by whoever made it, too."""


class Persister:
    """
    See the module.

    Args:
        on_release: called when a slot may have become free.
    """

    def __init__(
        self,
        sidecar_status: SidecarStatus,
        trainers: Trainers,
        executor_client: ExecutorClient,
        on_release: Callable[[], None],
    ) -> None:
        self._sidecar_status = sidecar_status
        self._trainers = trainers
        self._executor_client = executor_client
        self._on_release = on_release
        self._withdrawn: list[tuple[int, bool, bool, ErrorDocument]] = []
        self._calls: dict[str, None] = {}
        """To a rescue, by other pods or by this one, that are not answered yet; in their order."""
        self._calling = 0
        self._answered: deque[str] = deque(maxlen=REMEMBERED_RESCUES)
        self._repeated = 0
        """Rescues of this session that this pod called for again."""
        self._warned_of: Sequence[str] = ()
        """Names of leaves that differ from rank to rank, as they were told last."""
        self._at_work = self._agreeing = self._retaining = False
        self._retain_after: int | None = None
        """Retention is owed for the commit of this step; nobody waits for it but the end of the session."""
        self._tasks: tasks_module.BackgroundTasks | None = None
        self._wake = asyncio.Event()
        self._quiet = asyncio.Condition()

    def start(self, tasks: tasks_module.BackgroundTasks) -> None:
        self._tasks = tasks
        tasks.start(self._work(), "persisting")

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def withdraw(self, step: int, error: SaveError, *, persist: bool, rescued: bool = False) -> None:
        """Other pods wait for this one's part of `step`: tell them that it never comes."""
        pod = self._trainers.pod
        if pod is not None and len(pod.identity.pods) > 1:
            self._withdrawn.append((step, persist, rescued, ErrorDocument.from_exception(error)))
            self.wake()

    def _rescuable(self) -> Save | None:
        """The newest whole snapshot, when nothing brings it to storage yet."""
        pod = self._trainers.pod
        if pod is None or pod.policy.trigger.on_termination is not policy.OnTermination.SAVE or not pod.identity.root:
            return None
        whole = [
            save for save in pod.table.saves.values() if save.complete and not save.hopeless and not save.set_aside
        ]
        save = max(whole, key=lambda each: each.order, default=None)
        if save is None or save.persisted or save.destination is not None:
            return None
        on_its_way = save.persist and save.phase in (Phase.COMPLETE, Phase.PERSISTING)
        return None if on_its_way else save

    def rescue(self) -> None:
        """Persist the newest whole snapshot that is not on storage: its trainer cannot make another. All pods do it together."""
        pod, save = self._trainers.pod, self._rescuable()
        if pod is None or save is None or self._tasks is None:
            return
        if len(pod.identity.pods) == 1:
            self._to_storage(pod, save)
            self.wake()
            return
        self._calling += 1
        self._tasks.start(self._call_rescue(pod), "calling to a rescue")

    def _to_storage(self, pod: PodArena, save: Save) -> None:
        pod.table.to_storage(save)
        self._sidecar_status.rescued(save.step)
        _log.warning("step %d was in memory only: writing it to storage now", save.step, extra={"step": save.step})

    async def _call_rescue(self, pod: PodArena) -> None:
        call = uuid.uuid4().hex
        try:
            if not self._executor_client.store_lost:
                # Without the store every pod finds out by itself.
                await self._executor_client.signal(pod, signals.RescueCalled(id=call))
        finally:
            self._calling -= 1
            if self._trainers.pod is pod:
                self.rescue_called(call)
            self.wake()

    def rescue_called(self, call: str) -> None:
        """A pod cannot make another snapshot; `call` is that call's name. One that a rescue has answered already is over."""
        if call not in self._answered and self._trainers.pod is not None:
            self._calls[call] = None
            self.wake()

    def rescue_in_turn(self, pod: PodArena, load: int) -> None:
        """Behind load number `load` every pod does the same: agree on the newest snapshot, and persist it unless it is."""
        self.rescue_called(f"{pod.identity.session}/load/{load}")

    def forget_calls(self) -> None:
        """Of a session that is over."""
        self._calls.clear()
        self._repeated = 0

    async def _rescue(self, pod: PodArena) -> None:
        """Agree with the other pods on the newest snapshot that all of them hold, and persist it."""
        pinned = pod.table.pin()
        calls = list(self._calls)
        self._agreeing = True
        async with self._quiet:
            self._quiet.notify_all()
        try:
            ours = [save for save in pinned if save.destination is None and not save.hopeless and not save.set_aside]
            held = sorted(ours, key=lambda save: save.order)
            agreed = await self._executor_client.rescue(pod, held, calls)
            self._agreeing = False
            # What any pod was called by is answered: whoever hears that call later would wait for the others in vain.
            calls += agreed.calls
            if self._trainers.pod is pod:
                for each in agreed.persisted:
                    pod.heard(each, persisted=True)
            step = agreed.step
            save = pod.table.saves.get(step) if step is not None else None
            if step is None or save is None:
                return
            self._to_storage(pod, save)
            pod.table.start_persist(save)
            await self._persist(pod, save)
        except PillionError as err:
            if self._trainers.pod is not pod:
                _log.info("abandoned a rescue of the previous session: %s", err)
            elif self._missed_by_others(pod, err) and self._repeated < RESCUES_REPEATED:
                _log.warning("calling the other pods to a rescue again: %s", err)
                self._repeated += 1
                self.rescue()
            else:
                _log.error("the newest snapshot stays in memory: %s", err)
        finally:
            self._agreeing = False
            for call in calls:
                self._calls.pop(call, None)
                self._answered.append(call)
            pod.table.unpin(pinned)

    def _missed_by_others(self, pod: PodArena, err: PillionError) -> bool:
        """Whether it was this pod that a rescue failed by: the others do not know that it can be met now."""
        late = isinstance(err, BarrierTimeout) and not set(err.missing).isdisjoint(pod.identity.local_ranks)
        return late or isinstance(err, ExecutorDied)

    def busy(self) -> bool:
        pod = self._trainers.pod
        if pod is None:
            return False
        phases = {save.phase for save in pod.table.saves.values() if not save.failures}
        at_work = self._at_work and not self._retaining
        waiting = bool(self._withdrawn) or bool(self._calls) or self._calling > 0 or at_work
        return waiting or bool(phases & {Phase.COMPLETE, Phase.PERSISTING})

    async def quiet(self, timeout_s: float, *, leaving: int | None = None) -> bool:
        """
        Wait until nothing is queued or being persisted, and nothing that the rank `leaving` has sealed waits for the other ranks' seals.

        Blocks: up to timeout_s. False when the bound came first.
        """

        def busy() -> bool:
            pod = self._trainers.pod
            return self.busy() or (leaving is not None and pod is not None and pod.table.awaits_others(leaving))

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._quiet:
                await self._quiet.wait_for(lambda: not busy())
        return not busy()

    def retains(self) -> bool:
        """Whether retention is owed."""
        return self._retain_after is not None

    async def tidied(self, timeout_s: float) -> None:
        """Wait until retention is done, too. Blocks: up to timeout_s; what is left then, the next session removes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._quiet:
                await self._quiet.wait_for(lambda: not self.retains())

    async def settled(self, timeout_s: float) -> None:
        """
        As `quiet`, for trainers that come back: their load takes the newest snapshot from memory, so that they do not wait for other
        pods to agree on a rescue, which those that have gone on will never do.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._quiet:
                await self._quiet.wait_for(lambda: not self.busy() or self._only_agreeing())

    def _only_agreeing(self) -> bool:
        pod = self._trainers.pod
        saves = pod.table.saves.values() if pod is not None else ()
        at_work = any(save.phase in (Phase.COMPLETE, Phase.PERSISTING) and not save.failures for save in saves)
        return not at_work and not self._withdrawn and (self._agreeing or not self._at_work)

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (job := self._next()) is not None:
                self._at_work = True
                try:
                    await job
                except Exception:  # a boundary: the loop outlives any one save
                    _log.exception("internal error while saving")
                finally:
                    self._at_work = False
                self._on_release()
            async with self._quiet:
                self._quiet.notify_all()

    def _next(self) -> Awaitable[None] | None:
        pod = self._trainers.pod
        if pod is None:
            return None
        if self._withdrawn:
            step, persist, rescued, error = self._withdrawn.pop(0)
            return self._withdraw(pod, step, error, persist=persist, rescued=rescued)
        save = pod.table.next_to_persist()
        if save is not None:
            pod.table.start_persist(save)
            return self._persist(pod, save)
        if self._calls:
            return self._rescue(pod)
        if self._retain_after is not None:
            return self._retain(pod, self._retain_after)
        return None

    async def _withdraw(self, pod: PodArena, step: int, error: ErrorDocument, *, persist: bool, rescued: bool) -> None:
        answer = await self._executor_client.withdraw(pod, step, error, persist=persist, rescued=rescued)
        if answer is not None and self._trainers.pod is pod:
            self._trainers.broadcast(events.SaveFailures(step=step, error=failures.document(answer)))

    async def _retain(self, pod: PodArena, step: int) -> None:
        """One slice of retention. It fails no save: what stays is tried again after the next commit."""
        self._retaining, more = True, False
        async with self._quiet:
            self._quiet.notify_all()
        try:
            more = await self._executor_client.retain(pod, step, RETENTION_SLICE_S)
        except PillionError as err:
            _log.warning("retention after step %d stopped early: %s", step, err, extra={"step": step})
        finally:
            self._retaining = False
            if not more and self._retain_after == step:
                self._retain_after = None

    async def _persist(self, pod: PodArena, save: Save) -> None:
        """Bring a save to its end, whatever happens: one that had none would keep its slot, and everybody who waits, for ever."""
        try:
            await self._persist_whole(pod, save)
        except Exception as err:  # a boundary: a slot whose header is damaged, or a defect of ours
            _log.exception("internal error while saving step %d", save.step, extra={"step": save.step})
            if self._trainers.pod is not pod or save.phase is Phase.DONE:
                return
            failure = RemoteFailure(type(err).__name__, str(err))
            error = SaveError("the save failed", step=save.step, failures=dict.fromkeys(pod.segments, failure))
            self.withdraw(save.step, error, persist=save.persist, rescued=save.persist and save.snapshot)
            pod.table.finish(save, persisted=False, hopeless=True)
            self.report_failed(save, error)

    async def _persist_whole(self, pod: PodArena, save: Save) -> None:
        pod.mark(save, arena.SlotState.PERSISTING)
        outcome, error = await self._run(pod, save)
        if self._trainers.pod is not pod:
            # Its trainers are gone, others are there, and its segments are closed: nobody waits for it.
            if outcome is not None and save.persist:
                self._sidecar_status.committed(save.step, outcome)
            _log.warning(
                "step %d belongs to the previous session: %s", save.step, error or "done", extra={"step": save.step}
            )
            return
        persisted = outcome is not None and save.taken_for_storage
        hopeless = outcome is None and (error is None or failures.is_hopeless(error))
        order = outcome.get("order") if outcome is not None and persisted else None
        again = pod.table.finish(
            save,
            persisted=persisted,
            concluded=not hopeless,
            hopeless=hopeless,
            born=(int(order[0]), int(order[1])) if order else None,
        )
        try:
            pod.mark(save, arena.SlotState.SEALED, persisted=persisted, concluded=True)
        except ValueError as err:
            # What was committed is committed; who finds the arena after us does without this slot.
            _log.error("the slot of step %d is damaged: %s", save.step, err, extra={"step": save.step})
        if again:  # its trainer died meanwhile: see rescue
            return
        if outcome is None:
            self.report_failed(save, error or SaveError("the save failed", step=save.step))
        else:
            self._committed(pod, save, outcome)

    async def _run(self, pod: PodArena, save: Save) -> tuple[dict[str, Any] | None, SaveError | None]:
        """Have the executor persist a save, by PERSIST_ATTEMPTS executors at most; the outcome, or the last error."""

        def failed(failure: RemoteFailure, text: str = "the save failed") -> SaveError:
            return SaveError(text, step=save.step, failures=dict.fromkeys(pod.segments, failure))

        error: SaveError | None = None
        for attempt in range(PERSIST_ATTEMPTS):
            self._sidecar_status.taken_up(save.step)
            about = self._sidecar_status.about(save.step)
            try:
                outcome = await self._executor_client.persist(pod, save, about, repeated=attempt > 0 or save.adopted)
            except ExecutorHung as err:
                is_storage = err.kind == WaitKind.STORAGE
                hung = RemoteFailure("StorageHung", str(err)) if is_storage else RemoteFailure("PeersHung", str(err))
                error = PersistError("nothing came back", step=save.step, failures=dict.fromkeys(pod.segments, hung))
                if is_storage:
                    # Not once more: it would stand still again, and what comes after may go to a storage that works.
                    wanted = save.taken_for_storage
                    self.withdraw(save.step, error, persist=wanted, rescued=wanted and save.snapshot)
                    return None, error
            except ExecutorDied as err:
                error = failed(RemoteFailure("ExecutorDied", str(err)), "the executor died")
                if attempt + 1 < PERSIST_ATTEMPTS:
                    _log.warning("repeating step %d with a new executor: %s", save.step, err)
            except SaveError as err:
                return None, failures.for_local_ranks(err, list(pod.segments))
            except PillionError as err:
                return None, failed(RemoteFailure(type(err).__name__, str(err)))
            else:
                return self._sidecar_status.since_ready(save.step, outcome), None
        return None, error

    def _committed(self, pod: PodArena, save: Save, outcome: Mapping[str, Any]) -> None:
        if save.persist:
            self._sidecar_status.committed(save.step, outcome)
            self._warn_of(outcome.get("differing", ()), pod)
            if save.destination is None and pod.identity.local_ranks[0] == 0 and pod.policy.storage.writer is None:
                self._retain_after = save.step
        else:
            self._sidecar_status.snapshot()
        _log.info(
            "step %d is %s",
            save.step,
            "committed" if save.persist else "sealed on every rank",
            extra={"step": save.step, "bytes": outcome["size_bytes"], "elapsed_s": outcome["persist_s"]},
        )
        told = {name: outcome[name] for name in ("path", "size_bytes", "persist_s", "commit_s") if name in outcome}
        self._trainers.broadcast(events.Committed(step=save.step, **told))

    def _warn_of(self, differing: Sequence[str], pod: PodArena) -> None:
        """Tell rank 0's trainer, once for each set of names, that storage keeps one rank's value of several."""
        if not differing or differing == self._warned_of or 0 not in pod.segments:
            return
        self._warned_of = differing
        more = f" and {len(differing) - NAMES_SHOWN} more" if len(differing) > NAMES_SHOWN else ""
        text = (
            f"each rank has its own value of {', '.join(differing[:NAMES_SHOWN])}{more}: storage keeps the lowest rank's, and a load from"
            " there gives it to all ranks. Give each rank's value a key of its own"
        )
        _log.warning(text)
        self._trainers.notice(0, text)

    def report_failed(self, save: Save, error: SaveError, *, but: int | None = None, more: bool = False) -> None:
        """
        Tell the trainers of this pod that a save made no checkpoint; `but` is the rank that knows already. `more`: other ranks may have
        failed, too, which is told later.
        """
        step = save.step
        if isinstance(error, SaveSkipped):
            # Another pod had no slot for it, as the policy's `overlap` allows.
            self._sidecar_status.metrics.saves_skipped += 1
            self._sidecar_status.dropped(step, error, persist=save.persist)
            _log.info("save of step %d was dropped: %s", step, error, extra={"step": step})
        else:
            self._sidecar_status.failed(step, error)
            _log.error("save of step %d failed: %s", step, error, extra={"step": step})
        event = events.SaveFailed(step=step, error=failures.document(error), more=more)
        self._trainers.broadcast(event, but=but)
        # Whoever waits until it is quiet may wait for this save's end alone.
        self.wake()
