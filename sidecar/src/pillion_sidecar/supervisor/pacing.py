"""
The automatic interval of a job (`trigger.auto`): measures, chooses the period, and lets rank 0 announce it. Only in the coordinator's pod.

    the first session of a root   two saves soon after the start, which are measured; then the period
    a later session               the last session's costs give the period at once, and its end counts as a failure if it was none in order
    each commit                   measured again; a period that differs enough is announced, like a changed policy

Called from: the supervisor. `pillion_sidecar.interval`, which is pure, has the formula. The ranks agree on the step from which a period
holds as on any change of the policy (docs/decisions/0016).
Must never: hold up a save, a load or a hello. The note on the root is read and written in a thread of its own, and may be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from typing import Final

from pillion.errors import PillionError
from pillion.wire import policy
from pillion_sidecar import interval as interval_module
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.checkpoint import trainings
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor.root_access import RootAccess
from pillion_sidecar.supervisor.session_policy import POLICY_REPEAT_S, SessionPolicy
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

NOTE_PERIOD_S: Final = 300.0
"""Interval of the notes on the root while nothing changes. A crash loses so much time of training at most, which shortens the period a little."""
NOTE_TIMEOUT_S: Final = 10.0
"""Timeout for reading or writing the note. Without it the rate of failures is assumed."""
FAREWELL_NOTE_S: Final = 5.0
"""Timeout for the note of a clean end, for which the last trainer waits. If it is not written, the end counts as a failure."""
ASK_AGAIN_S: Final = 60.0
"""Time after which a save that was asked for, to be measured, is asked for again: it failed, or the loop has not come to it."""


class Pacing:
    """Chooses the automatic interval. See the module."""

    def __init__(
        self, sidecar_status: SidecarStatus, trainers: Trainers, session_policy: SessionPolicy, *, storage_ca: str
    ) -> None:
        self._status, self._trainers, self._policy = sidecar_status, trainers, session_policy
        self._root = RootAccess(storage_ca)
        self._wake = asyncio.Event()
        self._closed = False
        self._session = ""
        """Session that has begun here. Empty: none under `trigger.auto`."""
        self._note = trainings.Note()
        self._auto: policy.Auto | None = None
        """What the newest period was chosen for."""
        self._counted_s = 0.0
        """Monotonic time up to which the note has the time of training."""
        self._written_s = 0.0
        self._asked: tuple[int, float] = (-1, 0.0)
        """Number of staged saves when the newest save was asked for, and when."""
        self._told_s = 0.0
        sidecar_status.listen(self._wake.set)

    def start(self, tasks: tasks_module.BackgroundTasks) -> None:
        tasks.start(self._run(), "pacing")

    def close(self) -> None:
        """Let the work end after its current call. Blocks: never."""
        # Python 3.11 loses a cancellation that meets the end of a `wait_for`, so the loop looks for itself.
        self._closed = True
        self._wake.set()
        self._root.close()

    def wake(self) -> None:
        """Look again: a trainer has joined, or the policy has changed."""
        self._wake.set()

    def joined(self, rank: int) -> None:
        """Note that a trainer has joined. Rank 0's knows no automatic period yet."""
        if rank == 0:
            self._told_s = 0.0
            self._wake.set()

    async def left(self, *, clean: bool) -> None:
        """
        Note that the last trainer of this pod has left the session.

        Blocks: up to FAREWELL_NOTE_S, after a clean end under `trigger.auto`.
        """
        pod, session = self._trainers.pod, self._session
        if not clean or pod is None or not session or session != pod.identity.session:
            return
        self._session = ""
        self._count_time()
        self._note = dataclasses.replace(self._note, open="")
        await self._write(pod, FAREWELL_NOTE_S)

    async def _run(self) -> None:
        while not self._closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S):
                    await self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            try:
                await self._look()
            except PillionError as err:  # the policy of the environment is invalid; a trainer's hello says so
                _log.warning("no automatic interval: %s", err)

    async def _look(self) -> None:
        pod = self._trainers.pod
        if pod is None or 0 not in pod.segments or 0 not in self._trainers.clients:
            return
        whole = self._policy.current()
        auto = whole.trigger.auto
        if auto is None:
            self._auto, self._status.interval = None, None
            return
        if pod.identity.session != self._session:
            await self._begin(pod)
        self._choose(pod, whole.trigger, auto)
        if self._status.interval is None and not whole.suspend:
            self._ask()
        now_s = time.monotonic()
        if now_s - self._written_s >= NOTE_PERIOD_S:
            self._count_time()
            await self._write(pod, NOTE_TIMEOUT_S)

    async def _begin(self, pod: PodArena) -> None:
        """Begin a session: read what the root knows, and count the session before as failed if it did not end in order."""
        session = pod.identity.session
        self._status.measured.begin()
        note = await self._read(pod)
        if note.open not in ("", session):
            note = dataclasses.replace(note, history=note.history.failed())
        self._session, self._counted_s = session, time.monotonic()
        self._note = dataclasses.replace(note, open=session)
        self._asked, self._auto, self._status.interval = (-1, 0.0), None, None
        await self._write(pod, NOTE_TIMEOUT_S)

    def _choose(self, pod: PodArena, trigger: policy.Trigger, auto: policy.Auto) -> None:
        self._count_time()
        note, world_size = self._note, pod.identity.world_size
        costs = self._status.measured.costs()
        if costs is None and note.world_size == world_size:
            costs = note.costs
        if costs is None:
            return
        bounds = interval_module.Bounds(
            overhead_percent=auto.overhead_percent,
            max_s=auto.max_seconds,
            more_than_steps=max(trigger.snapshot_steps or 0, trigger.local_steps or 0),
        )
        before = self._status.interval if auto == self._auto else None
        now = interval_module.steady(before, interval_module.choose(costs, note.history, world_size, bounds), bounds)
        now_s = time.monotonic()
        if now is not before:
            _log.info("automatic interval: %s", now.reason, extra={"steps": now.steps})
            self._status.paced(now)
            self._trainers.notice(0, f"automatic interval: {now.reason}", routine=True)
            self._auto, self._told_s, self._written_s = auto, 0.0, 0.0
            self._note = dataclasses.replace(note, costs=costs, world_size=world_size, steps=now.steps)
        if self._told_s == 0.0 or now_s - self._told_s >= POLICY_REPEAT_S:
            self._told_s = now_s
            self._policy.pace(now.steps)

    def _ask(self) -> None:
        """Ask for a save that can be measured, unless one is under way."""
        measured, now_s = self._status.measured, time.monotonic()
        under_way = measured.num_staged > measured.num_committed
        asked, asked_s = self._asked
        if now_s - asked_s < ASK_AGAIN_S and (asked == measured.num_staged or under_way):
            return
        self._asked = measured.num_staged, now_s
        self._trainers.save_now()

    def _count_time(self) -> None:
        now_s = time.monotonic()
        history = self._note.history.trained(now_s - self._counted_s)
        self._note, self._counted_s = dataclasses.replace(self._note, history=history), now_s

    async def _read(self, pod: PodArena) -> trainings.Note:
        if not pod.identity.root:
            return trainings.Note()
        try:
            root = self._root.open(pod.identity.root, self._policy.current())
            return await self._root.look_at(str(root), lambda: trainings.read(root), NOTE_TIMEOUT_S)
        except (PillionError, OSError) as err:
            _log.warning(
                "the history of the root's trainings cannot be read, so the rate of failures is assumed: %s", err
            )
            return trainings.Note()

    async def _write(self, pod: PodArena, timeout_s: float) -> None:
        note, self._written_s = self._note, time.monotonic()
        if not pod.identity.root:
            return
        try:
            root = self._root.open(pod.identity.root, self._policy.current())
            await self._root.look_at(str(root), lambda: trainings.write(root, note), timeout_s)
        except (PillionError, OSError) as err:
            _log.warning("the history of the root's trainings cannot be written: %s", err)
