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
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from pillion import wire
from pillion.errors import ErrorDocument, PillionError, ProtocolMismatch, SettingsError, SidecarError
from pillion.wire import messages, policy
from pillion_sidecar import affinity, settings
from pillion_sidecar.arena.pod_arena import Identity, PodArena, check_root, name_of
from pillion_sidecar.checkpoint import catalog, ownership
from pillion_sidecar.concurrency import blocking, tasks
from pillion_sidecar.session import record as record_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import effective_policy, loader, returning
from pillion_sidecar.supervisor.effective_policy import EffectivePolicy
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.pod_end import PodEnd
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.staging import StagingCoordinator
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)
T = TypeVar("T")

TIDY_S: Final = 10.0
"""How long trainers that say goodbye wait for retention: it is seconds behind the last commit, and what is left then can wait."""
ROOT_TIMEOUT_S: Final = 60.0
"""Bound for the storage to show whether it can be used, or what its newest checkpoint is; network file systems under load take seconds."""
SETTLE_SHARE: Final = 1 / 4
"""Of the bound for peers: how long trainers that come back wait for what several pods were writing together."""
MOVED_SHARE: Final = 3 / 4
"""The same where a rank has moved to another pod, if the drain's bound is not shorter: the pods that are new wait for us in the load that
comes next, for all of the bound for peers."""
POLICY_REPEAT_S: Final = 60.0
"""How often a policy that changed is told again, to pods and ranks that missed it: their sidecar or executor was being replaced."""


class Supervisor:
    """See the module. Implements `supervisor.server.Handler`."""

    def __init__(self, of: settings.Settings) -> None:
        self.settings = of
        self.sidecar_status = SidecarStatus()
        self.policy_in_force = EffectivePolicy()
        self._tasks = tasks.BackgroundTasks()
        self.executor_client = ExecutorClient(
            of, self.sidecar_status.metrics, on_event=self._on_executor_event, on_wait=self.sidecar_status.waits
        )
        self.trainers = Trainers(self.executor_client, self._tasks, on_policy=self._policy_heard)
        self.persister = Persister(self.sidecar_status, self.trainers, self.executor_client, self._released)
        self.staging = StagingCoordinator(of, self.sidecar_status, self.trainers, self.persister, self._tasks)
        self.loader = loader.Loader(of, self.trainers, self.executor_client, self.persister, self.sidecar_status)
        self.pod_end = PodEnd(self.sidecar_status, self.trainers, self.persister, self._tasks, in_pod=not of.embedded)
        self._started_with: policy.Policy | None = None
        """The policy of the environment, or of the hello; without what the controller said since."""
        self._policy_told_s = -math.inf
        self._policy_told_to = ""
        self._bad_generation = -1
        self._hello_lock = asyncio.Lock()
        self._aside, self._looking = blocking.BlockingCaller("root"), asyncio.Lock()

    @property
    def pod(self) -> PodArena | None:
        return self.trainers.pod

    async def start(self) -> None:
        self.persister.start(self._tasks)
        self._tasks.start(self.staging.notices(), "notices")
        await self._adopt()
        if self._started_with is None and not self.settings.embedded:
            with contextlib.suppress(PillionError):  # whoever needs it is told why it is none
                self._started_with = await self._read_policy(self.settings.policy)
        await self.executor_client.prestart()

    async def _adopt(self) -> None:
        """Go on with the session of a sidecar before this one: what it left in the arena is persisted, trainers or not."""
        record = record_module.read(self.settings.runtime_dir)
        if record is None:
            return
        try:
            given, kept = self.settings.policy, record.policy
            source = (kept or given) if self.settings.embedded else (given or kept)
            self._started_with = await self._read_policy(source)
            identity = Identity.from_hello(dict(record.hello), root=record.root)
            pod = PodArena(
                self.settings.runtime_dir,
                identity,
                self._policy_now(),
                shared=not self.settings.embedded,
            )
        except (OSError, ValueError, PillionError) as err:
            _log.warning("session %s of a sidecar before this one is not adopted: %s", record.session, err)
            return
        _log.warning("adopted session %s with %d snapshots in memory", record.session, len(pod.adopted))
        self.trainers.pod, self.trainers.returning = pod, record.trainers
        self.trainers.crashed = True
        self.executor_client.session(pod, record)
        self.persister.wake()

    async def stop(self) -> None:
        """Stop working; what is sealed stays in the arena. Blocks: for the executor's ladder."""
        self._aside.close()
        await self._tasks.stop()
        if not self.trainers.clients:
            await self.executor_client.show(self._state())
        await self.executor_client.stop()

    # --- control.Handler ---------------------------------------------------------------------------------------------

    async def hello(self, client: TrainerConnection, message: messages.Message) -> None:
        """A trainer joins: check versions, policy and root, open its session, tell it where its segment is."""
        theirs = messages.field(message, "version", int)
        if theirs != wire.PROTOCOL_VERSION:
            raise ProtocolMismatch(ours=wire.PROTOCOL_VERSION, theirs=theirs)
        await self.trainers.let_return(messages.field(message, "session", str))
        async with self._hello_lock:
            await self.trainers.part_from_the_dead()
            pod = await self._session(client, message)
        rank = messages.field(message, "rank", int)
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
            message,
            {
                "type": "welcome",
                "version": wire.PROTOCOL_VERSION,
                "policy": effective_policy.for_trainers(policy.dump(pod.policy)),
                "notices": True,
                "gathers": True,
                "segment": pod.segments[rank].path,
                "pid": os.getpid(),
                "executor_pid": self.executor_client.executor_pid,
                "store": store,
            },
        )
        self.pod_end.joined(client)
        _log.info(
            "rank %d joined session %s with the client in %s",
            rank,
            pod.identity.session,
            messages.field(message, "client", str, "an unknown place"),
            extra={"rank": rank, "pid": client.pid},
        )

    async def _session(self, client: TrainerConnection, message: messages.Message) -> PodArena:
        trainers = self.trainers
        session = messages.field(message, "session", str)
        if trainers.pod is not None and trainers.pod.identity.session == session:
            return trainers.pod
        if trainers.clients:
            raise trainers.taken(client)
        root = self.settings.root or messages.field(message, "root", str, "")
        # In a pod the injected one holds. Without a cluster the variable is the trainer's own, and its argument wins over it.
        given: Any = message.get("policy")
        source = (given or self.settings.policy) if self.settings.embedded else (self.settings.policy or given)
        self._started_with = await self._read_policy(source)
        problems = await self._look_at(root, lambda: check_root(root)) if root else []
        if problems:
            raise SettingsError(problems)
        identity = Identity.from_hello(message, root=root)
        dead = await self._look_for_owner(root, identity) if root and len(identity.pods) == 1 else ""
        if trainers.pod is not None:
            await self._finish(trainers.pod, identity)
            # Closed once, also when the next one cannot be made.
            before, trainers.pod = trainers.pod, None
            before.close()
        trainers.pod = PodArena(
            self.settings.runtime_dir,
            identity,
            self._policy_now(),
            shared=not self.settings.embedded,
        )
        trainers.crashed = False
        self.executor_client.session(trainers.pod, succeeds=dead)
        self.persister.wake()
        return trainers.pod

    async def _look_for_owner(self, root: str, identity: Identity) -> str:
        """
        Tell the trainers at once when another training lives on their root; the session that owned it and does not live. Of several pods
        the coordinator's executor finds it out, as the others may know the owner for an older attempt of theirs.

        Raises:
            UsageError: with both names.
        """
        of = self.settings

        def look() -> str:
            known = {identity.session, *self.executor_client.served()}
            generation = ownership.wait_until_free(
                root, name=name_of(of, identity), known=known, silent_s=of.owner_silent_s
            )
            owner = ownership.read(root, generation)
            return owner.session if owner is not None else ""

        return await self._look_at(root, look, ROOT_TIMEOUT_S + of.owner_silent_s + ownership.DRAIN_MOST_S)

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

    async def _finish(self, before: PodArena, successor: Identity) -> None:
        """
        What the session before left comes first: the newest snapshot must be where its successor looks for it.

        Several pods that come back as they were look for it in memory, and what they were writing together may never end, as others
        have gone on: it is persisted after the load. Where a rank has moved to another pod, its snapshot can reach it through storage
        only; but a pod that is not there any more may be lost, and its part will never come.
        """
        if len(before.identity.pods) == 1:
            await self.persister.quiet(self.settings.persist_timeout_s)
        elif successor.moved_from(before.identity):
            bound_s = min(before.policy.drain.timeout_seconds, self.settings.peer_timeout_s * MOVED_SHARE)
            if not await self.persister.quiet(bound_s):
                _log.error(
                    "ranks are in other pods than before, and after %.0f s not all that was saved there is on storage: going on without",
                    bound_s,
                )
        else:
            await self.persister.settled(self.settings.peer_timeout_s * SETTLE_SHARE)
        self.persister.forget_calls()

    async def message(self, client: TrainerConnection, message: messages.Message) -> None:
        kind = message["type"]
        if kind == "claim":
            await self.staging.claim(client, message)
        elif kind == "sealed":
            self.staging.sealed(
                client, messages.field(message, "step", int), messages.field(message, "stall_s", float, 0.0)
            )
        elif kind == "abandon":
            error = ErrorDocument.from_document(messages.field(message, "error", dict))
            persist = messages.field(message, "persist", bool, True)
            gathers = messages.field(message, "gathers", bool, False)
            step = messages.field(message, "step", int)
            self.staging.fail_rank(step, client.rank, error, persist=persist, gathers=gathers)
        elif kind == "reserve":
            self.staging.begin_reserve(client, message)
        elif kind == "load":
            await self.loader.ask(client, message)
        elif kind == "load_done":
            self.loader.done(client.rank)
        elif kind == "latest":
            await self._latest(client, message)
        elif kind == "announce":
            self.trainers.signal({"type": "announced", "step": messages.field(message, "step", int)})
        elif kind == "decline":
            self.trainers.signal({"type": "declined", "step": messages.field(message, "step", int)})
        elif kind == "announce_change":
            step, of = messages.field(message, "step", int), messages.field(message, "policy", dict)
            self.trainers.signal({"type": "change_announced", "step": step, "policy": of})
        elif kind == "decline_change":
            self.trainers.signal({"type": "change_declined", "step": messages.field(message, "step", int)})
        elif kind == "status":
            client.answer(message, self._status())
        elif kind == "goodbye":
            client.said_goodbye = True
            self._tasks.start(self._farewell(client, message), "farewell")
        else:
            _log.debug("rank %d sent the unknown message %s", client.rank, kind)

    def observed(self, client: TrainerConnection, message: messages.Message) -> None:
        """A message of a process that is no trainer: see `wire.messages`."""
        if message["type"] == "ping":
            client.answer(message, {"type": "pong", "pid": os.getpid()})
        elif message["type"] == "status":
            client.answer(message, self._status())
        elif message["type"] == "policy":
            document = effective_policy.for_trainers(policy.dump(self._policy_now()))
            client.answer(message, {"type": "policy", "policy": document})
        elif message["type"] == "notify":
            client.answer(message, {"type": "notified"})
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
            _log.warning("rank %d is gone without a goodbye", client.rank, extra=extra)
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
            self.trainers.heard(event)
        except (messages.BadFrame, policy.PolicyError) as err:
            _log.warning("another pod said what is not understood here: %s", err)

    # --- the policy --------------------------------------------------------------------------------------------------

    async def _read_policy(self, source: Mapping[str, object] | str) -> policy.Policy:
        """
        Raises:
            SettingsError: it is none.
            SidecarError: it is a file, and the storage that has it hangs.
        """
        if isinstance(source, str) and settings.is_policy_file(source):
            return await self._look_at(source, lambda: settings.read_policy(source))
        return settings.read_policy(source)

    def _policy_now(self) -> policy.Policy:
        if self._started_with is None:
            self._started_with = settings.read_policy(self.settings.policy)
        return self.policy_in_force.over(self._started_with)

    def policy_told(self, spec: Mapping[str, Any], generation: int) -> None:
        """The controller says what the policy is now: a change goes to every pod, and is repeated for who missed it."""
        try:
            told = policy.parse(spec, embedded=True)
        except policy.PolicyError as err:
            if generation != self._bad_generation:
                self._bad_generation = generation
                _log.error("generation %d of the policy is not taken up: %s", generation, err)
            return
        now = self._policy_now()
        assert self._started_with is not None
        later = self.policy_in_force.later(told, self._started_with)
        if later:
            _log.warning("the policy's %s changed: a running pod keeps what it has", ", ".join(sorted(later)))
        differs = effective_policy.document(told) != effective_policy.document(now)
        session = self.pod.identity.session if self.pod is not None else ""
        overdue = time.monotonic() - self._policy_told_s >= POLICY_REPEAT_S or session != self._policy_told_to
        if differs or generation != self.policy_in_force.generation or (self.policy_in_force.changed and overdue):
            self._policy_told_s, self._policy_told_to = time.monotonic(), session
            self.trainers.signal(
                {"type": "policy", "generation": generation, "policy": effective_policy.document(told)}
            )

    def _policy_heard(self, message: messages.Message) -> None:
        told = policy.parse(messages.field(message, "policy", dict), embedded=True)
        generation = messages.field(message, "generation", int)
        self._policy_now()
        assert self._started_with is not None
        if self.policy_in_force.take(told, generation, self._started_with):
            _log.info("generation %d of the policy holds now", generation)
        if self.pod is not None:
            self.pod.policy = self.policy_in_force.over(self._started_with)
        if self.policy_in_force.changed:
            document = effective_policy.for_trainers(effective_policy.document(told))
            self.trainers.broadcast({"type": "policy", "policy": document})

    # --- ending ------------------------------------------------------------------------------------------------------

    def terminating(self, *, signalled: bool = False) -> bool:
        """The pod is to end; see `pod_end`. Whether the trainers are asked for one more save."""
        return self.pod_end.begin(signalled=signalled)

    async def _farewell(self, client: TrainerConnection, message: messages.Message) -> None:
        """Let a trainer go when its saves are done; the last one to leave makes sure of the newest snapshot."""
        trainers = self.trainers
        drain_s = messages.field(message, "drain_s", float, 0.0)
        if all(other.said_goodbye for other in trainers.clients.values()):
            self.persister.rescue()
        drained = await self.persister.quiet(drain_s, leaving=client.rank)
        await self.persister.tidied(min(drain_s, TIDY_S))
        if trainers.clients.get(client.rank) is client:
            del trainers.clients[client.rank]
        if not trainers.clients:
            await self._show_state()
        trainers.crashed = trainers.crashed or not messages.field(message, "clean", bool, True)
        if not trainers.clients:
            trainers.parted = not trainers.crashed
            trainers.idle_since = time.monotonic()
        client.answer(message, {"type": "farewell", "drained": drained})

    # --- the rest ----------------------------------------------------------------------------------------------------

    async def _latest(self, client: TrainerConnection, message: messages.Message) -> None:
        pod = self.trainers.require_pod()
        root = pod.identity.root
        found = await self._look_at(root, lambda: catalog.newest(root))
        answer: dict[str, Any] = {"type": "latest", "step": None}
        if found is not None:
            answer |= {"step": found[0], "path": found[1], "size_bytes": found[2]}
        client.answer(message, answer)

    async def _look_at(self, root: str, call: Callable[[], T], bound_s: float = ROOT_TIMEOUT_S) -> T:
        """What `call` finds on the root, beside this loop: a storage that hangs must not keep the supervisor from answering."""
        try:
            async with self._looking:
                return await self._aside.run(call, bound_s)
        except (TimeoutError, blocking.StillBusy):
            raise SidecarError(
                f"the storage of {root} has not answered for {bound_s:.0f} s: it hangs, or is lost"
            ) from None

    def _status(self) -> dict[str, Any]:
        pod = self.pod
        return {
            "type": "status",
            "metrics": self.sidecar_status.metrics.to_document(),
            "executor_pid": self.executor_client.executor_pid,
            "pid": os.getpid(),
            "draining": self.sidecar_status.terminating,
            "retaining": self.persister.retains(),
            "policy_generation": self.policy_in_force.generation,
            "saves": [
                {"step": s.step, "slot": s.slot, "phase": s.phase.value, "persisted": s.persisted}
                for s in (pod.table.saves.values() if pod is not None else ())
            ],
        }
