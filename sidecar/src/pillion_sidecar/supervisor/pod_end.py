"""
The end of a pod: requests a last save from the trainers, writes the newest snapshot to storage, and then ends the trainers.

    preStop (`pillion-sidecar notify`) --> save_now --> the last save is committed --> `end` to trainers that do not end by themselves
    SIGTERM                            --> save_now --> drain (`app`)

The kernel does not deliver a SIGTERM without a handler to a container's first process. The kubelet would wait for such a trainer for the
whole grace period, which injection has extended by the drain's time. So the sidecar ends trainers that need not wait any longer.

Called from: the supervisor. Must never: end trainers whose pod continues. If a kubelet restarts only the sidecar (after a failed liveness
probe), it runs preStop as well, and sends SIGTERM right after it, while the trainers live.
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

LAST_SAVE_TIMEOUT_S: Final = 10.0
"""Timeout for one more save by living trainers, a few of their steps. Then the newest snapshot goes to storage, as the trainers may
hang."""
UNTIL_END_S: Final = 30.0
"""Time until trainers without a last save are ended: the default grace period of a pod. A step may take a minute, but without Pillion
Kubernetes would not wait for it either."""
SIGNAL_FOLLOWS_S: Final = 5.0
"""Time after preStop in which no trainer is ended. A kubelet that restarts only the sidecar sends SIGTERM as soon as preStop has
returned."""
POLL_S: Final = 0.1
"""Pause between two checks for the last save."""


class PodEnd:
    """
    The end of this pod. See the module.

    Args:
        sidecar_status: counters and failures of this sidecar.
        trainers: the trainers of this pod.
        persister: the saves of this pod.
        tasks: runs the waits of this module.
        in_pod: True if a kubelet ends the trainers' containers. Without a cluster, the trainers end by themselves.
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
        """True once the trainers are ended: those that are connected, and those that connect later."""

    def begin(self, *, signalled: bool) -> bool:
        """
        Request one more save from the living trainers, because the pod ends. Return whether it was requested.

        Only the first call requests it. The kubelet runs preStop at the beginning of the grace period, and sends SIGTERM after the trainers
        have ended.

        Args:
            signalled: True for a SIGTERM, which ends this process; False for preStop.
        """
        pod, first = self._trainers.pod, not self._sidecar_status.terminating
        self._sidecar_status.terminating = True
        self._signalled = self._signalled or signalled
        if not first:
            return False
        if pod is None or not self._trainers.clients:
            if self._in_pod and not signalled:
                self._tasks.start(self._end_late_trainers(), "ending late trainers")
            return False
        saves = pod.policy.trigger.on_termination is policy.OnTermination.SAVE
        if self._in_pod and not signalled and pod.policy.drain.end_trainer:
            self._tasks.start(self._end_trainers(pod, saves=saves), "ending the trainers")
        if not saves:
            return False
        _log.info("the pod is terminating: requesting a last save from the trainers")
        self._trainers.save_now()
        self._tasks.start(self._flush(pod), "flush")
        return True

    async def _flush(self, pod: PodArena) -> None:
        """Wait for the last save. If it does not come in time, persist the newest snapshot, as the trainers may hang."""
        before = pod.table.newest_complete()
        deadline = time.monotonic() + LAST_SAVE_TIMEOUT_S
        while pod.table.newest_complete() is before and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        self._persister.rescue()

    async def _end_trainers(self, pod: PodArena, *, saves: bool) -> None:
        """
        End the trainers when their last save, or else the newest snapshot, is on storage.

        Args:
            pod: the arena of the session.
            saves: whether the policy requests a last save.

        Blocks: up to the policy's drain.timeoutSeconds. Afterwards the kubelet ends the trainers.
        """
        begun = time.monotonic()
        bound_s = float(pod.policy.drain.timeout_seconds)
        wait_s = min(UNTIL_END_S, bound_s) if saves else 0.0
        while time.monotonic() - begun < wait_s and not self._sidecar_status.last_save_committed:
            await asyncio.sleep(POLL_S)
        if saves and not self._sidecar_status.last_save_committed:
            self._persister.rescue()
        await asyncio.sleep(max(0.0, begun + SIGNAL_FOLLOWS_S - time.monotonic()))
        drained = await self._persister.quiet(max(0.0, begun + bound_s - time.monotonic()))
        if drained and not self._signalled and self._trainers.pod is pod:
            _log.info("the last save is on storage: ending trainers without a SIGTERM handler of their own")
            self._end()

    async def _end_late_trainers(self) -> None:
        """End trainers that connect after the pod's end has begun. They have nothing to save."""
        await asyncio.sleep(SIGNAL_FOLLOWS_S)
        if not self._signalled:
            self._end()

    def _end(self) -> None:
        self.ends_trainers = self._sidecar_status.trainers_end = True
        for client in list(self._trainers.clients.values()):
            self.joined(client)

    def joined(self, client: TrainerConnection) -> None:
        """End a trainer that has just connected, if the pod's trainers are ended."""
        pod = self._trainers.pod
        if self.ends_trainers and pod is not None and pod.policy.drain.end_trainer:
            client.send(events.End())
