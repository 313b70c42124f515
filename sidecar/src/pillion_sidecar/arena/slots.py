"""
Which save holds which slot, and what a claim gets. Pure: events in, decisions out; no clock, no file, no process.

Called from: the supervisor, for every claim, seal, failure and outcome. Nobody else changes a `Save`: each transition is a method of
`SlotTable`. The slots of a pod's local ranks are used in lockstep: slot i of every segment belongs to the same save, so that one decision
(grant, wait, skip, replace) holds for all local ranks, and the pod never stages a step on some ranks only because of its own arena.

    phase        the slot holds                           leaves it by
    ----------   --------------------------------------   ----------------------------------------------------------------------
    filling      what ranks copy into it                  sealed: complete | fail_rank, rank_lost: free once no rank fills it
    complete     a whole state, queued                    start_persist: persisting | claim under Latest: free
    persisting   a whole state, which is being written    finish: done, or complete when a rescue wanted it on storage meanwhile
    done         a whole state, on storage or not         to_storage: complete | claim, lend, take: free once another needs it

The newest complete save keeps its slot until a newer one is complete: it is what a crash restores. With several pods so does the newest one
that all of them hold, until it is on storage: a peer may have died before it could seal what this pod has sealed since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from pillion.errors import ErrorDocument
from pillion.wire.policy import Overlap


class Phase(StrEnum):
    """How far a save has come; the module's table has the transitions."""

    FILLING = "filling"
    COMPLETE = "complete"
    PERSISTING = "persisting"
    DONE = "done"


@dataclass
class Save:
    """One step's save in this pod. Everybody may look; `SlotTable` alone changes it."""

    step: int
    slot: int
    order: int
    """Counts claims; the newest save is the one of the highest order."""
    persist: bool
    destination: Mapping[str, Any] | None
    phase: Phase = Phase.FILLING
    filling: set[int] = field(default_factory=set)
    sealed: set[int] = field(default_factory=set)
    failures: dict[int, ErrorDocument] = field(default_factory=dict)
    snapshot: bool = False
    """Claimed for memory only; `persist` is set all the same when it is rescued."""
    taken_for_storage: bool = False
    """What `persist` was when the executor took it up: a rescue may want it on storage since."""
    persisted: bool = False
    sealed_ns: int = 0
    """When it was complete, wall clock, for people."""
    concluded: bool = False
    """Every rank of the job holds it: what all can go back to."""
    hopeless: bool = False
    """Some rank of the job does not hold this step: it can never be committed or restored."""
    adopted: bool = False
    """Found in the arena: a sidecar before this one may have begun to persist it."""
    pins: int = 0
    """Loads that read this slot now."""
    born: tuple[int, int] | None = None
    """(generation, epoch) in which it was filled, or committed: see `commit.Order`. None: the executor has not opened the session yet."""
    inherited: bool = False
    """Sealed by trainers of a session before this one."""
    set_aside: bool = False
    """A load went back behind it: training goes on from an older step, and this one is of a branch that was left."""

    @property
    def rescued(self) -> bool:
        """A snapshot for memory that goes to storage, as its trainers are gone."""
        return self.snapshot and self.persist

    @property
    def complete(self) -> bool:
        return self.phase is not Phase.FILLING and not self.failures


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A whole state that a sidecar before this one left in a slot."""

    step: int
    slot: int
    snapshot: bool
    is_owed: bool
    """To the executor: to be written, or to be made known to the other pods."""
    persisted: bool = False
    concluded: bool = False
    set_aside: bool = False
    inherited: bool = False
    born: tuple[int, int] | None = None
    sealed_ns: int = 0


@dataclass(frozen=True, slots=True)
class Granted:
    save: Save


@dataclass(frozen=True, slots=True)
class Replaced:
    """Granted, at the price of an older save that was not being written: it is to be reported as skipped."""

    save: Save
    victim: Save


@dataclass(frozen=True, slots=True)
class MustWait:
    """No slot is free; ask again after the next release."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """No slot is free and the policy does not wait; every local rank gets the same answer for this step."""

    reason: str
    first: bool = False
    """This is the claim that decided it: told to the other pods and counted once, not once a rank."""


@dataclass(frozen=True, slots=True)
class Doomed:
    """A local rank could not even claim this step: the others need not stage it."""

    failures: Mapping[int, ErrorDocument]


Decision = Granted | Replaced | MustWait | Skipped | Doomed

NO_SLOT: Final = -1
"""What a load is lent where every slot holds a whole save."""
REMEMBERED_SKIPS = 64
"""How many skipped steps are remembered, so that a slower local rank gets the same answer: ranks are at most a few apart."""


class SlotTable:
    """
    The slots of one pod.

    Args:
        num_slots: slots of each segment.
        ranks: the local ranks (global numbers).
        overlap: what a claim gets when no slot is free.
        alone: the pod has all ranks of the job, so that what is complete here is complete.
    """

    def __init__(self, num_slots: int, ranks: Sequence[int], overlap: Overlap, *, alone: bool = True) -> None:
        self.num_slots = num_slots
        self.ranks = frozenset(ranks)
        self.overlap = overlap
        self.alone = alone
        self.saves: dict[int, Save] = {}
        self._skipped: dict[int, str] = {}
        self._doomed: dict[int, dict[int, ErrorDocument]] = {}
        self._order = 0
        self._lent: set[int] = set()

    # --- looking ---------------------------------------------------------------------------------------------------

    def newest_complete(self) -> Save | None:
        """What is owed to storage at the end; not what a load went back behind."""
        whole = (save for save in self.saves.values() if save.complete and not save.set_aside)
        return max(whole, key=lambda s: s.order, default=None)

    def next_to_persist(self) -> Save | None:
        """The oldest complete save that the executor has not taken up. One for memory only is taken up too: the other pods hear of it."""
        return min(self._queued(), key=lambda s: s.order, default=None)

    def _queued(self) -> list[Save]:
        return [save for save in self.saves.values() if save.phase is Phase.COMPLETE and not save.failures]

    def held(self) -> set[int]:
        return {save.slot for save in self.saves.values()} | self._lent

    def restorable(self) -> dict[int, int]:
        """step -> slot of every complete save that is still whole."""
        return {save.step: save.slot for save in self.saves.values() if save.complete}

    # --- loads -----------------------------------------------------------------------------------------------------

    def lend(self) -> int | None:
        """A slot for a load to fill from storage; None when every slot is needed."""
        slot = self._free_slot(for_load=True)
        if slot is not None:
            self._lent.add(slot)
        return slot

    def crowded(self) -> bool:
        """Every slot holds a whole save that nobody uses: which of them all pods hold they have yet to tell each other."""
        idle = {
            save.slot for save in self.saves.values() if save.phase is Phase.DONE and save.complete and not save.pins
        }
        return len(idle) == self.num_slots and not self._lent

    def take(self, slot: int) -> None:
        """A load fills this slot, as the pods have agreed on a checkpoint of storage; what it held is gone."""
        self.saves = {step: save for step, save in self.saves.items() if save.slot != slot}
        self._lent.add(slot)

    def give_back(self, slot: int) -> None:
        self._lent.discard(slot)

    def settled(self, step: int) -> bool:
        """Whether `step` was skipped or has failed: every later claim of it is refused."""
        return step in self._skipped or step in self._doomed

    def awaits_others(self, rank: int) -> bool:
        """Whether a save that this rank has sealed is still to be sealed by others."""
        return any(
            save.phase is Phase.FILLING and rank in save.sealed and not save.failures for save in self.saves.values()
        )

    def failures(self, step: int) -> Mapping[int, ErrorDocument]:
        """What the local ranks that will not seal `step` have said."""
        return dict(self._doomed.get(step, {}))

    def forget_doomed(self) -> None:
        """After a load a step may come again."""
        self._doomed.clear()
        self._skipped.clear()

    def set_aside(self, loaded: tuple[tuple[int, int], int]) -> list[Save]:
        """
        Mark what is newer than the checkpoint that was loaded, given as (order, step), and nothing else: a load may also go forward again.

        Returns:
            The saves whose mark has changed.
        """
        changed = []
        for save in self.saves.values():
            newer = save.born is not None and (save.born, save.step) > loaded
            if save.complete and save.set_aside != newer:
                save.set_aside = newer
                changed.append(save)
        return changed

    def pin(self) -> list[Save]:
        """Keep every complete save where it is while a load reads the arena."""
        pinned = [save for save in self.saves.values() if save.complete]
        for save in pinned:
            save.pins += 1
        return pinned

    def unpin(self, pinned: Iterable[Save]) -> None:
        for save in pinned:
            save.pins -= 1

    # --- events ----------------------------------------------------------------------------------------------------

    def claim(self, step: int, rank: int, *, persist: bool, destination: Mapping[str, Any] | None = None) -> Decision:
        """A rank wants to fill a slot for `step`."""
        if step in self._skipped:
            return Skipped(self._skipped[step])
        if step in self._doomed:
            return Doomed(self._doomed[step])
        save = self.saves.get(step)
        if save is not None and save.phase is Phase.FILLING and rank not in save.sealed:
            save.filling.add(rank)
            return Granted(save)
        if save is not None:
            # The same step again: after a load of an older one. What the slot holds is superseded, when nobody uses it.
            if save.phase is Phase.PERSISTING or save.pins or save.phase is Phase.FILLING:
                return MustWait()
            del self.saves[step]
        victim = None
        slot = self._free_slot()
        if slot is None and self.overlap is Overlap.LATEST:
            victim = self._victim()
            if victim is not None:
                del self.saves[victim.step]
                slot = victim.slot
        if slot is None:
            if self.overlap is Overlap.SKIP:
                reason = f"no slot is free (staging.overlap: {self.overlap.value}, staging.slots: {self.num_slots})"
                self._remember_skip(step, reason)
                return Skipped(reason, first=True)
            return MustWait()
        self._order += 1
        save = Save(step, slot, self._order, persist, destination, filling={rank}, snapshot=not persist)
        self.saves[step] = save
        return Replaced(save, victim) if victim is not None else Granted(save)

    def _victim(self) -> Save | None:
        """What `Latest` replaces: the oldest queued save, while another whole one stays in memory."""
        victim = min((save for save in self._queued() if save.persist), key=lambda s: s.order, default=None)
        others = [save for save in self.saves.values() if save.complete and save is not victim]
        return victim if victim is not None and not victim.pins and others else None

    def _remember_skip(self, step: int, reason: str) -> None:
        self._skipped[step] = reason
        while len(self._skipped) > REMEMBERED_SKIPS:
            del self._skipped[next(iter(self._skipped))]

    def _free_slot(self, *, for_load: bool = False) -> int | None:
        free = sorted(set(range(self.num_slots)) - self.held())
        if free:
            return free[0]
        kept = self._kept(for_load=for_load)
        done = [s for s in self.saves.values() if s.phase is Phase.DONE and s not in kept and not s.pins]
        if self.alone:
            # A snapshot that stays in memory is as good as done once a newer save is complete. Other pods would wait for it.
            done += [
                s
                for s in self.saves.values()
                if s.phase is Phase.COMPLETE and not s.persist and s not in kept and not s.pins
            ]
        if not done:
            return None
        oldest = min(done, key=lambda s: s.order)
        del self.saves[oldest.step]
        return oldest.slot

    def _kept(self, *, for_load: bool) -> list[Save]:
        """The saves that a crash may need."""
        whole = [save for save in self.saves.values() if save.complete and not save.hopeless]
        newest = max(whole, key=lambda s: s.order, default=None)
        agreed = max((save for save in whole if save.concluded), key=lambda s: s.order, default=None)
        if self.alone:
            return [newest] if newest is not None else []
        if for_load:
            # A peer may have died before it could seal the newest, or have heard what was concluded and this pod not.
            return whole
        return [save for save in (newest, agreed) if save is not None and (save is newest or not save.persisted)]

    def sealed(self, step: int, rank: int, *, now_ns: int = 0) -> Save | None:
        """A rank sealed its slot at `now_ns` of the wall clock; the save when it is now complete."""
        save = self.saves.get(step)
        if save is None or rank not in save.filling:
            return None
        save.filling.discard(rank)
        save.sealed.add(rank)
        if save.failures:
            self._release_if_idle(save)
            return None
        if save.sealed == self.ranks:
            save.phase, save.sealed_ns = Phase.COMPLETE, now_ns
            return save
        return None

    def fail_rank(self, step: int, rank: int, error: ErrorDocument) -> Save | None:
        """
        A rank will not seal `step`; the save when this is its first failure (it is to be reported).

        The step is remembered: a rank that claims it later was not there when the failure was told, and hears of it then.
        """
        save = self.saves.get(step)
        if step in self._skipped or (save is not None and save.phase is not Phase.FILLING):
            return None
        self._doomed.setdefault(step, {})[rank] = error
        while len(self._doomed) > REMEMBERED_SKIPS:
            del self._doomed[next(iter(self._doomed))]
        if save is None:
            return None
        first = not save.failures
        save.filling.discard(rank)
        save.failures[rank] = error
        self._release_if_idle(save)
        return save if first else None

    def rank_lost(self, rank: int, error: ErrorDocument) -> list[Save]:
        """A trainer died: what it was filling is torn. The saves that failed by it."""
        failed = []
        for save in list(self.saves.values()):
            if save.phase is Phase.FILLING and rank not in save.sealed:
                first = self.fail_rank(save.step, rank, error)
                if first is not None:
                    failed.append(first)
        return failed

    def date(self, save: Save, order: tuple[int, int] | None) -> None:
        """A save is of this (generation, epoch), where it has none yet; None: nobody knows it yet."""
        save.born = save.born or order

    def date_all(self, order: tuple[int, int], *, inherited: tuple[int, int]) -> None:
        """The session has been opened: saves without an order get this one, those of a session before it `inherited`."""
        for save in self.saves.values():
            self.date(save, inherited if save.inherited else order)

    def start_persist(self, save: Save) -> None:
        """The executor takes it up."""
        save.phase, save.taken_for_storage = Phase.PERSISTING, save.persist

    def finish(
        self,
        save: Save,
        *,
        persisted: bool,
        concluded: bool = False,
        hopeless: bool = False,
        born: tuple[int, int] | None = None,
    ) -> bool:
        """
        The executor has come to an end with a save. Its slot stays until it is needed: it may be the newest snapshot.

        Args:
            save: the one that was taken up.
            persisted: it is on storage.
            concluded: every rank of the job holds it.
            hopeless: some rank of the job does not, and never will.
            born: the order of its checkpoint on storage: the two are one, and the arena is faster.

        Returns:
            Whether it is queued again: it was taken up for memory only, and a rescue wants it on storage since.
        """
        save.phase = Phase.DONE
        save.persisted = save.persisted or persisted
        save.concluded, save.hopeless = concluded, hopeless
        save.born = born or save.born
        again = save.persist and not save.taken_for_storage
        if again:
            save.phase = Phase.COMPLETE
        return again

    def to_storage(self, save: Save) -> None:
        """A rescue: what was to stay in memory is wanted on storage. One that the executor has now is queued again by `finish`."""
        save.persist = True
        if save.phase is Phase.DONE:
            save.phase = Phase.COMPLETE

    def keep_in_memory(self, save: Save) -> None:
        """A save is not owed to storage any more."""
        save.persist = False

    def heard(self, step: int, *, persisted: bool) -> Save | None:
        """Every pod holds `step` whole, as another pod knows, and it may be on storage; the save, when this pod has brought it to an end."""
        save = self.saves.get(step)
        if save is None or save.phase is not Phase.DONE:
            return None
        save.concluded, save.persisted = True, save.persisted or persisted
        return save

    def adopt(self, leftovers: Iterable[Leftover]) -> list[Save]:
        """Take over what a restarted sidecar found whole in the arena, given oldest first."""
        adopted = []
        for each in leftovers:
            self._order += 1
            save = self.saves[each.step] = Save(
                each.step,
                each.slot,
                self._order,
                not each.snapshot,
                None,
                phase=Phase.COMPLETE if each.is_owed else Phase.DONE,
                sealed=set(self.ranks),
                snapshot=each.snapshot,
                persisted=each.persisted,
                concluded=each.concluded,
                set_aside=each.set_aside,
                inherited=each.inherited,
                born=each.born,
                sealed_ns=each.sealed_ns,
                adopted=True,
            )
            adopted.append(save)
        return adopted

    def _release_if_idle(self, save: Save) -> None:
        if save.failures and not save.filling and self.saves.get(save.step) is save:
            del self.saves[save.step]
