"""
The trainers of this pod: the arena of their session, their connections, and the messages to all of them.

Called from: the supervisor and its parts, which share one instance. A signal to all trainers of a job of several pods travels through the
executor and the job's store, and comes back to this pod in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from pillion import progress
from pillion.errors import SidecarError, UsageError
from pillion.wire import events
from pillion.wire.message import Message
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.supervisor import returning, signals
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.server import TrainerConnection

_log = logging.getLogger(__name__)

PARTING_TIMEOUT_S: Final = 10.0
"""Timeout of a hello for reading the last messages of a dead trainer. These are few."""


class Trainers:
    """The current session's arena and its connected trainers. See the module."""

    def __init__(
        self,
        executor_client: ExecutorClient,
        tasks: tasks_module.BackgroundTasks,
        *,
        on_policy: Callable[[signals.PolicySent], None],
        on_rescue: Callable[[str], None],
    ) -> None:
        self._pod: PodArena | None = None
        self.clients: dict[int, TrainerConnection] = {}
        self.idle_since = time.monotonic()
        self.parted = False
        """True once every trainer of the session has ended cleanly. Then an embedded sidecar is no longer needed."""
        self.crashed = False
        """True once a trainer of this session has died or ended by an exception. A restart may need the arena."""
        self.returning: tuple[returning.Process, ...] = ()
        """Trainers of an adopted session, until they have connected or another session has begun."""
        self._on_signal: Mapping[type[Message], Callable[[Any], None]] = {
            events.SaveNow: self._ask_for_save,
            signals.PolicySent: on_policy,
            signals.RescueCalled: lambda call: on_rescue(call.id),
        }
        """Handlers of signals. Signals without a handler are forwarded to the trainers of this pod."""
        self._executor_client = executor_client
        self._tasks = tasks

    @property
    def pod(self) -> PodArena | None:
        """The arena of the current session. None before the first session."""
        return self._pod

    def require_pod(self) -> PodArena:
        """
        Return the arena of the current session.

        Raises:
            SidecarError: no session is open.
        """
        if self._pod is None:
            raise SidecarError("no session is open")
        return self._pod

    def begin_session(self, pod: PodArena) -> None:
        """Make this the current session. The previous one has ended."""
        self._pod, self.crashed = pod, False

    def adopt_session(self, pod: PodArena, trainers: tuple[returning.Process, ...]) -> None:
        """Make this adopted session of an earlier sidecar the current one. Its trainers may connect again, or are dead."""
        self._pod, self.returning, self.crashed = pod, trainers, True

    def end_session(self) -> None:
        """Close the arena of the current session. Idempotent."""
        before, self._pod = self._pod, None
        if before is not None:
            before.close()

    async def let_return(self, session: str) -> None:
        """
        Wait for the trainers of an adopted session, before another session takes their place.

        Args:
            session: the session that wants to begin.

        Blocks: see `returning.wait`.

        Raises:
            UsageError: trainers of the adopted session live.
        """
        adopted = self.pod
        if not self.returning or adopted is None or adopted.identity.session == session:
            return
        alive = await returning.wait(self.returning, lambda: bool(self.clients))
        if alive and self.pod is adopted and not self.clients:
            raise UsageError(
                f"another training (run {adopted.identity.run_id!r}, process {alive[0]}) has this root, and its sidecar was just replaced:"
                " one job a root at a time"
            )
        self.returning = ()

    async def part_from_the_dead(self) -> None:
        """
        Wait until the connections of dead trainers have ended, so that these do not count as another job's trainers.

        Blocks: up to PARTING_TIMEOUT_S for each.
        """
        for client in [client for client in self.clients.values() if client.gone]:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PARTING_TIMEOUT_S):
                    await client.ended.wait()

    def join(self, rank: int, client: TrainerConnection) -> None:
        """Note that a rank's trainer has connected."""
        self.clients[rank] = client
        self.parted, self.returning = False, ()
        if self.pod is None:
            return
        self.pod.near[rank] = client.pid
        if self.clients.keys() == self.pod.segments.keys():
            # An adopted session counts as crashed until all of its trainers have connected, as they may be dead.
            self.crashed = False

    def taken(self, client: TrainerConnection) -> UsageError:
        """Return the error for a client that wants to open another session while these trainers are connected."""
        if client.pid > 0 and client.pid in {other.pid for other in self.clients.values()}:
            return UsageError(
                f"this process (pid {client.pid}) has this root open with another Checkpointer: close() that one first"
            )
        pids = ", ".join(f"rank {rank} in process {each.pid}" for rank, each in sorted(self.clients.items()))
        return UsageError(
            f"another job ({pids}) uses this root's sidecar now: one job a root at a time; ranks of one job call"
            " torch.distributed.init_process_group before they make a Checkpointer"
        )

    def broadcast(self, event: Message, *, but: int | None = None) -> None:
        """Send an event to the trainers of this pod, except to the rank `but`."""
        for rank, client in self.clients.items():
            if rank != but:
                client.send(event)

    def notice(self, rank: int, text: str, *, routine: bool = False) -> None:
        """Send a text to a rank's trainer, which logs it: as a warning, or if it is `routine` as information."""
        if rank in self.clients:
            self.clients[rank].send(events.Notice(text=text, routine=routine))

    def moved(self, event: events.Persisting) -> None:
        """Log how far a long save is, and tell the trainers, which log it if they wait for it."""
        how_far = progress.text(event.written_bytes, event.size_bytes, event.elapsed_s)
        _log.info("writing step %d: %s", event.step, how_far, extra={"step": event.step})
        self.broadcast(event)

    def signal(self, message: Message) -> None:
        """Send one of `signals.SIGNALS` to all pods of the job, including this one."""
        pod = self.pod
        if pod is None or len(pod.identity.pods) == 1:
            self.receive(message)
            return
        # In the background, because the executor may be busy, and the trainer's next message must not wait.
        self._tasks.start(self._signal(pod, message), "signal")

    async def _signal(self, pod: PodArena, message: Message) -> None:
        await self._executor_client.signal(pod, message)

    def receive(self, message: Message) -> None:
        """Handle a signal from any pod of this job."""
        self._on_signal.get(type(message), self.broadcast)(message)

    def _ask_for_save(self, event: events.SaveNow) -> None:
        # Rank 0 chooses the step, so that all ranks save at the same one.
        decider = self.clients.get(0)
        if decider is not None:
            decider.send(event)

    def save_now(self) -> None:
        """Request a save from the trainers, at a step that all of them have ahead of them."""
        if 0 in self.clients:
            self.receive(events.SaveNow())
        else:
            self.signal(events.SaveNow())
