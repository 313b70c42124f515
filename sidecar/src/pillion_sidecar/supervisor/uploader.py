"""
The uploads of this pod: brings saves that are on the local disks to storage, one at a time, the newest first.

Called from: `supervisor.persister` (held), the supervisor (start, events), `supervisor.loader` (loaded). Never imports torch.

    held, found, loaded --> the copies that wait --> executor, beside the saves
                               older than the chosen one: passed over, and said so

All pods of a job hold the same copies, so that all of them begin an upload; the coordinator's newest copy is the one. An upload that fails is tried
again, also with a newer copy, as long as the session lasts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from pillion.errors import PillionError, SaveError, SaveSkipped
from pillion.wire import events
from pillion_sidecar import channel
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.channel import LocalCopy
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.copies.disk import LocalCopyLost
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import failures
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.executor_process import ExecutorDied
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

PAUSES_S: Final = (1.0, 5.0, 15.0)
"""Pauses after an upload that failed; the last one is repeated. The executor has tried for 20 s itself before an upload fails of what may pass."""
MAX_WAITING: Final = 64
"""Maximum copies that wait. Far fewer are on the disk (`copies.disk.KEPT_COPIES`)."""
MAX_DEATHS: Final = 2
"""Maximum executors that die of one upload before it counts as failed."""
LOST: Final = LocalCopyLost.__name__
"""Kind of the failure of a rank whose copy is damaged or gone: no other attempt can succeed."""


class Uploader:
    """
    See the module.

    Args:
        sidecar_status: counters and failures of this sidecar.
        trainers: the trainers to report to.
        executor_client: the executor.
        on_committed: called with each step that is on storage now.
        on_idle: called when an upload has ended, well or not.
    """

    def __init__(
        self,
        sidecar_status: SidecarStatus,
        trainers: Trainers,
        executor_client: ExecutorClient,
        *,
        on_committed: Callable[[int], None],
        on_idle: Callable[[], None],
    ) -> None:
        self._sidecar_status = sidecar_status
        self._trainers = trainers
        self._executor_client = executor_client
        self._on_committed = on_committed
        self._on_idle = on_idle
        self._waiting: list[LocalCopy] = []
        """Copies that wait or are being uploaded, oldest first."""
        self._of: PodArena | None = None
        """Arena of the session that the copies belong to."""
        self._first_try_s: float | None = None
        """When the first upload since the last commit began, monotonic seconds. None: there was none."""
        self._wake = asyncio.Event()

    def start(self, tasks: tasks_module.BackgroundTasks) -> None:
        tasks.start(self._work(), "uploading")

    def held(self, pod: PodArena, copy: LocalCopy) -> None:
        """Note that every pod holds a copy that is to go to storage."""
        if self._of is not pod:
            self._waiting, self._of, self._first_try_s = [], pod, None
        if copy not in self._waiting:
            self._waiting.append(copy)
            self._waiting.sort(key=lambda each: (each.order, each.step))
            del self._waiting[:-MAX_WAITING]
        self._report()
        self._wake.set()

    def found(self, event: channel.CopiesFound) -> None:
        """Take up copies that an executor or sidecar before has left."""
        pod = self._trainers.pod
        if pod is not None and pod.identity.session == event.session:
            for copy in event.copies:
                self.held(pod, copy)

    def chosen(self, event: channel.UploadChosen) -> None:
        """Note which copy the pods have agreed on. Older ones are passed over."""
        self._executor_client.note_upload(event.number, event.copy)
        chosen = event.copy
        older = [each for each in self._waiting if (each.order, each.step) < (chosen.order, chosen.step)]
        self._waiting = [each for each in self._waiting if each not in older]
        for copy in older:
            self._sidecar_status.metrics.saves_passed_over += 1
            error = SaveSkipped(
                f"step {copy.step} was on the local disks only, and was passed over: step {chosen.step}, which is newer, goes to storage in its place",
                step=copy.step,
            )
            self._sidecar_status.dropped(copy.step, error, persist=True)
            _log.info("step %d was passed over for step %d", copy.step, chosen.step, extra={"step": copy.step})
            self._trainers.broadcast(events.SaveFailed(step=copy.step, error=failures.document(error)))
        self._report()

    def owes(self, step: int) -> bool:
        """Whether a copy of a step waits for storage, or is on its way."""
        return self._of is self._trainers.pod and any(copy.step == step for copy in self._waiting)

    def busy(self) -> bool:
        """Whether a copy waits for storage, or is on its way."""
        return self._of is not None and self._of is self._trainers.pod and bool(self._waiting)

    def _report(self) -> None:
        self._sidecar_status.uploads_wait([copy.step for copy in self._waiting])

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            failed = deaths = 0
            while (pod := self._trainers.pod) is not None and pod is self._of and self._waiting:
                try:
                    await self._upload(pod, repeated=deaths > 0)
                except ExecutorDied as err:
                    deaths += 1
                    _log.warning("repeating an upload with a new executor: %s", err)
                    if deaths < MAX_DEATHS:
                        continue
                    self._failed(pod, err)
                except PillionError as err:
                    self._failed(pod, err)
                except Exception as err:  # a boundary: an error of one upload must not end this loop
                    _log.exception("internal error while uploading")
                    self._failed(pod, SaveError(f"{type(err).__name__}: {err}"))
                else:
                    failed = deaths = 0
                    continue
                deaths = 0
                pause_s = PAUSES_S[min(failed, len(PAUSES_S) - 1)]
                failed += 1
                await asyncio.sleep(pause_s)
            self._on_idle()

    async def _upload(self, pod: PodArena, *, repeated: bool) -> None:
        number, resumed = self._executor_client.uploads
        copy = resumed
        if copy is None and pod.identity.local_ranks[0] == 0:
            copy = self._waiting[-1]
        if self._first_try_s is None:
            self._first_try_s = time.monotonic()
        request = channel.Upload(
            session=pod.identity.session,
            number=number,
            copy=copy,
            repeated=repeated or resumed is not None,
            retention=pod.policy.retention,
            run=None if copy is None else self._sidecar_status.journal_with(copy.step),
        )
        outcome = await self._executor_client.upload(pod, request)
        if self._trainers.pod is not pod:
            return
        self._executor_client.upload_ended(number)
        self._first_try_s = None
        self._waiting = [each for each in self._waiting if each.step != outcome.step]
        self._committed(pod, outcome)

    def _committed(self, pod: PodArena, outcome: channel.Persisted) -> None:
        step = outcome.step
        self._sidecar_status.committed(step, outcome)
        pod.held_by_all(step, persisted=True)
        _log.info(
            "step %d is committed, from the local disks",
            step,
            extra={"step": step, "bytes": outcome.size_bytes, "elapsed_s": outcome.persist_s},
        )
        self._report()
        self._on_committed(step)
        self._trainers.broadcast(
            events.Committed(
                step=step,
                path=outcome.path,
                size_bytes=outcome.size_bytes,
                persist_s=outcome.persist_s,
                commit_s=outcome.commit_s,
            )
        )
        self._on_idle()

    def _failed(self, pod: PodArena, err: PillionError) -> None:
        """Note that an upload has failed. Its copy waits on, unless it is lost."""
        number, chosen = self._executor_client.uploads
        if self._trainers.pod is not pod:
            return
        if chosen is None:
            # The coordinator has not said what to upload. It is behind, and the next try has the same number.
            _log.warning("an upload could not begin: %s", err)
            return
        self._executor_client.upload_ended(number)
        lost = any(failure.type_name == LOST for failure in getattr(err, "failures", {}).values())
        _log.error("the upload of step %d failed: %s", chosen.step, err, extra={"step": chosen.step})
        self._sidecar_status.upload_failed(chosen.step, err)
        if lost or self._is_overdue():
            self._tell(chosen.step, err)
        if lost:
            self._waiting = [each for each in self._waiting if each != chosen]
            self._report()

    def _is_overdue(self) -> bool:
        began_s = self._first_try_s
        return began_s is not None and time.monotonic() - began_s > self._executor_client.persist_timeout_s

    def _tell(self, step: int, err: PillionError) -> None:
        """Let the trainers' handles fail. The copy is uploaded later all the same, if it can be."""
        error = (
            failures.for_local_ranks(err, list(self._trainers.require_pod().segments))
            if isinstance(err, SaveError)
            else err
        )
        self._trainers.broadcast(events.SaveFailed(step=step, error=failures.document(error)))
