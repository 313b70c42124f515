"""
The front half of a save in this pod: claims, seals, and whatever keeps one from being sealed. Called from: the supervisor.

    claim/sealed/abandon --> SlotTable --> answers, and complete saves for `supervisor.persister`

What waits here is bounded: seals by `peer_timeout_s`, claims by the client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from pillion import fault_points
from pillion.errors import (
    BarrierTimeout,
    ErrorDocument,
    InternalError,
    PillionError,
    RemoteFailure,
    SaveError,
    SaveSkipped,
    StagingError,
)
from pillion.fault_points import FaultPoint
from pillion.wire import events, save_messages
from pillion_sidecar import settings
from pillion_sidecar.arena import slots
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import Phase, Save
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import destinations, failures, preflight
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

GATHER_S: Final = 5.0
"""How long a save that a rank could not stage waits for what the other local ranks say of it, where the trainers ask for all failures: ranks
come to a save within a step or two of each other."""
NOTICE_S: Final = 10.0
"""Between two notices to a claim that waits: a third of what the client gives a silent sidecar (session.REQUEST_TIMEOUT_S)."""


@dataclass
class _Gathering:
    """A save that some rank could not stage, until every local rank has said what became of its part."""

    persist: bool
    settled: set[int]
    timer: asyncio.TimerHandle


class StagingCoordinator:
    """See the module."""

    def __init__(
        self,
        of: settings.Settings,
        sidecar_status: SidecarStatus,
        trainers: Trainers,
        persister: Persister,
        tasks: tasks_module.BackgroundTasks,
    ) -> None:
        self._settings = of
        self._sidecar_status = sidecar_status
        self._trainers = trainers
        self._persister = persister
        self._tasks = tasks
        self._waiting: list[tuple[TrainerConnection, save_messages.Claim]] = []
        self._unanswered: dict[tuple[int, int], tuple[TrainerConnection, save_messages.Claim]] = {}
        """Claims whose client wants notices; by rank and message."""
        self._seal_timers: dict[tuple[str, int], asyncio.TimerHandle] = {}
        """By session and step: trainers that come back save the same steps again, each with all of the bound."""
        self._gathering: dict[tuple[str, int], _Gathering] = {}
        """By session and step."""
        self._withdrawn: deque[tuple[str, int]] = deque(maxlen=slots.REMEMBERED_SKIPS)
        """What the other pods were told of; a rank that fails later than GATHER_S is told to those of this pod alone."""

    async def claim(self, client: TrainerConnection, claim: save_messages.Claim, *, waited: bool = False) -> None:
        """A rank wants to fill a slot. While it waits it is told so, every NOTICE_S: a sidecar that hangs tells nothing."""
        key = (client.rank, claim.id)
        if claim.notices:
            self._unanswered[key] = (client, claim)
        waits = False
        try:
            waits = await self._claim(client, claim, waited=waited)
        finally:
            if not waits:
                self._unanswered.pop(key, None)

    async def notices(self) -> None:
        """Tell those who wait that they wait, for ever."""
        while True:
            await asyncio.sleep(NOTICE_S)
            for client, claim in list(self._unanswered.values()):
                client.answer(claim.id, save_messages.Waiting())

    async def _claim(self, client: TrainerConnection, claim: save_messages.Claim, *, waited: bool) -> bool:
        """Answer a claim; True when it has to wait."""
        pod = self._trainers.require_pod()
        step, persist, destination = claim.step, claim.persist, claim.destination
        if destination is not None and not self._settings.embedded:
            destinations.check(destination, root=pod.identity.root, writer=pod.policy.storage.writer)
        fault_points.reach(FaultPoint.CLAIM, rank=client.rank, step=step)
        decision = pod.table.claim(step, client.rank, persist=persist, destination=destination)
        if isinstance(decision, slots.MustWait):
            self._sidecar_status.metrics.saves_waited += not waited
            self._waiting.append((client, claim))
            return True
        if isinstance(decision, slots.Skipped):
            if decision.first:
                self._sidecar_status.metrics.saves_skipped += 1
                self._sidecar_status.dropped(step, SaveSkipped(decision.reason, step=step), persist=persist)
                self._persister.withdraw(step, SaveSkipped(decision.reason, step=step), persist=persist)
            client.refuse(claim.id, SaveSkipped(decision.reason, step=step))
            return False
        if isinstance(decision, slots.Doomed):
            raise failures.staging_error(step, decision.failures)
        if isinstance(decision, slots.Replaced):
            self._replaced(decision.victim, step)
        save = decision.save
        if save.filling == {client.rank} and not save.sealed:
            self._sidecar_status.began(step, persist=persist)
        self._look_ahead(pod, client.rank, claim.room_bytes)
        try:
            capacity = await asyncio.to_thread(pod.grow, client.rank, save.slot, claim.room_bytes)
        except PillionError as err:
            self.fail_rank(step, client.rank, ErrorDocument.from_exception(err), persist=persist)
            raise
        pod.table.date(save, pod.order)
        pod.begin_fill(client.rank, save.slot, persist=persist)
        key = (pod.identity.session, step)
        if key not in self._seal_timers:
            loop = asyncio.get_running_loop()
            self._seal_timers[key] = loop.call_later(self._settings.peer_timeout_s, self._seal_timeout, *key)
        client.answer(claim.id, save_messages.Claimed(slot=save.slot, capacity_bytes=capacity))
        return False

    def _replaced(self, victim: Save, step: int) -> None:
        error = SaveSkipped(f"replaced by step {step} (staging.overlap: Latest)", step=victim.step)
        self._sidecar_status.metrics.saves_replaced += 1
        self._sidecar_status.dropped(victim.step, error, persist=victim.persist)
        self._persister.withdraw(victim.step, error, persist=victim.persist)
        self._trainers.broadcast(events.SaveFailed(step=victim.step, error=failures.document(error)))

    async def reserve(self, rank: int, room_bytes: int) -> list[int]:
        """Have every slot of a rank hold at least `room_bytes`; the capacities."""
        pod = self._trainers.require_pod()
        self._look_ahead(pod, rank, room_bytes)
        return [await asyncio.to_thread(pod.grow, rank, slot, room_bytes) for slot in range(pod.policy.staging.slots)]

    def begin_reserve(self, client: TrainerConnection, request: save_messages.Reserve) -> None:
        """`reserve`, and its answer, beside what else the rank says: its saves go on meanwhile."""
        self._tasks.start(self._answer_reserve(client, request), "reserve")

    async def _answer_reserve(self, client: TrainerConnection, request: save_messages.Reserve) -> None:
        try:
            capacities = await self.reserve(client.rank, request.room_bytes)
            client.answer(request.id, save_messages.Reserved(capacities=tuple(capacities)))
        except PillionError as err:
            client.refuse(request.id, err)
        except OSError as err:
            client.refuse(request.id, InternalError(f"{type(err).__name__}: {err}"))

    def _look_ahead(self, pod: PodArena, rank: int, room_bytes: int) -> None:
        """Whether all slots of all ranks will fit, now that a rank says how large its state is."""
        if room_bytes <= pod.rooms.get(rank, 0):
            return
        pod.rooms[rank] = room_bytes
        problem = preflight.too_small(
            pod.rooms,
            num_ranks=len(pod.segments),
            slots=pod.policy.staging.slots,
            bounds=pod.bounds,
        )
        if problem and not self._sidecar_status.memory_problem:
            _log.warning("%s", problem)
            self._trainers.notice(rank, problem)
        self._sidecar_status.memory(problem)

    def sealed(self, client: TrainerConnection, step: int, stall_s: float) -> None:
        """A rank has sealed its slot, and was held up for `stall_s` by it; with the last one the save is complete."""
        pod = self._trainers.require_pod()
        self._sidecar_status.sealed(step, stall_s)
        save = pod.table.sealed(step, client.rank, now_ns=time.time_ns())
        if save is not None:
            self._sidecar_status.complete(step)
            self._forget_timer(step)
            self._persister.wake()
        self._settled(step, client.rank)
        self.released()

    def _seal_timeout(self, session: str, step: int) -> None:
        self._seal_timers.pop((session, step), None)
        pod = self._trainers.pod
        save = pod.table.saves.get(step) if pod is not None and pod.identity.session == session else None
        if save is None or save.phase is not Phase.FILLING or pod is None:
            return
        missing = sorted(pod.table.ranks - save.sealed)
        waited = self._settings.peer_timeout_s
        text = f"did not seal step {step} within {waited:.1f} s"
        error = BarrierTimeout(
            phase="seal",
            missing=missing,
            waited_s=waited,
            step=step,
            failures={rank: RemoteFailure("BarrierTimeout", text) for rank in missing},
        )
        for rank in missing:
            pod.table.fail_rank(step, rank, ErrorDocument.from_exception(error))
        self._failed(save, error)
        self.released()

    def fail_rank(self, step: int, rank: int, error: ErrorDocument, *, persist: bool, gathers: bool = False) -> None:
        """
        A rank will not seal `step`.

        Args:
            persist: it was to go to storage.
            gathers: the trainers wait for the failures of all ranks, within GATHER_S.
        """
        pod = self._trainers.require_pod()
        first = step not in pod.table.saves and not pod.table.settled(step)
        save = pod.table.fail_rank(step, rank, error)
        told = failures.staging_error(step, {rank: error})
        if save is not None:
            # The rank itself knows, and better: its handle has the error as it was raised.
            self._failed(save, told, but=rank, gathers=gathers)
        elif first:
            self._sidecar_status.abandoned(step, told)
            if not gathers:
                self._persister.withdraw(step, told, persist=persist)
        if gathers:
            self._gather(step, rank, set() if save is None else save.sealed, persist=persist)
        self.released()

    def _gather(self, step: int, rank: int, sealed: Set[int], *, persist: bool) -> None:
        key = self._trainers.require_pod().identity.session, step
        if key not in self._gathering:
            timer = asyncio.get_running_loop().call_later(GATHER_S, self._gathered, key)
            self._gathering[key] = _Gathering(persist, set(sealed), timer)
        self._settled(step, rank)

    def _settled(self, step: int, rank: int) -> None:
        """A rank has sealed `step`, or has said why not, or is gone."""
        pod = self._trainers.pod
        of = self._gathering.get((pod.identity.session, step)) if pod is not None else None
        if of is not None and pod is not None:
            of.settled.add(rank)
            if of.settled >= pod.table.ranks:
                self._gathered((pod.identity.session, step))

    def _gathered(self, key: tuple[str, int]) -> None:
        """Tell everybody which ranks of this pod could not stage a step; with other pods, when those have told theirs."""
        of, (session, step) = self._gathering.pop(key), key
        of.timer.cancel()
        pod = self._trainers.pod
        if pod is None or pod.identity.session != session:
            return
        told = failures.staging_error(step, pod.table.failures(step))
        if len(pod.identity.pods) > 1 and key not in self._withdrawn:
            self._withdrawn.append(key)
            self._persister.withdraw(step, told, persist=of.persist)
        else:
            self._trainers.broadcast(events.SaveFailures(step=step, error=failures.document(told)))

    def rank_lost(self, client: TrainerConnection) -> None:
        """A trainer is gone; without a goodbye what it was filling is torn."""
        self._waiting = [(each, claim) for each, claim in self._waiting if each is not client]
        self._unanswered = {key: entry for key, entry in self._unanswered.items() if entry[0] is not client}
        pod = self._trainers.pod
        if pod is None or client.said_goodbye:
            return
        failure = RemoteFailure("TrainerDied", "the trainer ended before its state was sealed", pid=client.pid)
        error = StagingError("the trainer died", failures={client.rank: failure})
        for save in pod.table.rank_lost(client.rank, ErrorDocument.from_exception(error)):
            self._failed(save, error)
        for _, step in list(self._gathering):
            self._settled(step, client.rank)

    def _failed(self, save: Save, error: SaveError, *, but: int | None = None, gathers: bool = False) -> None:
        self._forget_timer(save.step)
        if not gathers:
            self._persister.withdraw(save.step, error, persist=save.persist)
        self._persister.report_failed(save, error, but=but, more=gathers)

    def _forget_timer(self, step: int) -> None:
        pod = self._trainers.pod
        timer = self._seal_timers.pop((pod.identity.session, step), None) if pod is not None else None
        if timer is not None:
            timer.cancel()

    def released(self) -> None:
        """A slot may be free: the waiting claims try again, in their order."""
        waiting, self._waiting = self._waiting, []
        for client, claim in waiting:
            self._tasks.start(self._retry(client, claim), "claim")

    async def _retry(self, client: TrainerConnection, claim: save_messages.Claim) -> None:
        try:
            await self.claim(client, claim, waited=True)
        except PillionError as err:
            client.refuse(claim.id, err)
