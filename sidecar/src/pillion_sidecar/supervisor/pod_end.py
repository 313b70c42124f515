"""
The end of a pod: the trainers' last save, what is still in memory, and then the trainers themselves.

    preStop (`pillion-sidecar notify`) --> save_now --> the last save is committed --> `end` to trainers that do not end by themselves
    SIGTERM                            --> save_now --> drain (`app`)

A container's first process ignores a SIGTERM that it has no handler for, and the kubelet waits for it until the grace period is over,
which injection raised by the drain's time. So the sidecar ends what has nothing to wait for any more.

Called from: the supervisor. Must never: end trainers whose pod goes on. A kubelet that restarts the sidecar alone (a failed liveness probe)
runs preStop as well; it then sends SIGTERM at once, while the trainers live.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from pillion.wire import events, policy
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

LAST_SAVE_S: Final = 10.0
"""How long a pod that is to end waits for living trainers to make one more save: a few of their steps. Then the newest snapshot goes to
storage as it is: they may hang."""
UNTIL_END_S: Final = 30.0
"""How long trainers that make no last save are left to themselves: as long as a pod has by default. A step may take a minute, but nobody
without Pillion would wait for it."""
SIGNAL_FOLLOWS_S: Final = 5.0
"""After preStop no trainer is ended for this long: a kubelet that restarts the sidecar alone sends SIGTERM as soon as preStop has
returned."""
POLL_S: Final = 0.1


class PodEnd:
    """
    See the module.

    Args:
        in_pod: a kubelet ends both; without a cluster whoever starts a trainer ends it.
    """

    def __init__(
        self,
        sidecar_status: SidecarStatus,
        trainers: Trainers,
        persister: Persister,
        tasks: tasks_module.BackgroundTasks,
        *,
        in_pod: bool,
    ) -> None:
        self._in_pod = in_pod
        self._sidecar_status = sidecar_status
        self._trainers = trainers
        self._persister = persister
        self._tasks = tasks
        self._signalled = False
        self.ends_trainers = False
        """The trainers have nothing to wait for: those that are here, and those that somebody starts again, are ended."""

    def begin(self, *, signalled: bool) -> bool:
        """
        The pod is to end: living trainers are asked for one more save, as early as possible; whether they were.

        The first call counts: the kubelet's preStop comes at the start of the grace period, SIGTERM when trainers are gone.

        Args:
            signalled: by SIGTERM, which this process obeys; else by preStop, which is about the pod.
        """
        pod, first = self._trainers.pod, not self._sidecar_status.terminating
        self._sidecar_status.terminating = True
        self._signalled = self._signalled or signalled
        if not first:
            return False
        if pod is None or not self._trainers.clients:
            if self._in_pod and not signalled:
                self._tasks.start(self._end_comers(), "ending trainers that come")
            return False
        wanted = pod.policy.trigger.on_termination is policy.OnTermination.SAVE
        if self._in_pod and not signalled and pod.policy.drain.end_trainer:
            self._tasks.start(self._end_trainers(pod, wanted=wanted), "ending the trainers")
        if not wanted:
            return False
        _log.info("the pod is terminating: requesting a last save from the trainers")
        self._trainers.save_now()
        self._tasks.start(self._flush(pod), "flush")
        return True

    async def _flush(self, pod: PodArena) -> None:
        """Persist the newest snapshot although the trainers live, when they make no newer one: they may hang."""
        before = pod.table.newest_complete()
        deadline = time.monotonic() + LAST_SAVE_S
        while pod.table.newest_complete() is before and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        self._persister.rescue()

    async def _end_trainers(self, pod: PodArena, *, wanted: bool) -> None:
        """End them once their last save, or what they had, is on storage. Blocks: for the drain's time at most; then the kubelet does."""
        begun = time.monotonic()
        bound_s = float(pod.policy.drain.timeout_seconds)
        wait_s = min(UNTIL_END_S, bound_s) if wanted else 0.0
        while time.monotonic() - begun < wait_s and not self._sidecar_status.last_save_committed:
            await asyncio.sleep(POLL_S)
        if wanted and not self._sidecar_status.last_save_committed:
            self._persister.rescue()
        await asyncio.sleep(max(0.0, begun + SIGNAL_FOLLOWS_S - time.monotonic()))
        drained = await self._persister.quiet(max(0.0, begun + bound_s - time.monotonic()))
        if drained and not self._signalled and self._trainers.pod is pod:
            _log.info("the last save is on storage: ending trainers without a SIGTERM handler of their own")
            self._end()

    async def _end_comers(self) -> None:
        """Trainers that were still starting when the pod was to end have nothing to save."""
        await asyncio.sleep(SIGNAL_FOLLOWS_S)
        if not self._signalled:
            self._end()

    def _end(self) -> None:
        self.ends_trainers = self._sidecar_status.trainers_end = True
        for client in list(self._trainers.clients.values()):
            self.joined(client)

    def joined(self, client: TrainerConnection) -> None:
        """A trainer is here; in a pod whose trainers are ended it is ended too, whoever has started it."""
        pod = self._trainers.pod
        if self.ends_trainers and pod is not None and pod.policy.drain.end_trainer:
            client.send(events.End())
