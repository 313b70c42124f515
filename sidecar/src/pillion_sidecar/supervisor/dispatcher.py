"""
The supervisor: lets trainers join the session, and hands each of their messages to the part that handles it.

Called from: the control server (one coroutine a message), `app` (start, drain, stop). Runs on one event loop. Never imports torch, and never
touches user data. Its parts: `supervisor.staging` (claims and seals), `supervisor.persister` (saves that the executor writes),
`supervisor.loader`, `supervisor.trainers` (the arena, the connected trainers, messages to all of them), `supervisor.executor_client`
(the executor), `supervisor.pod_end`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import metadata
from typing import Any, Final, TypeVar

from pillion.errors import ErrorDocument, PillionError, SidecarError
from pillion.wire import control, events, messages, policy
from pillion.wire.load_messages import Load, LoadDone
from pillion.wire.message import Message, Request
from pillion.wire.save_messages import Abandon, Announce, AnnounceChange, Claim, Decline, DeclineChange, Reserve, Sealed
from pillion_sidecar import affinity, channel, settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.checkpoint import catalog, told
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.run import journal
from pillion_sidecar.session.state import State
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.supervisor import effective_policy, loader, returning, signals
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.pacing import Pacing
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.pod_end import PodEnd
from pillion_sidecar.supervisor.root_access import RootAccess
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.session_policy import SessionPolicy
from pillion_sidecar.supervisor.sessions import Sessions
from pillion_sidecar.supervisor.staging import StagingCoordinator
from pillion_sidecar.supervisor.trainers import Trainers
from pillion_sidecar.supervisor.uploader import Uploader

_RELEASE: Final = metadata.version("pillion-sidecar")
MAX_REQUEST_CHARS: Final = 64
"""Maximum of characters of a person's request id that count: the ids stay in memory."""
_log = logging.getLogger(__name__)
T = TypeVar("T")

TIDY_TIMEOUT_S: Final = 10.0
"""Timeout for retention at a trainer's goodbye. Retention ends seconds after the last commit. The next session does the rest."""


class Supervisor:
    """See the module. Implements `supervisor.server.Handler`."""

    def __init__(self, own_settings: settings.Settings) -> None:
        self.settings = own_settings
        self.sidecar_status = SidecarStatus()
        self._tasks = tasks.BackgroundTasks()
        self._root = RootAccess(own_settings.storage_ca)
        self.executor_client = ExecutorClient(
            own_settings,
            self.sidecar_status.metrics,
            on_event=lambda event: self._on_executor_event[type(event)](event),
            on_wait=self.sidecar_status.waits,
            on_opened=lambda session, opened: self.sidecar_status.run.opened(
                session, opened.generation, (opened.run or {}).get("journal"), (opened.run or {}).get("seen_ns", 0)
            ),
        )
        self.trainers = Trainers(
            self.executor_client,
            self._tasks,
            on_policy=self._policy_sent,
            on_rescue=lambda call: self.persister.rescue_called(call),
        )
        self.policy = SessionPolicy(own_settings, self._root, self.trainers)
        self.uploader = Uploader(
            self.sidecar_status,
            self.trainers,
            self.executor_client,
            on_committed=lambda step: self.persister.retain_after(step),
            on_idle=lambda: self.persister.wake(),
        )
        self.persister = Persister(
            self.sidecar_status, self.trainers, self.executor_client, self.uploader, self._released
        )
        self.staging = StagingCoordinator(own_settings, self.sidecar_status, self.trainers, self.persister, self._tasks)
        self.loader = loader.Loader(
            own_settings, self.trainers, self.executor_client, self.persister, self.uploader, self.sidecar_status
        )
        self.pod_end = PodEnd(
            self.sidecar_status, self.trainers, self.persister, self._tasks, in_pod=not own_settings.embedded
        )
        self._sessions = Sessions(
            own_settings, self._root, self.policy, self.trainers, self.executor_client, self.persister
        )
        self.pacing = Pacing(self.sidecar_status, self.trainers, self.policy, storage_ca=own_settings.storage_ca)
        self._hello_lock = asyncio.Lock()

        self._fill_tables()

    def _fill_tables(self) -> None:
        """Say which message goes to which handler."""
        self._on_trainer_message: Mapping[type[Message], Callable[[TrainerConnection, Any], Awaitable[None] | None]] = {
            Claim: self.staging.claim,
            Sealed: lambda client, sealed: self.staging.sealed(client, sealed.step, sealed.stall_s),
            Abandon: self._abandon,
            Reserve: self.staging.begin_reserve,
            Load: self.loader.ask,
            LoadDone: lambda client, _: self.loader.done(client.rank),
            Announce: lambda _, message: self.trainers.signal(events.Announced(step=message.step)),
            Decline: lambda _, message: self.trainers.signal(events.Declined(step=message.step)),
            AnnounceChange: lambda _, message: self.trainers.signal(
                events.ChangeAnnounced(step=message.step, policy=message.policy)
            ),
            DeclineChange: lambda _, message: self.trainers.signal(events.ChangeDeclined(step=message.step)),
            control.FindLatest: self._latest,
            # In tasks: the next message of the trainer may be a claim, which does not wait for storage.
            control.FindUntold: lambda client, request: self._tasks.start(
                self._untold(client, request), "commits to tell"
            ),
            control.Told: lambda client, request: self._tasks.start(
                self._told(client, request), "a commit that was told"
            ),
            control.ReadStatus: self._answer_status,
            control.Goodbye: self._goodbye,
        }
        """Handlers of all messages in `control.TRAINERS`."""
        self._on_observer_message: Mapping[type[Message], Callable[[TrainerConnection, Any], None]] = {
            control.Ping: lambda client, ping: client.answer(ping.id, control.Pong(pid=os.getpid())),
            control.ReadStatus: self._answer_status,
            control.ReadPolicy: self._answer_policy,
            control.Notify: self._notify,
            control.RequestSave: self._request_save,
        }
        """Handlers of all messages in `control.OBSERVED`."""
        self._on_executor_event: Mapping[type[Message], Callable[[Any], None]] = {
            channel.LoadBegun: self.loader.begun,
            channel.LoadMoved: self.loader.moved,
            events.Persisting: self.trainers.moved,
            # The host of the store is gone, so the training is over. Each pod notices by itself, and all use the exchange on storage.
            channel.StoreLost: lambda _: self.persister.rescue(),
            channel.Heard: self._heard,
            channel.CopiesFound: self.uploader.found,
            channel.UploadChosen: self.uploader.chosen,
        }
        """Handlers of all events in `channel.EVENTS`."""

    @property
    def pod(self) -> PodArena | None:
        return self.trainers.pod

    def open_root(self, root: str) -> Folder:
        """Return the folder that a root names, with what the policy says of its kind. No I/O. Raises: SettingsError."""
        return self._root.open(root, self.policy.current())

    async def start(self) -> None:
        self.persister.start(self._tasks)
        self.uploader.start(self._tasks)
        self.pacing.start(self._tasks)
        self._tasks.start(self.staging.notices(), "notices")
        await self._sessions.adopt()
        if self.pod is None and not self.settings.embedded:
            with contextlib.suppress(PillionError):  # raised again when a trainer needs the policy
                await self.policy.begin(self.settings.policy)
        await self.executor_client.prestart()

    async def stop(self) -> None:
        """End all work. Sealed saves stay in the arena. Blocks: until the executor has ended (see `executor_process`)."""
        self._root.close()
        self.pacing.close()
        await self._tasks.stop()
        if not self.trainers.clients:
            await self.executor_client.show(self._state())
        await self.executor_client.stop()

    # --- control.Handler ---------------------------------------------------------------------------------------------

    async def hello(self, client: TrainerConnection, message: control.Hello) -> None:
        """Let a trainer join its session, and answer with the path of its segment. See `Sessions.open` for the errors."""
        await self.trainers.let_return(message.session)
        async with self._hello_lock:
            await self.trainers.part_from_the_dead()
            pod = await self._sessions.open(client, message)
        rank = message.rank
        if rank not in pod.segments:
            raise messages.BadFrame(f"hello: rank {rank} is not of this pod, whose ranks are {sorted(pod.segments)}")
        client.rank = rank
        self.trainers.join(rank, client)
        identity = pod.identity
        self.sidecar_status.run.begin(
            identity.session,
            world_size=identity.world_size,
            num_pods=len(identity.pods),
            coordinator=0 in identity.local_ranks,
        )
        affinity.widen((os.getpid(), self.executor_client.executor_pid or 0), affinity.processors(client.pid))
        self.executor_client.joined(returning.process(client.pid))
        if self.executor_client.state is not State.TRAINING:
            self._tasks.start(self._show_state(), "showing the session's state")
        store = None
        if pod.identity.store_mode is control.MeetingStore.OWN and pod.identity.local_ranks[0] == 0:
            store = (await self.executor_client.open(pod)).store
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
        self.pacing.joined(rank)
        _log.info(
            "rank %d joined session %s with the client in %s",
            rank,
            pod.identity.session,
            message.client,
            extra={"rank": rank, "pid": client.pid},
        )

    def _state(self) -> State:
        """Return the state of the session, which other trainings read on its root."""
        if self.trainers.clients:
            return State.TRAINING
        return State.DRAINING if self.persister.busy() else State.LEFT

    async def _show_state(self) -> None:
        """Write the session's state to its root. After the last trainer has left: again when its saves are on storage."""
        await self.executor_client.show(self._state())
        pod = self.pod
        if pod is not None and not self.trainers.clients and self.persister.busy():
            await self.persister.quiet(pod.policy.drain.timeout_seconds)
            await self.executor_client.show(self._state())

    async def _verify_newest(self, pod: PodArena) -> None:
        """Verify the snapshot that the successors of the dead trainers will probably load, while they start. First their saves are finished."""
        await self.persister.quiet(pod.policy.drain.timeout_seconds, uploads=False)
        newest = pod.table.newest_complete()
        if newest is not None and self.pod is pod and not self.trainers.clients:
            await self.executor_client.verify(pod, newest)

    async def message(self, client: TrainerConnection, message: Message) -> None:
        handling = self._on_trainer_message[type(message)](client, message)
        if handling is not None:
            await handling

    def observed(self, client: TrainerConnection, request: Request[Any]) -> None:
        """Handle a request of a process that is not a trainer (`control.OBSERVED`)."""
        self._on_observer_message[type(request)](client, request)

    def _abandon(self, client: TrainerConnection, message: Abandon) -> None:
        error = ErrorDocument.from_document(message.error)
        self.staging.fail_rank(message.step, client.rank, error, persist=message.persist, gathers=message.gathers)

    def _goodbye(self, client: TrainerConnection, message: control.Goodbye) -> None:
        client.said_goodbye = True
        if all(other.said_goodbye for other in self.trainers.clients.values()):
            self.sidecar_status.run.ended(journal.CLOSED if message.clean else journal.DIED)
        self._tasks.start(self._farewell(client, message), "farewell")

    def _notify(self, client: TrainerConnection, request: control.Notify) -> None:
        client.answer(request.id, control.Notified())
        self.terminating()

    def _request_save(self, client: TrainerConnection, request: control.RequestSave) -> None:
        """Take a person's request for a save, or say how far an earlier one is."""
        answer, is_new = self.sidecar_status.save_requests.ask(
            request.request[:MAX_REQUEST_CHARS], time.monotonic(), has_trainers=0 in self.trainers.clients
        )
        if is_new:
            _log.info("a save is requested through the control socket")
            self.trainers.save_now()
        client.answer(
            request.id, control.SaveRequested(progress=answer.progress, step=answer.step, message=answer.message)
        )

    async def lost(self, client: TrainerConnection) -> None:
        """Handle the end of a trainer's connection. Without a goodbye, the slot it was filling is lost, and a rescue begins."""
        trainers = self.trainers
        if trainers.clients.get(client.rank) is not client:
            return
        del trainers.clients[client.rank]
        trainers.idle_since = time.monotonic()
        if self.pod is not None and not client.said_goodbye:
            trainers.crashed = True
            self.sidecar_status.run.ended(journal.DIED)
            extra = {"rank": client.rank, "pid": client.pid}
            _log.warning("rank %d ended without closing its Checkpointer", client.rank, extra=extra)
        self.staging.rank_lost(client)
        self.loader.rank_lost(client.rank)
        if self.pod is not None and not client.said_goodbye:
            self.persister.rescue()
            self._released()
        if not trainers.clients:
            self._tasks.start(self._show_state(), "showing the session's state")
            if self.pod is not None and trainers.crashed:
                self._tasks.start(self._verify_newest(self.pod), "verifying the newest snapshot")
            # A pod that was ended after its last save has lost no work.
            await self.pacing.left(clean=self.sidecar_status.last_save_committed)

    def _policy_sent(self, message: signals.PolicySent) -> None:
        self.policy.apply(message)
        self.pacing.wake()

    def _released(self) -> None:
        """Let waiting claims and loads try again, because a slot may be free."""
        self.staging.released()
        self.loader.slot_released()

    def _heard(self, event: channel.Heard) -> None:
        """Take a signal that a sidecar of this job has sent to all pods."""
        try:
            kind = signals.SIGNALS.get(event.message.get("type", ""))
            if kind is not None:
                self.trainers.receive(kind.from_document(event.message))
        except (messages.BadFrame, policy.PolicyError) as err:
            _log.warning("ignored an invalid message from another pod: %s", err)

    # --- ending ------------------------------------------------------------------------------------------------------

    def terminating(self, *, signalled: bool = False) -> bool:
        """Begin the end of the pod (see `pod_end`). Return whether the trainers were asked for one more save."""
        return self.pod_end.begin(signalled=signalled)

    async def _farewell(self, client: TrainerConnection, message: control.Goodbye) -> None:
        """Let a trainer end when its saves are done. If all trainers leave, the newest snapshot goes to storage first."""
        trainers = self.trainers
        drain_s = message.drain_s
        if all(other.said_goodbye for other in trainers.clients.values()):
            self.persister.rescue()
        drained = await self.persister.quiet(drain_s, leaving=client.rank)
        await self.persister.tidied(min(drain_s, TIDY_TIMEOUT_S))
        if trainers.clients.get(client.rank) is client:
            del trainers.clients[client.rank]
        if not trainers.clients:
            await self._show_state()
        trainers.crashed = trainers.crashed or not message.clean
        if not trainers.clients:
            trainers.parted = not trainers.crashed
            trainers.idle_since = time.monotonic()
            await self.pacing.left(clean=not trainers.crashed)
        client.answer(message.id, control.Farewell(drained=drained))

    # --- answers about the state -------------------------------------------------------------------------------------

    async def _latest(self, client: TrainerConnection, request: control.FindLatest) -> None:
        pod = self.trainers.require_pod()
        root = self.open_root(pod.identity.root)
        answer = await self._root.look_at(str(root), lambda: _newest(root))
        client.answer(request.id, answer)

    async def _untold(self, client: TrainerConnection, request: control.FindUntold) -> None:
        try:
            root = self.open_root(self.trainers.require_pod().identity.root)
            found = await self._root.look_at(str(root), lambda: [_latest(root, step) for step in told.untold(root)])
        except (PillionError, OSError) as err:
            client.refuse(request.id, err if isinstance(err, PillionError) else SidecarError(str(err)))
        else:
            client.answer(request.id, control.Untold(checkpoints=tuple(found)))

    async def _told(self, client: TrainerConnection, request: control.Told) -> None:
        try:
            root = self.open_root(self.trainers.require_pod().identity.root)
            await self._root.look_at(str(root), lambda: told.note(root, request.step))
        except (PillionError, OSError) as err:
            client.refuse(request.id, err if isinstance(err, PillionError) else SidecarError(str(err)))
        else:
            client.answer(request.id, control.Noted())

    def _answer_policy(self, client: TrainerConnection, request: control.ReadPolicy) -> None:
        document = effective_policy.for_trainers(policy.dump(self.policy.current()))
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
            policy_generation=self.policy.policy_generation,
            saves=tuple(
                {"step": s.step, "slot": s.slot, "state": s.state.value, "persisted": s.persisted} for s in saves
            ),
            root=pod.identity.root if pod is not None else "",
            run_id=pod.identity.run_id if pod is not None else "",
            world_size=pod.identity.world_size if pod is not None else 0,
            local_ranks=tuple(pod.identity.local_ranks) if pod is not None else (),
            connected_ranks=tuple(sorted(self.trainers.clients)),
            interval=self.sidecar_status.interval.reason if self.sidecar_status.interval is not None else "",
            problems=self.sidecar_status.problems(),
            failures=tuple(f"{f.time} step {f.step}: {f.reason}: {f.message}" for f in self.sidecar_status.failures),
            release=_RELEASE,
        )
        client.answer(request.id, answer)


def _newest(root: Folder) -> control.Latest:
    """Return the last committed checkpoint of a root. Reads storage."""
    newest = catalog.newest(root)
    return control.Latest() if newest is None else _latest(root, newest[0])


def _latest(root: Folder, step: int) -> control.Latest:
    """Return what a script may know of a committed checkpoint. Reads storage."""
    folder = catalog.step_folder(root, step)
    said = catalog.remarks(folder).to_document()
    return control.Latest(step=step, path=str(folder), size_bytes=catalog.size_bytes(folder), remarks=said)
