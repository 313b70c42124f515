"""
Loads of one pod: wait for every local rank to ask, lend a slot, run the executor, pass its progress on.

Called from: the supervisor. A load is collective: one rank that never asks fails it for all at a bound, with its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from pillion.errors import ErrorDocument, LoadError, PillionError, UsageError
from pillion.wire import load_messages, messages
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import NO_SLOT, Save
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.settings import Settings
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import destinations
from pillion_sidecar.supervisor.executor_client import ExecutorClient, SessionOver
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)
Asked = tuple[TrainerConnection, load_messages.Load]


class Loader:
    """See the module."""

    def __init__(
        self,
        of: Settings,
        trainers: Trainers,
        executor_client: ExecutorClient,
        persister: Persister,
        sidecar_status: SidecarStatus,
    ) -> None:
        self._settings = of
        self._trainers = trainers
        self._executor_client = executor_client
        self._persister = persister
        self._sidecar_status = sidecar_status
        self._asked: dict[int, Asked] = {}
        self._running: dict[int, Asked] = {}
        self._reading: set[int] = set()
        """Ranks that still copy from a slot."""
        self._pinned: list[Save] = []
        self._lent: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._slot_free = asyncio.Event()
        self._tasks = tasks.BackgroundTasks()

    async def ask(self, client: TrainerConnection, load: load_messages.Load) -> None:
        """
        A rank wants to load, or to know what a load would take.

        Raises:
            UsageError: it asks for something else than its peers.
        """
        for other, asked in self._asked.values():
            if _words(asked) != _words(load):
                raise UsageError(
                    f"rank {client.rank} calls {_words(load)}, rank {other.rank} {_words(asked)}: all ranks make the same call"
                )
        pod = self._trainers.pod
        if pod is None:
            raise UsageError("no session is open")
        if load.path is not None and not self._settings.embedded:
            destinations.check_source(load.path, root=pod.identity.root)
        self._asked[client.rank] = (client, load)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._settings.peer_timeout_s, self._timeout)
        if set(self._asked) == set(pod.segments):
            self._timer.cancel()
            self._timer = None
            ready, self._asked = self._asked, {}
            self._tasks.start(self._run(ready), "loading")

    def _timeout(self) -> None:
        self._timer = None
        pod = self._trainers.pod
        asked, self._asked = self._asked, {}
        missing = sorted(set(pod.segments if pod is not None else ()) - set(asked))
        waited = self._settings.peer_timeout_s
        error = LoadError(f"ranks {missing} did not ask to load within {waited:.1f} s; load is called on all ranks")
        for client, load in asked.values():
            client.refuse(load.id, error)

    def rank_lost(self, rank: int) -> None:
        self._asked.pop(rank, None)
        if not self._asked and self._timer is not None:
            # It counts from the first rank that asks; the next load has all of the bound.
            self._timer.cancel()
            self._timer = None
        self.done(rank)

    def done(self, rank: int) -> None:
        """A rank has copied all it wanted; the last one releases the slots."""
        self._reading.discard(rank)
        if not self._reading:
            self._release()

    def slot_released(self) -> None:
        self._slot_free.set()

    def progress(self, event: messages.Message) -> None:
        """An event of the executor for one rank."""
        slot = event.get("slot")
        pod = self._trainers.pod
        if event["type"] == "load_begin" and event.get("spare") and pod and isinstance(slot, int):
            # The slot that was lent, or one that it took by itself where none was.
            self._lent = slot
            pod.table.take(slot)
        entry = self._running.get(int(event.get("rank", -1)))
        if entry is not None:
            client, load = entry
            client.answer(load.id, load.answers()[event["type"]].from_document(event))

    async def _run(self, asked: dict[int, Asked]) -> None:
        pod = self._trainers.pod
        try:
            if pod is None:
                raise UsageError("no session is open")
            # A save in flight may be the newest: it is finished first.
            await self._persister.quiet(self._settings.persist_timeout_s)
            self._release()
            # What its arena holds has a date only once the session has: see Pod.date. A failure shows at the load itself.
            with contextlib.suppress(PillionError):
                await self._executor_client.open(pod)
            first = next(iter(asked.values()))[1]
            if first.find:
                await self._find(pod, asked, first)
                return
            # First the slot, then the pins: alone in its job a pod with two slots lets the older snapshot make room.
            self._lent = await self._lend()
            self._pinned = pod.table.pin()
            pod.table.forget_doomed()
            if self._lent is not None:
                pod.reset(self._lent)
            self._running = asked
            self._reading = set(asked)
            request = self._request(pod, first) | {
                "layouts": {str(rank): load.layout for rank, (_, load) in asked.items()},
                "spare_slot": NO_SLOT if self._lent is None else self._lent,
            }
            result = await self._executor_client.load(pod, request)
            if result["step"] is not None and request["path"] is None:
                pod.set_aside((tuple(result["order"]), int(result["step"])))
            if result["tier"] == "arena" and len(pod.identity.pods) > 1:
                pod.heard(int(result["step"]), persisted=False)
                # Before any rank can save again, so that it comes first in every pod.
                self._persister.rescue_in_turn(pod, self._executor_client.loads)
            self._answer(asked, result)
        except PillionError as err:
            self._fail(asked, ErrorDocument.from_exception(err))
        except Exception as err:  # a boundary: the trainers wait for an answer
            _log.exception("a load failed")
            self._fail(asked, ErrorDocument("LoadError", f"{type(err).__name__}: {err}"))
        finally:
            self._running = {}

    @staticmethod
    def _request(pod: PodArena, first: load_messages.Load) -> dict[str, Any]:
        """What the executor has to know of the arena and of the call, without what each rank wants."""
        return {
            "step": first.step,
            "strict": first.strict,
            "find": first.find,
            "path": first.path,
            "arena": {str(step): slot for step, slot in pod.table.restorable().items()},
            "near": {str(rank): pid for rank, pid in pod.near.items()},
            "orders": {str(save.step): save.born for save in pod.table.saves.values() if save.born},
            "strangers": [[each.step, each.world_size, each.order] for each in pod.strangers.values()],
        }

    async def _find(self, pod: PodArena, asked: dict[int, Asked], first: load_messages.Load) -> None:
        """Tell every rank what a load would take. Nothing is lent, filled or forgotten for it."""
        self._pinned = pod.table.pin()
        try:
            request = self._request(pod, first) | {"layouts": {}, "spare_slot": NO_SLOT}
            result = await self._executor_client.load(pod, request)
        finally:
            self._release()
        found = {name: result[name] for name in ("step", "tier", "path", "refused")}
        for client, load in asked.values():
            client.answer(load.id, load_messages.Loaded(**found))

    async def _lend(self) -> int | None:
        """A slot to load into; None: the executor takes one once the pods have agreed on a checkpoint of storage."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.peer_timeout_s):
                while self._trainers.pod is not None:
                    self._slot_free.clear()
                    slot = self._trainers.pod.table.lend()
                    if slot is not None or self._trainers.pod.table.crowded():
                        return slot
                    await self._slot_free.wait()
        raise LoadError(f"no slot became free to load into within {self._settings.peer_timeout_s:.1f} s")

    def _answer(self, asked: dict[int, Asked], result: dict[str, Any]) -> None:
        metrics = self._sidecar_status.metrics
        metrics.loads_arena += result["tier"] == "arena"
        metrics.loads_storage += result["tier"] == "storage"
        if result["step"] is not None:
            self._sidecar_status.loaded_from(int(result["step"]), str(result["tier"]))
        for where, why in result["refused"].items():
            _log.error("refused the checkpoint %s: %s", where, why)
            self._sidecar_status.refused(where, why)
        for where, why in result["passed_over"].items():
            _log.warning("%s is newer than the loaded checkpoint, and was not used: %s", where, why)
        if result["set_aside"]:
            _log.warning(
                "committed steps %s are newer than the loaded step; they stay on storage and are loaded only by number",
                result["set_aside"],
            )
        for rank, (client, load) in asked.items():
            client.answer(
                load.id,
                load_messages.Loaded(
                    step=result["step"],
                    tier=result["tier"],
                    path=result["path"],
                    refused=result["refused"],
                    passed_over=result["passed_over"],
                    set_aside=result["set_aside"],
                    unexpected=result["unexpected"].get(str(rank), ()),
                    alike=result["alike"],
                    differing=result["differing"],
                    opaque=result["opaque"].get(str(rank), {}),
                ),
            )
        _log.info("loaded step %s from %s", result["step"], result["tier"], extra={"step": result["step"]})

    def _fail(self, asked: dict[int, Asked], error: ErrorDocument) -> None:
        self._release()
        step = next(iter(asked.values()))[1].step
        here = self._trainers.clients
        if error.kind == SessionOver.__name__ or not any(
            here.get(rank) is client for rank, (client, _) in asked.items()
        ):
            _log.info("abandoned a load because its trainers have ended: %s", error.message)
        else:
            self._sidecar_status.load_failed(step, error.kind, error.message)
        for client, load in asked.values():
            client.refuse(load.id, error)

    def _release(self) -> None:
        pod = self._trainers.pod
        if pod is None:
            return
        pod.table.unpin(self._pinned)
        self._pinned = []
        if self._lent is not None:
            pod.table.give_back(self._lent)
            self._lent = None


def _words(load: load_messages.Load) -> str:
    """A rank's call in the words of the training script: equal where the calls are."""
    if load.find:
        return f"find(step={load.step})"
    strict = "" if load.strict else ", strict=False"
    what = f"step={load.step}" if load.path is None else f"checkpoint_id={load.path!r}"
    return f"load({what}{strict})"
