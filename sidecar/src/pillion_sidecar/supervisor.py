"""
The supervisor: takes what trainers say, decides with the slot table, and has the executor do it.

Called from: the control server (one coroutine a message), `app` (start, drain, stop). Runs on one event loop; never imports torch,
never touches user data. What it waits for is bounded: seals by `peer_timeout_s`, claims by the client, the executor by its ping.

    claim/sealed/abandon --> SlotTable --> answers, and saves to persist --> _work: one at a time --> executor
                                                          outcome --> every local rank, metrics, slots
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Final

from pillion import wire
from pillion.errors import (
    BarrierTimeout,
    ErrorDocument,
    PillionError,
    ProtocolMismatch,
    RemoteFailure,
    SaveError,
    SaveSkipped,
    SettingsError,
    SidecarError,
    StagingError,
    UsageError,
)
from pillion.wire import arena, messages, policy
from pillion_sidecar import catalog, failures, loads, settings
from pillion_sidecar.arena import slots
from pillion_sidecar.arena.slots import Phase, Save
from pillion_sidecar.control import Client
from pillion_sidecar.executor.parent import ExecutorDied
from pillion_sidecar.metrics import Metrics
from pillion_sidecar.operation import Operations
from pillion_sidecar.pod import Identity, Pod, check_root

_log = logging.getLogger(__name__)

PERSIST_ATTEMPTS: Final = 2
"""How often one snapshot is handed to an executor that dies with it: a snapshot that kills two would kill a third."""


class Supervisor:
    """See the module. Implements `control.Handler`."""

    def __init__(self, of: settings.Settings) -> None:
        self.settings = of
        self.metrics = Metrics()
        self.pod: Pod | None = None
        self.clients: dict[int, Client] = {}
        self.operations = Operations(of, self.metrics, on_event=self._on_executor_event)
        self.loads = loads.Loads(self)
        self.idle_since = time.monotonic()
        self.parted = False
        """Every trainer of the session ended well: an embedded sidecar is not needed any more."""
        self._crashed = False
        """A trainer of this session died, or ended by an exception: a restart may come for the arena."""
        self._waiting: list[tuple[Client, messages.Message]] = []
        self._seal_timers: dict[int, asyncio.TimerHandle] = {}
        self._withdrawn: list[tuple[int, bool, ErrorDocument]] = []
        self._wake = asyncio.Event()
        self._quiet = asyncio.Condition()
        self._worker: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._hello_lock = asyncio.Lock()

    async def start(self) -> None:
        self._worker = asyncio.create_task(self._work(), name="work")
        await self.operations.prestart()

    async def stop(self) -> None:
        """Stop working; what is sealed stays in the arena. Blocks: for the executor's ladder."""
        for task in [self._worker, *self._tasks]:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.operations.stop()

    # --- control.Handler ---------------------------------------------------------------------------------------------

    async def hello(self, client: Client, message: messages.Message) -> None:
        """A trainer joins: check versions, policy and root, open its session, tell it where its segment is."""
        theirs = messages.field(message, "version", int)
        if theirs != wire.PROTOCOL_VERSION:
            raise ProtocolMismatch(ours=wire.PROTOCOL_VERSION, theirs=theirs)
        async with self._hello_lock:
            pod = await self._session(message)
        rank = messages.field(message, "rank", int)
        if rank not in pod.segments:
            raise messages.BadFrame(f"hello: rank {rank} is not of this pod, whose ranks are {sorted(pod.segments)}")
        client.rank = rank
        self.clients[rank] = client
        self.parted = False
        store = None
        if pod.identity.store_mode == "own" and pod.identity.local_ranks[0] == 0:
            store = (await self.operations.open(pod)).get("store")
        client.answer(
            message,
            {
                "type": "welcome",
                "version": wire.PROTOCOL_VERSION,
                "policy": policy.dump(pod.policy),
                "segment": pod.segments[rank].path,
                "pid": os.getpid(),
                "executor_pid": self.operations.executor_pid,
                "store": store,
            },
        )
        _log.info("rank %d joined session %s", rank, pod.identity.session, extra={"rank": rank, "pid": client.pid})

    async def _session(self, message: messages.Message) -> Pod:
        session = messages.field(message, "session", str)
        if self.pod is not None and self.pod.identity.session == session:
            return self.pod
        if self.clients:
            raise UsageError(
                f"another job (ranks {sorted(self.clients)}) uses this root's sidecar now: one job a root at a time"
            )
        root = self.settings.root or messages.field(message, "root", str, "")
        source: Any = message.get("policy") if self.settings.policy == "" else self.settings.policy
        of = settings.read_policy(source)
        problems = check_root(root) if root else []
        if problems:
            raise SettingsError(problems)
        identity = Identity.from_hello(message, root=root)
        # What the session before left is finished first: the newest snapshot must be where the new one looks for it.
        await self.quiet(self.settings.persist_timeout_s)
        if self.pod is not None:
            self.pod.close()
        os.makedirs(self.settings.runtime_dir, exist_ok=True)
        self.pod = Pod(self.settings.runtime_dir, identity, of)
        self._crashed = False
        self.operations.session(self.pod)
        self._wake.set()
        return self.pod

    async def message(self, client: Client, message: messages.Message) -> None:
        kind = message["type"]
        if kind == "claim":
            await self._claim(client, message)
        elif kind == "sealed":
            self._sealed(client, messages.field(message, "step", int))
        elif kind == "abandon":
            error = ErrorDocument.from_document(messages.field(message, "error", dict))
            self._fail_rank(messages.field(message, "step", int), client.rank, error)
        elif kind == "reserve":
            capacities = await self._reserve(client.rank, messages.field(message, "room_bytes", int))
            client.answer(message, {"type": "reserved", "capacities": capacities})
        elif kind == "load":
            await self.loads.ask(client, message)
        elif kind == "load_done":
            self.loads.done(client.rank)
        elif kind == "latest":
            await self._latest(client, message)
        elif kind == "announce":
            await self.signal({"type": "announced", "step": messages.field(message, "step", int)})
        elif kind == "decline":
            await self.signal({"type": "declined", "step": messages.field(message, "step", int)})
        elif kind == "status":
            client.answer(message, self._status())
        elif kind == "goodbye":
            client.said_goodbye = True
            task = asyncio.create_task(self._farewell(client, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            _log.debug("rank %d sent the unknown message %s", client.rank, kind)

    async def lost(self, client: Client) -> None:
        """A trainer's connection ended: what it was filling is torn, and the newest snapshot goes to storage."""
        if self.clients.get(client.rank) is not client:
            return
        del self.clients[client.rank]
        self.idle_since = time.monotonic()
        self._waiting = [(c, m) for c, m in self._waiting if c is not client]
        self.loads.rank_lost(client.rank)
        if self.pod is None or client.said_goodbye:
            return
        self._crashed = True
        _log.warning("rank %d is gone without a goodbye", client.rank, extra={"rank": client.rank, "pid": client.pid})
        failure = RemoteFailure("TrainerDied", "the trainer ended before its state was sealed", pid=client.pid)
        error = StagingError("the trainer died", failures={client.rank: failure})
        for save in self.pod.table.rank_lost(client.rank, ErrorDocument.from_exception(error)):
            self._report_failed(save, error, withdraw=True)
        self.rescue()
        self._released()

    # --- saves -------------------------------------------------------------------------------------------------------

    def _require_pod(self) -> Pod:
        if self.pod is None:
            raise SidecarError("no session is open")
        return self.pod

    async def _claim(self, client: Client, message: messages.Message) -> None:
        pod = self._require_pod()
        step = messages.field(message, "step", int)
        persist = messages.field(message, "persist", bool)
        destination = messages.optional_field(message, "destination", dict)
        decision = pod.table.claim(step, client.rank, persist=persist, destination=destination)
        if isinstance(decision, slots.MustWait):
            self.metrics.saves_waited += not message.get("waited")
            self._waiting.append((client, {**message, "waited": True}))
            return
        if isinstance(decision, slots.Skipped):
            if decision.first:
                self.metrics.saves_skipped += 1
                self._withdraw(step, SaveSkipped(decision.reason, step=step), persist=persist)
            client.refuse(message, SaveSkipped(decision.reason, step=step))
            return
        if isinstance(decision, slots.Doomed):
            raise failures.staging_error(step, decision.failures)
        if isinstance(decision, slots.Replaced):
            victim = decision.victim
            self.metrics.saves_replaced += 1
            error = SaveSkipped(f"replaced by step {step} (staging.overlap: Latest)", step=victim.step)
            self._withdraw(victim.step, error, persist=victim.persist)
            self._broadcast({"type": "save_failed", "step": victim.step, "error": failures.document(error)})
        save = decision.save
        room = messages.field(message, "room_bytes", int)
        try:
            capacity = await asyncio.to_thread(pod.grow, client.rank, save.slot, room)
        except PillionError as err:
            self._fail_rank(step, client.rank, ErrorDocument.from_exception(err))
            raise
        pod.begin_fill(client.rank, save.slot, persist=persist)
        if step not in self._seal_timers:
            loop = asyncio.get_running_loop()
            self._seal_timers[step] = loop.call_later(self.settings.peer_timeout_s, self._seal_timeout, step)
        client.answer(message, {"type": "claimed", "slot": save.slot, "capacity_bytes": capacity})

    async def _reserve(self, rank: int, room_bytes: int) -> list[int]:
        pod = self._require_pod()
        return [await asyncio.to_thread(pod.grow, rank, slot, room_bytes) for slot in range(pod.policy.staging.slots)]

    def _sealed(self, client: Client, step: int) -> None:
        pod = self._require_pod()
        save = pod.table.sealed(step, client.rank)
        if save is not None:
            self._forget_timer(step)
            self._wake.set()
        self._released()

    def _seal_timeout(self, step: int) -> None:
        self._seal_timers.pop(step, None)
        save = self.pod.table.saves.get(step) if self.pod is not None else None
        if save is None or save.phase is not Phase.FILLING or self.pod is None:
            return
        missing = sorted(self.pod.table.ranks - save.sealed)
        waited = self.settings.peer_timeout_s
        text = f"did not seal step {step} within {waited:.1f} s"
        error = BarrierTimeout(
            phase="seal",
            missing=missing,
            waited_s=waited,
            step=step,
            failures={rank: RemoteFailure("BarrierTimeout", text) for rank in missing},
        )
        for rank in missing:
            self.pod.table.fail_rank(step, rank, ErrorDocument.from_exception(error))
        self._report_failed(save, error, withdraw=True)
        self._released()

    def _fail_rank(self, step: int, rank: int, error: ErrorDocument) -> None:
        pod = self._require_pod()
        first = step not in pod.table.saves and not pod.table.settled(step)
        save = pod.table.fail_rank(step, rank, error)
        told = failures.staging_error(step, {rank: error})
        if save is not None:
            # The rank itself knows, and better: its handle has the error as it was raised.
            self._report_failed(save, told, withdraw=True, but=rank)
        elif first:
            self.metrics.saves_failed += 1
            self._withdraw(step, told, persist=True)
        self._released()

    def _report_failed(self, save: Save, error: SaveError, *, withdraw: bool, but: int | None = None) -> None:
        step = save.step
        self._forget_timer(step)
        self.metrics.saves_failed += 1
        kind = type(error).__name__
        self.metrics.failures_by_kind[kind] = self.metrics.failures_by_kind.get(kind, 0) + 1
        _log.error("save of step %d failed: %s", step, error, extra={"step": step})
        if withdraw:
            self._withdraw(step, error, persist=save.persist)
        self._broadcast({"type": "save_failed", "step": step, "error": failures.document(error)}, but=but)

    def _withdraw(self, step: int, error: SaveError, *, persist: bool) -> None:
        """Other pods wait for this one's part of `step`: tell them that it never comes."""
        if self.pod is not None and len(self.pod.identity.pods) > 1:
            self._withdrawn.append((step, persist, ErrorDocument.from_exception(error)))
            self._wake.set()

    def _forget_timer(self, step: int) -> None:
        timer = self._seal_timers.pop(step, None)
        if timer is not None:
            timer.cancel()

    def _broadcast(self, message: Mapping[str, Any], *, but: int | None = None) -> None:
        for rank, client in self.clients.items():
            if rank != but:
                client.send(message)

    def _released(self) -> None:
        """A slot may be free: the waiting claims and loads try again, in their order."""
        waiting, self._waiting = self._waiting, []
        for client, message in waiting:
            task = asyncio.get_running_loop().create_task(self._retry(client, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.loads.slot_released()

    async def _retry(self, client: Client, message: messages.Message) -> None:
        try:
            await self._claim(client, message)
        except PillionError as err:
            client.refuse(message, err)

    def rescue(self) -> None:
        """Persist the newest whole snapshot that is not on storage: its trainer cannot make another."""
        pod = self.pod
        if pod is None or pod.policy.trigger.on_termination is not policy.OnTermination.SAVE:
            return
        save = pod.table.newest_complete()
        if save is not None and not save.persisted and not save.persist and pod.identity.root:
            save.persist = True
            if save.phase is Phase.DONE:  # one that is being registered as a snapshot is queued again by _persist
                save.phase = Phase.COMPLETE
            _log.warning("step %d was in memory only: it is persisted now", save.step, extra={"step": save.step})
            self._wake.set()

    # --- work --------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (job := self._next()) is not None:
                try:
                    await job
                except Exception:  # a boundary: the loop outlives any one save
                    _log.exception("internal error while saving")
                self._released()
            async with self._quiet:
                self._quiet.notify_all()

    def _next(self) -> Any:
        pod = self.pod
        if pod is None:
            return None
        if self._withdrawn:
            step, persist, error = self._withdrawn.pop(0)
            return self.operations.withdraw(pod, step, error, persist=persist)
        for save in sorted(pod.table.saves.values(), key=lambda s: s.order):
            if save.phase is Phase.COMPLETE and not save.failures:
                pod.table.start_persist(save)
                return self._persist(pod, save)
        return None

    def busy(self) -> bool:
        pod = self.pod
        if pod is None:
            return False
        phases = {save.phase for save in pod.table.saves.values() if not save.failures}
        return bool(self._withdrawn) or bool(phases & {Phase.COMPLETE, Phase.PERSISTING})

    async def quiet(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or being persisted. Blocks: up to timeout_s. False when the bound came first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._quiet:
                await self._quiet.wait_for(lambda: not self.busy())
        return not self.busy()

    async def _persist(self, pod: Pod, save: Save) -> None:
        pod.mark(save, arena.SlotState.PERSISTING)
        outcome: dict[str, Any] | None = None
        error: SaveError | None = None
        wanted = save.persist
        for attempt in range(PERSIST_ATTEMPTS):
            try:
                outcome = await self.operations.persist(pod, save)
                error = None
                break
            except ExecutorDied as err:
                failure = RemoteFailure("ExecutorDied", str(err))
                error = SaveError("the executor died", step=save.step, failures=dict.fromkeys(pod.segments, failure))
                if attempt + 1 < PERSIST_ATTEMPTS:
                    _log.warning("step %d goes to the executor's successor: %s", save.step, err)
            except SaveError as err:
                error = failures.for_local_ranks(err, list(pod.segments))
                break
            except PillionError as err:
                failure = RemoteFailure(type(err).__name__, str(err))
                error = SaveError("the save failed", step=save.step, failures=dict.fromkeys(pod.segments, failure))
                break
        persisted = outcome is not None and wanted
        pod.mark(save, arena.SlotState.SEALED, persisted=persisted)
        pod.table.finish(save, persisted=persisted)
        if save.persist and not wanted:  # its trainer died meanwhile: see rescue
            save.phase = Phase.COMPLETE
        elif outcome is None:
            self._report_failed(save, error or SaveError("the save failed", step=save.step), withdraw=False)
        else:
            self._committed(save, outcome)

    def _committed(self, save: Save, outcome: Mapping[str, Any]) -> None:
        metrics = self.metrics
        if save.persist:
            metrics.saves_committed += 1
            metrics.persisted_bytes += int(outcome["size_bytes"])
            metrics.persist_seconds += float(outcome["persist_s"])
            metrics.commit_seconds += float(outcome["commit_s"])
            metrics.last_committed_step = max(metrics.last_committed_step, save.step)
        else:
            metrics.snapshots += 1
        _log.info(
            "step %d is %s",
            save.step,
            "committed" if save.persist else "sealed on every rank",
            extra={"step": save.step, "bytes": outcome["size_bytes"], "elapsed_s": outcome["persist_s"]},
        )
        self._broadcast({**outcome, "type": "committed", "step": save.step})

    def _on_executor_event(self, event: messages.Message) -> None:
        if event["type"] in ("load_begin", "load_progress"):
            self.loads.progress(event)
        else:
            self._heard(event)

    # --- announcements -----------------------------------------------------------------------------------------------

    async def signal(self, message: dict[str, Any]) -> None:
        """Tell all trainers of the job: those of this pod at once, those of others through the executor."""
        pod = self.pod
        if pod is None or len(pod.identity.pods) == 1:
            self._heard(message)
            return
        # In the background: the executor may be busy, and this trainer's next message must not wait for it.
        task = asyncio.create_task(self.operations.signal(pod, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _heard(self, message: messages.Message) -> None:
        if message["type"] == "save_now":
            # Rank 0 decides at which step, so that all ranks save at the same one.
            decider = self.clients.get(0)
            if decider is not None:
                decider.send({"type": "save_now"})
            return
        self._broadcast({"type": message["type"], "step": messages.field(message, "step", int)})

    async def save_now(self) -> None:
        """Have the trainers save at a step that all of them have ahead of them."""
        await self.signal({"type": "save_now"})

    # --- the rest ----------------------------------------------------------------------------------------------------

    async def _latest(self, client: Client, message: messages.Message) -> None:
        pod = self._require_pod()
        found = await asyncio.to_thread(catalog.newest, pod.identity.root)
        answer: dict[str, Any] = {"type": "latest", "step": None}
        if found is not None:
            answer |= {"step": found[0], "path": found[1], "size_bytes": found[2]}
        client.answer(message, answer)

    def _status(self) -> dict[str, Any]:
        pod = self.pod
        return {
            "type": "status",
            "metrics": self.metrics.to_document(),
            "executor_pid": self.operations.executor_pid,
            "pid": os.getpid(),
            "saves": [
                {"step": s.step, "slot": s.slot, "phase": s.phase.value, "persisted": s.persisted}
                for s in (pod.table.saves.values() if pod is not None else ())
            ],
        }

    async def _farewell(self, client: Client, message: messages.Message) -> None:
        """Let a trainer go when its saves are done; the last one to leave makes sure of the newest snapshot."""
        drain_s = messages.field(message, "drain_s", float, 0.0)
        if all(other.said_goodbye for other in self.clients.values()):
            self.rescue()
        drained = await self.quiet(drain_s)
        if self.clients.get(client.rank) is client:
            del self.clients[client.rank]
        self._crashed = self._crashed or not messages.field(message, "clean", bool, True)
        if not self.clients:
            self.parted = not self._crashed
            self.idle_since = time.monotonic()
        client.answer(message, {"type": "farewell", "drained": drained})
