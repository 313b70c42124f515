"""
The first half of a save in this pod: grants slots, collects the seals of all ranks, and handles ranks that fail before their seal.

    claim/sealed/abandon --> SlotTable --> answers, and complete saves for `supervisor.persister`

Called from: the supervisor. `peer_timeout_s` bounds the wait for the seals of a save; the client bounds the wait of its claim.
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
from pillion_sidecar.arena.slots import Save, SaveState
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import destinations, failures, preflight
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.server import TrainerConnection
from pillion_sidecar.supervisor.trainers import Trainers

_log = logging.getLogger(__name__)

GATHER_TIMEOUT_S: Final = 5.0
"""Timeout for the other local ranks' outcomes of a save that a rank could not stage, if the trainers request all failures. Ranks reach a
save within one or two steps of each other."""
NOTICE_PERIOD_S: Final = 4.0
"""Interval of the notices to a waiting claim: less than the silence of which a client warns (connection.SILENCE_WARNING_S), as this is none."""


@dataclass
class _Gathering:
    """The outcomes of the local ranks for a save that at least one of them could not stage."""

    persist: bool
    settled: set[int]
    """Ranks whose outcome is known: sealed, failed or gone."""
    timer: asyncio.TimerHandle


class StagingCoordinator:
    """Grants slots to the local ranks, and follows each save until all of them have sealed it. See the module."""

    def __init__(
        self,
        own_settings: settings.Settings,
        sidecar_status: SidecarStatus,
        trainers: Trainers,
        persister: Persister,
        tasks: tasks_module.BackgroundTasks,
    ) -> None:
        self._settings = own_settings
        self._sidecar_status = sidecar_status
        self._trainers = trainers
        self._persister = persister
        self._tasks = tasks
        self._waiting: list[tuple[TrainerConnection, save_messages.Claim]] = []
        """Claims that wait for a free slot, in order."""
        self._unanswered: dict[tuple[int, int], tuple[TrainerConnection, save_messages.Claim]] = {}
        """Claims whose clients understand notices, by rank and request id."""
        self._since: dict[tuple[int, int], float] = {}
        """When a claim began to wait, monotonic seconds, by rank and request id."""
        self._seal_timers: dict[tuple[str, int], asyncio.TimerHandle] = {}
        """Timeouts of the seals, by session and step. Restarted trainers save the same steps again, with new timeouts."""
        self._gathering: dict[tuple[str, int], _Gathering] = {}
        """Saves that a rank could not stage, by session and step, while outcomes are collected."""
        self._withdrawn: deque[tuple[str, int]] = deque(maxlen=slots.REMEMBERED_SKIPS)
        """Saves whose failures the other pods already have, by session and step. Later failures are reported in this pod only."""

    async def claim(self, client: TrainerConnection, claim: save_messages.Claim, *, waited: bool = False) -> None:
        """
        Answer a rank's claim, or let it wait for a free slot.

        Args:
            client: the rank's connection.
            claim: the request.
            waited: whether this claim has waited before.

        Raises:
            PillionError: the claim is refused, or its slot cannot grow.
        """
        key = (client.rank, claim.id)
        if claim.notices:
            self._unanswered[key] = (client, claim)
        waits = False
        try:
            waits = await self._claim(client, claim, waited=waited)
        finally:
            if not waits:
                self._unanswered.pop(key, None)
                since_s = self._since.pop(key, None)
                if since_s is not None:
                    self._sidecar_status.waited(claim.step, time.monotonic() - since_s)

    async def notices(self) -> None:
        """Send a notice to every waiting claim, each NOTICE_PERIOD_S. Runs until it is cancelled. A hung sidecar sends no notices."""
        while True:
            await asyncio.sleep(NOTICE_PERIOD_S)
            for client, claim in list(self._unanswered.values()):
                client.answer(claim.id, save_messages.Waiting())

    async def _claim(self, client: TrainerConnection, claim: save_messages.Claim, *, waited: bool) -> bool:
        """Answer a claim. Return True if it must wait instead."""
        pod = self._trainers.require_pod()
        step, persist, destination = claim.step, claim.persist, claim.destination
        if destination is not None and not self._settings.embedded:
            destinations.check(destination, root=pod.identity.root, writer=pod.policy.storage.writer)
        fault_points.reach(FaultPoint.CLAIM, rank=client.rank, step=step)
        decision = pod.table.claim(step, client.rank, persist=persist, for_disk=claim.local, destination=destination)
        self._report_overtaken(pod)
        if isinstance(decision, slots.MustWait):
            self._sidecar_status.metrics.saves_waited += not waited
            self._waiting.append((client, claim))
            self._since.setdefault((client.rank, claim.id), time.monotonic())
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

    def _report_overtaken(self, pod: PodArena) -> None:
        """
        Report the snapshots that a newer save has overtaken in the queue. They were whole in memory, which is all that was asked for.

        Unreported, their handles would stay open, and the script's exit would count them as lost.
        """
        while pod.table.overtaken:
            save = pod.table.overtaken.pop()
            self._sidecar_status.snapshot()
            _log.info(
                "step %d was sealed on every rank, and a newer save has its slot", save.step, extra={"step": save.step}
            )
            self._trainers.broadcast(events.Committed(step=save.step, path=""))

    def _replaced(self, victim: Save, step: int) -> None:
        error = SaveSkipped(f"replaced by step {step} (staging.overlap: Latest)", step=victim.step)
        self._sidecar_status.metrics.saves_replaced += 1
        self._sidecar_status.dropped(victim.step, error, persist=victim.persist)
        self._persister.withdraw(victim.step, error, persist=victim.persist)
        self._trainers.broadcast(events.SaveFailed(step=victim.step, error=failures.document(error)))

    async def reserve(self, rank: int, room_bytes: int) -> list[int]:
        """Grow every slot of a rank to at least `room_bytes`. Return the capacities, bytes. Raises: see `PodArena.grow`."""
        pod = self._trainers.require_pod()
        self._look_ahead(pod, rank, room_bytes)
        return [await asyncio.to_thread(pod.grow, rank, slot, room_bytes) for slot in range(pod.policy.staging.slots)]

    def begin_reserve(self, client: TrainerConnection, request: save_messages.Reserve) -> None:
        """Run `reserve` in the background, and answer the request then. Meanwhile the rank can save."""
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
        """Note the size of a rank's state, and warn if the slots of all ranks will not fit into the arena."""
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
        """Note that a rank has sealed its slot, which held it up for `stall_s`. With the last rank, the save is complete."""
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
        if save is None or save.state is not SaveState.FILLING or pod is None:
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
        Fail a save, because one rank will not seal it.

        Args:
            step: the step of the save.
            rank: the failed rank.
            error: why it failed.
            persist: whether the save was meant for storage.
            gathers: whether the trainers wait for the failures of all ranks, up to GATHER_TIMEOUT_S.
        """
        pod = self._trainers.require_pod()
        first = step not in pod.table.saves and not pod.table.settled(step)
        save = pod.table.fail_rank(step, rank, error)
        staging_error = failures.staging_error(step, {rank: error})
        if save is not None:
            # The failed rank gets no event, because its handle has the original error.
            self._failed(save, staging_error, but=rank, gathers=gathers)
        elif first:
            self._sidecar_status.abandoned(step, staging_error)
            if not gathers:
                self._persister.withdraw(step, staging_error, persist=persist)
        if gathers:
            self._gather(step, rank, set() if save is None else save.sealed, persist=persist)
        self.released()

    def _gather(self, step: int, rank: int, sealed: Set[int], *, persist: bool) -> None:
        key = self._trainers.require_pod().identity.session, step
        if key not in self._gathering:
            timer = asyncio.get_running_loop().call_later(GATHER_TIMEOUT_S, self._gathered, key)
            self._gathering[key] = _Gathering(persist, set(sealed), timer)
        self._settled(step, rank)

    def _settled(self, step: int, rank: int) -> None:
        """Note that a rank's outcome for `step` is known: it has sealed or failed, or is gone."""
        pod = self._trainers.pod
        gathering = self._gathering.get((pod.identity.session, step)) if pod is not None else None
        if gathering is not None and pod is not None:
            gathering.settled.add(rank)
            if gathering.settled >= pod.table.ranks:
                self._gathered((pod.identity.session, step))

    def _gathered(self, key: tuple[str, int]) -> None:
        """Report which ranks of this pod could not stage a step. With several pods, the pods first exchange their failures."""
        gathering, (session, step) = self._gathering.pop(key), key
        gathering.timer.cancel()
        pod = self._trainers.pod
        if pod is None or pod.identity.session != session:
            return
        error = failures.staging_error(step, pod.table.failures(step))
        if len(pod.identity.pods) > 1 and key not in self._withdrawn:
            self._withdrawn.append(key)
            self._persister.withdraw(step, error, persist=gathering.persist)
        else:
            self._trainers.broadcast(events.SaveFailures(step=step, error=failures.document(error)))

    def rank_lost(self, client: TrainerConnection) -> None:
        """Drop the claims of a trainer that is gone. Without a goodbye, fail the saves that it was filling."""
        self._waiting = [(claimer, claim) for claimer, claim in self._waiting if claimer is not client]
        self._unanswered = {key: entry for key, entry in self._unanswered.items() if entry[0] is not client}
        self._since = {key: since_s for key, since_s in self._since.items() if key[0] != client.rank}
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
        """Let the waiting claims try again, in order, because a slot may be free."""
        waiting, self._waiting = self._waiting, []
        for client, claim in waiting:
            self._tasks.start(self._retry(client, claim), "claim")

    async def _retry(self, client: TrainerConnection, claim: save_messages.Claim) -> None:
        try:
            await self.claim(client, claim, waited=True)
        except PillionError as err:
            client.refuse(claim.id, err)
