"""
The second half of a save in this pod: sends complete saves to the executor, one at a time, and reports their outcome to the trainers.

Called from: `supervisor.staging` (wake, withdraw), the supervisor (start, rescue, quiet), `supervisor.loader` (quiet). Never imports torch, and
never touches user data. The pings of the executor bound each wait for it.

    complete saves, withdrawals --> _work: one at a time --> executor
                                      outcome --> every local rank, metrics, slots
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

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
from pillion_sidecar import channel
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import Save, SaveState
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import failures, signals
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.executor_process import ExecutorDied, ExecutorHung
from pillion_sidecar.supervisor.trainers import Trainers
from pillion_sidecar.supervisor.uploader import Uploader
from pillion_sidecar.waits import WaitKind

_log = logging.getLogger(__name__)

PERSIST_ATTEMPTS: Final = 2
"""Maximum executors that one snapshot is sent to. If two executors die of a snapshot, a third would die as well."""
MAX_REPEATED_RESCUES: Final = 3
"""Maximum repetitions in a session of a rescue that failed because of this pod. If the executor dies each time, the rescue kills it."""
RETENTION_SLICE_S: Final = 1.0
"""Duration of retention before saves and loads have their turn. The deletion of one file may take longer."""
REMEMBERED_RESCUES: Final = 64
"""Maximum answered calls to a rescue that are remembered. A late copy of such a call must not begin another rescue."""


class Persister:
    """
    The queue of complete saves, and the rescues of this pod. See the module.

    Args:
        sidecar_status: counters and failures of this sidecar.
        trainers: the trainers to report to.
        executor_client: the executor.
        uploader: takes the saves that are on the local disks.
        on_release: called when a slot may have become free.
    """

    def __init__(
        self,
        sidecar_status: SidecarStatus,
        trainers: Trainers,
        executor_client: ExecutorClient,
        uploader: Uploader,
        on_release: Callable[[], None],
    ) -> None:
        self._sidecar_status = sidecar_status
        self._trainers = trainers
        self._executor_client = executor_client
        self._uploader = uploader
        self._on_release = on_release
        self._withdrawn: list[tuple[int, bool, bool, ErrorDocument]] = []
        self._calls: dict[str, None] = {}
        """Ids of unanswered calls to a rescue, from other pods or this one, in order. (A dict without values.)"""
        self._calling = 0
        """Number of calls that this pod is sending."""
        self._answered: deque[str] = deque(maxlen=REMEMBERED_RESCUES)
        self._repeated = 0
        """Number of rescues in this session that this pod has repeated."""
        self._warned_about: Sequence[str] = ()
        """Names in the newest warning about values that differ from rank to rank."""
        self._at_work = self._agreeing = self._retaining = False
        self._retain_after: int | None = None
        """Step whose commit retention must still follow. Only the end of the session waits for retention. None: nothing to do."""
        self._tasks: tasks_module.BackgroundTasks | None = None
        self._wake = asyncio.Event()
        self._quiet = asyncio.Condition()

    def start(self, tasks: tasks_module.BackgroundTasks) -> None:
        self._tasks = tasks
        tasks.start(self._work(), "persisting")

    def wake(self) -> None:
        """Let the worker look for a save, a withdrawal or a call."""
        self._wake.set()

    def withdraw(self, step: int, error: SaveError, *, persist: bool, rescued: bool = False) -> None:
        """Report to the other pods, which wait for this pod's part of `step`, that it will not come. See `ExecutorClient.withdraw`."""
        pod = self._trainers.pod
        if pod is not None and len(pod.identity.pods) > 1:
            self._withdrawn.append((step, persist, rescued, ErrorDocument.from_exception(error)))
            self.wake()

    def _rescuable(self) -> Save | None:
        """Return the newest complete snapshot. None if it is on storage, or will be without a rescue."""
        pod = self._trainers.pod
        if pod is None or pod.policy.trigger.on_termination is not policy.OnTermination.SAVE or not pod.identity.root:
            return None
        complete = [
            save for save in pod.table.saves.values() if save.complete and not save.hopeless and not save.set_aside
        ]
        newest = max(complete, key=lambda save: save.order, default=None)
        if newest is None or newest.persisted or newest.destination is not None:
            return None
        is_queued = newest.persist and newest.state in (SaveState.COMPLETE, SaveState.PERSISTING)
        return None if is_queued or self._uploader.owes(newest.step) else newest

    def rescue(self) -> None:
        """Persist the newest complete snapshot, because its trainers cannot make another one. All pods of the job do it together."""
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
                # Without the store, each pod notices by itself that a rescue is needed.
                await self._executor_client.signal(pod, signals.RescueCalled(id=call))
        finally:
            self._calling -= 1
            if self._trainers.pod is pod:
                self.rescue_called(call)
            self.wake()

    def rescue_called(self, call: str) -> None:
        """Note a call to a rescue by its id, from this pod or another one. Ignore it if a rescue has answered it already."""
        if call not in self._answered and self._trainers.pod is not None:
            self._calls[call] = None
            self.wake()

    def rescue_in_turn(self, pod: PodArena, load: int) -> None:
        """Queue a rescue after load number `load`. Every pod does this, so no call needs to be sent."""
        self.rescue_called(f"{pod.identity.session}/load/{load}")

    def forget_calls(self) -> None:
        """Drop the calls of a session that is over."""
        self._calls.clear()
        self._repeated = 0

    async def _rescue(self, pod: PodArena) -> None:
        """Agree with the other pods on the newest snapshot that all of them have, and persist this pod's part of it."""
        pinned = pod.table.pin()
        calls = list(self._calls)
        self._agreeing = True
        async with self._quiet:
            self._quiet.notify_all()
        try:
            eligible = [
                save for save in pinned if save.destination is None and not save.hopeless and not save.set_aside
            ]
            held = sorted(eligible, key=lambda save: save.order)
            agreed = await self._executor_client.rescue(pod, held, calls, owed=self._uploader.owes)
            self._agreeing = False
            # This rescue answers the calls of all pods. A pod that began a rescue for one of them later would wait in vain.
            calls += agreed.calls
            if self._trainers.pod is pod:
                for persisted_step in agreed.persisted:
                    pod.held_by_all(persisted_step, persisted=True)
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
            elif self._missed_by_others(pod, err) and self._repeated < MAX_REPEATED_RESCUES:
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
        """Whether a rescue failed because of this pod. Then the other pods do not know that a repetition can succeed."""
        late = isinstance(err, BarrierTimeout) and not set(err.missing).isdisjoint(pod.identity.local_ranks)
        return late or isinstance(err, ExecutorDied)

    def busy(self, *, uploads: bool = True) -> bool:
        """
        Whether a save, a withdrawal, a rescue or (with `uploads`) an upload is queued or at work. Retention does not count.

        A load need not wait for uploads, because the local disks have what they bring to storage.
        """
        if uploads and self._uploader.busy():
            return True
        pod = self._trainers.pod
        if pod is None:
            return False
        states = {save.state for save in pod.table.saves.values() if not save.failures}
        at_work = self._at_work and not self._retaining
        waiting = bool(self._withdrawn) or bool(self._calls) or self._calling > 0 or at_work
        return waiting or bool(states & {SaveState.COMPLETE, SaveState.PERSISTING})

    async def quiet(self, timeout_s: float, *, leaving: int | None = None, uploads: bool = True) -> bool:
        """
        Wait until no save, withdrawal or rescue is queued or at work.

        Args:
            timeout_s: timeout in seconds.
            leaving: a rank that wants to end. Its sealed saves that wait for other ranks' seals count as well.
            uploads: see `busy`.

        Returns:
            False if the timeout came first.

        Blocks: up to `timeout_s`.
        """

        def busy() -> bool:
            pod = self._trainers.pod
            return self.busy(uploads=uploads) or (
                leaving is not None and pod is not None and pod.table.awaits_others(leaving)
            )

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._quiet:
                await self._quiet.wait_for(lambda: not busy())
        return not busy()

    def retain_after(self, step: int) -> None:
        """Let retention follow the commit of a step, if this pod is the coordinator."""
        pod = self._trainers.pod
        if pod is not None and pod.identity.local_ranks[0] == 0 and pod.policy.storage.writer is None:
            self._retain_after = step
            self.wake()

    def retains(self) -> bool:
        """Whether retention has still to follow a commit."""
        return self._retain_after is not None

    async def tidied(self, timeout_s: float) -> None:
        """Wait until retention is done. Blocks: up to `timeout_s`. The next session deletes the rest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._quiet:
                await self._quiet.wait_for(lambda: not self.retains())

    async def settled(self, timeout_s: float) -> None:
        """
        Wait as `quiet` does, but not for the agreement of a rescue. For trainers that start again in the same pods.

        Their load takes the newest snapshot from memory. Other pods that already serve the next session will never take part in a rescue of
        this one.

        Blocks: up to `timeout_s`.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._quiet:
                await self._quiet.wait_for(lambda: not self.busy(uploads=False) or self._only_agreeing())

    def _only_agreeing(self) -> bool:
        pod = self._trainers.pod
        saves = pod.table.saves.values() if pod is not None else ()
        at_work = any(save.state in (SaveState.COMPLETE, SaveState.PERSISTING) and not save.failures for save in saves)
        return not at_work and not self._withdrawn and (self._agreeing or not self._at_work)

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (job := self._next()) is not None:
                self._at_work = True
                try:
                    await job
                except Exception:  # a boundary: an error of one save must not end this loop
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
        """Run one slice of retention. An error fails no save; retention after the next commit tries again."""
        self._retaining, more = True, False
        async with self._quiet:
            self._quiet.notify_all()
        try:
            answer = await self._executor_client.retain(pod, step, RETENTION_SLICE_S)
            more = answer.more
            if answer.over_quota and not self._sidecar_status.quota_problem:
                _log.warning("%s", answer.over_quota, extra={"step": step})
                self._trainers.notice(0, answer.over_quota)
            self._sidecar_status.quota(answer.over_quota)
        except PillionError as err:
            _log.warning("retention after step %d stopped early: %s", step, err, extra={"step": step})
        finally:
            self._retaining = False
            if not more and self._retain_after == step:
                self._retain_after = None

    async def _persist(self, pod: PodArena, save: Save) -> None:
        """Persist a save. After any error the save ends as failed; otherwise its slot would stay taken, and its waiters would hang."""
        try:
            await self._persist_whole(pod, save)
        except Exception as err:  # a boundary: the slot's header is damaged, or Pillion has a defect
            _log.exception("internal error while saving step %d", save.step, extra={"step": save.step})
            if self._trainers.pod is not pod or save.state is SaveState.DONE:
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
            # Another session has begun, and the segments of this one are closed. Nobody waits for the save.
            if outcome is not None and save.persist and not outcome.held:
                self._sidecar_status.committed(save.step, outcome)
            _log.warning(
                "step %d belongs to the previous session: %s", save.step, error or "done", extra={"step": save.step}
            )
            return
        persisted = outcome is not None and save.taken_for_storage and not outcome.held
        hopeless = outcome is None and (error is None or failures.is_hopeless(error))
        again = pod.table.finish(
            save,
            persisted=persisted,
            concluded=not hopeless,
            hopeless=hopeless,
            born=outcome.order if outcome is not None and (persisted or outcome.held) else None,
        )
        try:
            pod.mark(save, arena.SlotState.SEALED, persisted=persisted, concluded=True)
        except ValueError as err:
            # A commit stays valid. A later sidecar that adopts the arena cannot use this slot.
            _log.error("the slot of step %d is damaged: %s", save.step, err, extra={"step": save.step})
        if again:  # a trainer died meanwhile, and the snapshot must go to storage; see `rescue`
            return
        if outcome is None:
            self.report_failed(save, error or SaveError("the save failed", step=save.step))
        elif outcome.held:
            self._held(pod, save, outcome)
        else:
            self._committed(pod, save, outcome)

    def _held(self, pod: PodArena, save: Save, outcome: channel.Persisted) -> None:
        """Report a save that every pod has on its local disk. If it is to go to storage, the uploader has it from now on."""
        self._sidecar_status.held(save.step, outcome)
        _log.info(
            "step %d is on the local disks",
            save.step,
            extra={"step": save.step, "bytes": outcome.size_bytes, "elapsed_s": outcome.persist_s},
        )
        self._trainers.broadcast(events.Held(step=save.step))
        if save.persist and outcome.order is not None:
            self._uploader.held(pod, channel.LocalCopy(step=save.step, order=outcome.order))
        else:
            self._trainers.broadcast(events.Committed(step=save.step, path="", persist_s=outcome.persist_s))

    async def _run(self, pod: PodArena, save: Save) -> tuple[channel.Persisted | None, SaveError | None]:
        """Let at most PERSIST_ATTEMPTS executors persist a save. Return the outcome, or the last error."""

        def failed(failure: RemoteFailure, text: str = "the save failed") -> SaveError:
            return SaveError(text, step=save.step, failures=dict.fromkeys(pod.segments, failure))

        error: SaveError | None = None
        for attempt in range(PERSIST_ATTEMPTS):
            self._sidecar_status.taken_up(save.step)
            about = self._sidecar_status.about
            try:
                outcome = await self._executor_client.persist(pod, save, about, repeated=attempt > 0 or save.adopted)
            except ExecutorHung as err:
                # A save for the local disks does not wait for storage: an upload beside it did.
                is_storage = err.kind is WaitKind.STORAGE and not self._executor_client.writes_to_disk(pod, save)
                hung = RemoteFailure("StorageHung", str(err)) if is_storage else RemoteFailure("PeersHung", str(err))
                error = PersistError("nothing came back", step=save.step, failures=dict.fromkeys(pod.segments, hung))
                if is_storage:
                    # No second attempt: it would hang again, while the storage may work for a later save.
                    persist = save.taken_for_storage
                    self.withdraw(save.step, error, persist=persist, rescued=persist and save.snapshot)
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

    def _committed(self, pod: PodArena, save: Save, outcome: channel.Persisted) -> None:
        self._sidecar_status.local_disk(outcome.unheld)
        if save.persist:
            self._sidecar_status.committed(save.step, outcome)
            self._warn_about(outcome.differing, pod)
            if save.destination is None:
                self.retain_after(save.step)
        else:
            self._sidecar_status.snapshot()
        _log.info(
            "step %d is %s",
            save.step,
            "committed" if save.persist else "sealed on every rank",
            extra={"step": save.step, "bytes": outcome.size_bytes, "elapsed_s": outcome.persist_s},
        )
        self._trainers.broadcast(
            events.Committed(
                step=save.step,
                path=outcome.path,
                size_bytes=outcome.size_bytes,
                persist_s=outcome.persist_s,
                commit_s=outcome.commit_s,
            )
        )

    def _warn_about(self, differing: Sequence[str], pod: PodArena) -> None:
        """Warn rank 0's trainer, once for each set of names, that storage keeps only one rank's value of these names."""
        if not differing or differing == self._warned_about or 0 not in pod.segments:
            return
        self._warned_about = differing
        text = failures.differing_text(differing)
        _log.warning(text)
        self._trainers.notice(0, text)

    def report_failed(self, save: Save, error: SaveError, *, but: int | None = None, more: bool = False) -> None:
        """
        Report to the trainers of this pod that a save failed, except to the rank `but`, which knows it. `more`: other ranks may have failed as
        well, which another event reports later.
        """
        step = save.step
        if isinstance(error, SaveSkipped):
            # Another pod had no free slot for it, and the policy's `overlap` allows to drop it.
            self._sidecar_status.metrics.saves_skipped += 1
            self._sidecar_status.dropped(step, error, persist=save.persist)
            _log.info("save of step %d was dropped: %s", step, error, extra={"step": step})
        else:
            self._sidecar_status.failed(step, error)
            _log.error("save of step %d failed: %s", step, error, extra={"step": step})
        event = events.SaveFailed(step=step, error=failures.document(error), more=more)
        self._trainers.broadcast(event, but=but)
        # A caller of `quiet` may wait for this save only.
        self.wake()
