"""
The trainers of this pod: the arena of their session, who of them is connected, and what they are told.

Called from: the supervisor and its parts, which share one of these. What all trainers of the job are told goes to those of this pod
at once, and to those of other pods through the executor and the job's store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from pillion.errors import SidecarError, UsageError
from pillion.wire import events
from pillion.wire.message import Message
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.supervisor import returning, signals
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.server import TrainerConnection

PARTING_S: Final = 10.0
"""How long a hello waits for what a dead trainer had said last to be read: a few messages."""


class Trainers:
    """See the module."""

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
        """Every trainer of the session ended well: an embedded sidecar is not needed any more."""
        self.crashed = False
        """A trainer of this session died, or ended by an exception: a restart may come for the arena."""
        self.returning: tuple[returning.Process, ...] = ()
        """Trainers of an adopted session, until they are here or others take their place."""
        self._heard: Mapping[type[Message], Callable[[Any], None]] = {
            events.SaveNow: self._ask_for_save,
            signals.PolicySent: on_policy,
            signals.RescueCalled: lambda call: on_rescue(call.id),
        }
        """What is more than an event for the trainers of this pod."""
        self._executor_client = executor_client
        self._tasks = tasks

    @property
    def pod(self) -> PodArena | None:
        """The arena of the current session; None before the first one."""
        return self._pod

    def require_pod(self) -> PodArena:
        """
        The arena of the current session.

        Raises:
            SidecarError: there is none.
        """
        if self._pod is None:
            raise SidecarError("no session is open")
        return self._pod

    def begin_session(self, pod: PodArena) -> None:
        """Trainers open a session; the one before has ended."""
        self._pod, self.crashed = pod, False

    def adopt_session(self, pod: PodArena, trainers: tuple[returning.Process, ...]) -> None:
        """Go on with the session of a sidecar before this one, whose trainers may come back, or have died."""
        self._pod, self.returning, self.crashed = pod, trainers, True

    def end_session(self) -> None:
        """Close the arena of the current session, once."""
        before, self._pod = self._pod, None
        if before is not None:
            before.close()

    async def let_return(self, session: str) -> None:
        """
        Give the trainers of an adopted session the time to come back, before others take their place.

        Raises:
            UsageError: they live.
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
        """Trainers whose processes have ended are no trainers of another job: the ends of their connections are waited for."""
        for client in [each for each in self.clients.values() if each.gone]:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PARTING_S):
                    await client.ended.wait()

    def join(self, rank: int, client: TrainerConnection) -> None:
        """A rank's trainer is here."""
        self.clients[rank] = client
        self.parted, self.returning = False, ()
        if self.pod is None:
            return
        self.pod.near[rank] = client.pid
        if self.clients.keys() == self.pod.segments.keys():
            # Of a session that was adopted nobody knew whether its trainers live: all of them do.
            self.crashed = False

    def taken(self, client: TrainerConnection) -> UsageError:
        """Why `client` cannot open another session now."""
        if client.pid > 0 and client.pid in {other.pid for other in self.clients.values()}:
            return UsageError(
                f"this process (pid {client.pid}) has this root open with another Checkpointer: close() that one first"
            )
        return UsageError(
            f"another job (ranks {sorted(self.clients)}) uses this root's sidecar now: one job a root at a time"
        )

    def broadcast(self, event: Message, *, but: int | None = None) -> None:
        """Tell the trainers of this pod."""
        for rank, client in self.clients.items():
            if rank != but:
                client.send(event)

    def notice(self, rank: int, text: str) -> None:
        """Have a trainer's log say something."""
        if rank in self.clients:
            self.clients[rank].send(events.Notice(text=text))

    def signal(self, message: Message) -> None:
        """Tell all of the job what is one of `signals.SIGNALS`: those of this pod at once, those of others through the executor."""
        pod = self.pod
        if pod is None or len(pod.identity.pods) == 1:
            self.heard(message)
            return
        # In the background: the executor may be busy, and this trainer's next message must not wait for it.
        self._tasks.start(self._signal(pod, message), "signal")

    async def _signal(self, pod: PodArena, message: Message) -> None:
        await self._executor_client.signal(pod, message)

    def heard(self, message: Message) -> None:
        """What a trainer or sidecar of this job told all of them."""
        self._heard.get(type(message), self.broadcast)(message)

    def _ask_for_save(self, event: events.SaveNow) -> None:
        # Rank 0 decides at which step, so that all ranks save at the same one.
        decider = self.clients.get(0)
        if decider is not None:
            decider.send(event)

    def save_now(self) -> None:
        """Have the trainers save at a step that all of them have ahead of them."""
        if 0 in self.clients:
            self.heard(events.SaveNow())
        else:
            self.signal(events.SaveNow())
