"""
The supervisor: opens the session, and hands what trainers say to the part whose business it is.

Called from: the control server (one coroutine a message), `app` (start, drain, stop). Runs on one event loop; never imports torch,
never touches user data. Its parts: `supervisor.staging` (claims and seals), `supervisor.persister` (the executor's work on them), `supervisor.loader`, `supervisor.trainers` (the
arena, who is connected, announcements), `supervisor.executor_client` (the executor), `supervisor.pod_end`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from pillion.errors import ErrorDocument, PillionError
from pillion.wire import control, events, messages, policy
from pillion.wire.load_messages import Load, LoadDone
from pillion.wire.message import Message, Request
from pillion.wire.save_messages import Abandon, Announce, AnnounceChange, Claim, Decline, DeclineChange, Reserve, Sealed
from pillion_sidecar import affinity, settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.checkpoint import catalog, ownership
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import effective_policy, loader, returning, signals
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.pod_end import PodEnd
from pillion_sidecar.supervisor.root_access import RootAccess
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.session_policy import SessionPolicy
from pillion_sidecar.supervisor.sessions import Sessions
from pillion_sidecar.supervisor.staging import StagingCoordinator
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)
T = TypeVar("T")

TIDY_S: Final = 10.0
"""How long trainers that say goodbye wait for retention: it is seconds behind the last commit, and what is left then can wait."""


class Supervisor:
    """See the module. Implements `supervisor.server.Handler`."""

    def __init__(self, own_settings: settings.Settings) -> None:
        self.settings = own_settings
        self.sidecar_status = SidecarStatus()
        self._tasks = tasks.BackgroundTasks()
        self._root = RootAccess()
        self.executor_client = ExecutorClient(
            own_settings,
            self.sidecar_status.metrics,
            on_event=self._on_executor_event,
            on_wait=self.sidecar_status.waits,
        )
        self.trainers = Trainers(
            self.executor_client,
            self._tasks,
            on_policy=lambda message: self.policy.take(message),
            on_rescue=lambda call: self.persister.rescue_called(call),
        )
        self.policy = SessionPolicy(own_settings, self._root, self.trainers)
        self.persister = Persister(self.sidecar_status, self.trainers, self.executor_client, self._released)
        self.staging = StagingCoordinator(own_settings, self.sidecar_status, self.trainers, self.persister, self._tasks)
        self.loader = loader.Loader(
            own_settings, self.trainers, self.executor_client, self.persister, self.sidecar_status
        )
        self.pod_end = PodEnd(
            self.sidecar_status, self.trainers, self.persister, self._tasks, in_pod=not own_settings.embedded
        )
        self._sessions = Sessions(
            own_settings, self._root, self.policy, self.trainers, self.executor_client, self.persister
        )
        self._hello_lock = asyncio.Lock()

        self._trainer_says: Mapping[type[Message], Callable[[TrainerConnection, Any], Awaitable[None] | None]] = {
            Claim: self.staging.claim,
            Sealed: lambda client, sealed: self.staging.sealed(client, sealed.step, sealed.stall_s),
            Abandon: self._abandon,
            Reserve: self.staging.begin_reserve,
            Load: self.loader.ask,
            LoadDone: lambda client, _: self.loader.done(client.rank),
            Announce: lambda _, said: self.trainers.signal(events.Announced(step=said.step)),
            Decline: lambda _, said: self.trainers.signal(events.Declined(step=said.step)),
            AnnounceChange: lambda _, said: self.trainers.signal(
                events.ChangeAnnounced(step=said.step, policy=said.policy)
            ),
            DeclineChange: lambda _, said: self.trainers.signal(events.ChangeDeclined(step=said.step)),
            control.FindLatest: self._latest,
            control.ReadStatus: self._answer_status,
            control.Goodbye: self._goodbye,
        }
        """All of `control.TRAINERS`."""
        self._observer_asks: Mapping[type[Message], Callable[[TrainerConnection, Any], None]] = {
            control.Ping: lambda client, ping: client.answer(ping.id, control.Pong(pid=os.getpid())),
            control.ReadStatus: self._answer_status,
            control.ReadPolicy: self._answer_policy,
            control.Notify: self._notify,
        }
        """All of `control.OBSERVED`."""

    @property
    def pod(self) -> PodArena | None:
        return self.trainers.pod

    async def start(self) -> None:
        self.persister.start(self._tasks)
        self._tasks.start(self.staging.notices(), "notices")
        await self._sessions.adopt()
        if self.pod is None and not self.settings.embedded:
            with contextlib.suppress(PillionError):  # the trainer that needs it gets the reason
                await self.policy.begin(self.settings.policy)
        await self.executor_client.prestart()

    async def stop(self) -> None:
        """Stop working; what is sealed stays in the arena. Blocks: for the executor's ladder."""
        self._root.close()
        await self._tasks.stop()
        if not self.trainers.clients:
            await self.executor_client.show(self._state())
        await self.executor_client.stop()

    # --- control.Handler ---------------------------------------------------------------------------------------------

    async def hello(self, client: TrainerConnection, message: control.Hello) -> None:
        """A trainer joins: check policy and root, open its session, tell it where its segment is."""
        await self.trainers.let_return(message.session)
        async with self._hello_lock:
            await self.trainers.part_from_the_dead()
            pod = await self._sessions.open(client, message)
        rank = message.rank
        if rank not in pod.segments:
            raise messages.BadFrame(f"hello: rank {rank} is not of this pod, whose ranks are {sorted(pod.segments)}")
        client.rank = rank
        self.trainers.join(rank, client)
        affinity.widen((os.getpid(), self.executor_client.executor_pid or 0), affinity.of(client.pid))
        self.executor_client.joined(returning.process(client.pid))
        if self.executor_client.state is not ownership.State.TRAINING:
            self._tasks.start(self._show_state(), "showing the session's state")
        store = None
        if pod.identity.store_mode == "own" and pod.identity.local_ranks[0] == 0:
            store = (await self.executor_client.open(pod)).get("store")
        client.answer(
            message.id,
            control.Welcome(
                policy=effective_policy.for_trainers(policy.dump(pod.policy)),
                notices=True,
                gathers=True,
                segment=pod.segments[rank].path,
                pid=os.getpid(),
                executor_pid=self.executor_client.executor_pid,
                store=store,
            ),
        )
        self.pod_end.joined(client)
        _log.info(
            "rank %d joined session %s with the client in %s",
            rank,
            pod.identity.session,
            message.client,
            extra={"rank": rank, "pid": client.pid},
        )

    def _state(self) -> ownership.State:
        """What the session is in, for whoever wants its root next."""
        if self.trainers.clients:
            return ownership.State.TRAINING
        return ownership.State.DRAINING if self.persister.busy() else ownership.State.LEFT

    async def _show_state(self) -> None:
        """Have the root say whether trainers are here, and, when the last one is gone, that what it left is on storage."""
        await self.executor_client.show(self._state())
        pod = self.pod
        if pod is not None and not self.trainers.clients and self.persister.busy():
            await self.persister.quiet(pod.policy.drain.timeout_seconds)
            await self.executor_client.show(self._state())

    async def message(self, client: TrainerConnection, message: Message) -> None:
        done = self._trainer_says[type(message)](client, message)
        if done is not None:
            await done

    def observed(self, client: TrainerConnection, request: Request[Any]) -> None:
        """A message of a process that is no trainer: see `wire.control`."""
        self._observer_asks[type(request)](client, request)

    def _abandon(self, client: TrainerConnection, message: Abandon) -> None:
        error = ErrorDocument.from_document(message.error)
        self.staging.fail_rank(message.step, client.rank, error, persist=message.persist, gathers=message.gathers)

    def _goodbye(self, client: TrainerConnection, message: control.Goodbye) -> None:
        client.said_goodbye = True
        self._tasks.start(self._farewell(client, message), "farewell")

    def _notify(self, client: TrainerConnection, request: control.Notify) -> None:
        client.answer(request.id, control.Notified())
        self.terminating()

    async def lost(self, client: TrainerConnection) -> None:
        """A trainer's connection ended: what it was filling is torn, and the newest snapshot goes to storage."""
        trainers = self.trainers
        if trainers.clients.get(client.rank) is not client:
            return
        del trainers.clients[client.rank]
        trainers.idle_since = time.monotonic()
        if self.pod is not None and not client.said_goodbye:
            trainers.crashed = True
            extra = {"rank": client.rank, "pid": client.pid}
            _log.warning("rank %d ended without closing its Checkpointer", client.rank, extra=extra)
        self.staging.rank_lost(client)
        self.loader.rank_lost(client.rank)
        if self.pod is not None and not client.said_goodbye:
            self.persister.rescue()
            self._released()
        if not trainers.clients:
            self._tasks.start(self._show_state(), "showing the session's state")

    def _released(self) -> None:
        """A slot may be free: waiting claims and loads try again."""
        self.staging.released()
        self.loader.slot_released()

    def _on_executor_event(self, event: messages.Message) -> None:
        if event["type"] in ("load_begin", "load_progress"):
            self.loader.progress(event)
            return
        if event["type"] == "store_lost":
            # Whoever hosted it is gone, and training with it: each pod finds out by itself, and all meet on storage.
            self.persister.rescue()
            return
        try:
            if event["type"] in signals.SIGNALS:
                self.trainers.heard(signals.SIGNALS[event["type"]].from_document(event))
        except (messages.BadFrame, policy.PolicyError) as err:
            _log.warning("ignored an invalid message from another pod: %s", err)

    # --- ending ------------------------------------------------------------------------------------------------------

    def terminating(self, *, signalled: bool = False) -> bool:
        """The pod is to end; see `pod_end`. Whether the trainers are asked for one more save."""
        return self.pod_end.begin(signalled=signalled)

    async def _farewell(self, client: TrainerConnection, message: control.Goodbye) -> None:
        """Let a trainer go when its saves are done; the last one to leave makes sure of the newest snapshot."""
        trainers = self.trainers
        drain_s = message.drain_s
        if all(other.said_goodbye for other in trainers.clients.values()):
            self.persister.rescue()
        drained = await self.persister.quiet(drain_s, leaving=client.rank)
        await self.persister.tidied(min(drain_s, TIDY_S))
        if trainers.clients.get(client.rank) is client:
            del trainers.clients[client.rank]
        if not trainers.clients:
            await self._show_state()
        trainers.crashed = trainers.crashed or not message.clean
        if not trainers.clients:
            trainers.parted = not trainers.crashed
            trainers.idle_since = time.monotonic()
        client.answer(message.id, control.Farewell(drained=drained))

    # --- the rest ----------------------------------------------------------------------------------------------------

    async def _latest(self, client: TrainerConnection, request: control.FindLatest) -> None:
        pod = self.trainers.require_pod()
        root = pod.identity.root
        found = await self._root.look_at(root, lambda: catalog.newest(root))
        step, path, size_bytes = found if found is not None else (None, "", 0)
        client.answer(request.id, control.Latest(step=step, path=path, size_bytes=size_bytes))

    def _answer_policy(self, client: TrainerConnection, request: control.ReadPolicy) -> None:
        document = effective_policy.for_trainers(policy.dump(self.policy.now()))
        client.answer(request.id, control.CurrentPolicy(policy=document))

    def _answer_status(self, client: TrainerConnection, request: control.ReadStatus) -> None:
        pod = self.pod
        saves = tuple(pod.table.saves.values()) if pod is not None else ()
        answer = control.Status(
            metrics=self.sidecar_status.metrics.to_document(),
            executor_pid=self.executor_client.executor_pid,
            pid=os.getpid(),
            draining=self.sidecar_status.terminating,
            retaining=self.persister.retains(),
            policy_generation=self.policy.generation,
            saves=tuple(
                {"step": s.step, "slot": s.slot, "phase": s.phase.value, "persisted": s.persisted} for s in saves
            ),
        )
        client.answer(request.id, answer)
