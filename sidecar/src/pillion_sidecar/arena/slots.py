"""
The slot table: which save has which slot, and how a claim is decided. Pure: no clock, no file, no process.

Called from: the supervisor, for every claim, seal, failure and outcome. Only `SlotTable` changes a `Save`: each transition is a method. The
slots of a pod's local ranks are used in lockstep: slot i of every segment belongs to the same save. So one decision (grant, wait, skip,
replace) holds for all local ranks, and a full arena never keeps only some of them from staging a step.

    state        the slot has                             the state ends by
    ----------   --------------------------------------   ----------------------------------------------------------------------
    filling      parts of a state, which ranks copy       sealed: complete | fail_rank, rank_lost: free once no rank fills it
    complete     a whole state, queued                    start_persist: persisting | claim under Latest: free
    persisting   a whole state, which is being written    finish: done, or complete if a rescue has sent it to storage meanwhile
    done         a whole state, on storage or not         to_storage: complete | claim, lend, take: free once another save needs it

The newest complete save keeps its slot until a newer one is complete, because a crash restores it. With several pods, the newest save that
all pods have keeps its slot as well, until it is on storage: a peer may have died before it sealed a newer one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pillion.errors import ErrorDocument
from pillion.wire.policy import Overlap
from pillion.wire.save_messages import Destination


class SaveState(StrEnum):
    """State of a save. The module's table has the transitions."""

    FILLING = "filling"
    COMPLETE = "complete"
    PERSISTING = "persisting"
    DONE = "done"


@dataclass
class Save:
    """One step's save in this pod. Other modules may read it; only `SlotTable` changes it."""

    step: int
    slot: int
    order: int
    """Number of the claim. The newest save has the highest number."""
    persist: bool
    destination: Destination | None
    state: SaveState = SaveState.FILLING
    filling: set[int] = field(default_factory=set)
    sealed: set[int] = field(default_factory=set)
    failures: dict[int, ErrorDocument] = field(default_factory=dict)
    snapshot: bool = False
    """True if the save was claimed for memory only. A rescue then sets `persist`."""
    taken_for_storage: bool = False
    """`persist` at the time when the executor began with the save. A rescue may have set `persist` later."""
    persisted: bool = False
    """True once the checkpoint is committed on storage."""
    sealed_ns: int = 0
    """Wall clock time at which the save was complete, for people."""
    concluded: bool = False
    """True once every rank of the job is known to have the save, so that all can restore it."""
    hopeless: bool = False
    """True if a rank of the job lacks this step. Then it can be neither committed nor restored."""
    adopted: bool = False
    """True if the save was found in the arena. An earlier sidecar may have begun to persist it."""
    pins: int = 0
    """Number of loads that read this slot now."""
    born: tuple[int, int] | None = None
    """(generation, epoch) in which the save was filled or committed; see `commit.Order`. None: the executor has not opened the session yet."""
    inherited: bool = False
    """True if trainers of an earlier session have sealed the save."""
    set_aside: bool = False
    """True if a load went back to an older step. Training continues from there, and this save belongs to the abandoned branch."""

    for_disk: bool = False
    """True if the save was claimed for the local disks as well as for memory."""

    @property
    def local(self) -> bool:
        """Whether the save goes to the local disks first. A rescue goes straight to storage, and so does a save with a destination of its own."""
        return self.destination is None and (self.for_disk or self.persist) and not self.rescued

    @property
    def rescued(self) -> bool:
        """Whether this snapshot was meant for memory, and goes to storage because its trainers are gone."""
        return self.snapshot and self.persist

    @property
    def complete(self) -> bool:
        """Whether the slots of all local ranks have the whole state."""
        return self.state is not SaveState.FILLING and not self.failures


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A whole state that an earlier sidecar left in a slot. Fields as in `Save`."""

    step: int
    slot: int
    snapshot: bool
    is_owed: bool
    """Whether the executor must still write it, or agree on it with the other pods."""
    persisted: bool = False
    concluded: bool = False
    set_aside: bool = False
    inherited: bool = False
    born: tuple[int, int] | None = None
    sealed_ns: int = 0


@dataclass(frozen=True, slots=True)
class Granted:
    """The rank may fill the slot of `save`."""

    save: Save


@dataclass(frozen=True, slots=True)
class Replaced:
    """The rank may fill the slot of `save`, which replaces the older save `victim`. The caller reports the victim as skipped."""

    save: Save
    victim: Save


@dataclass(frozen=True, slots=True)
class MustWait:
    """No slot is free. The caller repeats the claim after the next release."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """No slot is free, and the policy drops the save. Every local rank gets the same answer for this step."""

    reason: str
    first: bool = False
    """True for the first claim of the step, so that the skip is counted and reported once, and not once a rank."""


@dataclass(frozen=True, slots=True)
class Doomed:
    """Another local rank has already failed this step, so this rank need not stage it."""

    failures: Mapping[int, ErrorDocument]


Decision = Granted | Replaced | MustWait | Skipped | Doomed

NO_SLOT: Final = -1
"""Slot number of a load for which no slot could be reserved, because every slot has a whole save."""
REMEMBERED_SKIPS = 64
"""Maximum skipped or failed steps that are remembered, so that a slower local rank gets the same answer. Ranks are a few steps apart."""


class SlotTable:
    """
    The slots of one pod.

    Args:
        num_slots: number of slots in each segment.
        ranks: the local ranks, as global numbers.
        overlap: how a claim without a free slot is decided.
        alone: whether this pod has all ranks of the job. Then a save that is complete here is complete in the whole job.
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
        self.overtaken: list[Save] = []
        """Whole snapshots that lost their slot before the executor took them up. `supervisor.staging` reports and removes them."""

    # --- questions -------------------------------------------------------------------------------------------------

    def newest_complete(self) -> Save | None:
        """Return the newest complete save, which the drain writes to storage. Saves that a load has set aside do not count."""
        whole = (save for save in self.saves.values() if save.complete and not save.set_aside)
        return max(whole, key=lambda s: s.order, default=None)

    def next_to_persist(self) -> Save | None:
        """Return the oldest complete save that the executor has not begun with. Snapshots count: the pods must agree on them as well."""
        return min(self._queued(), key=lambda s: s.order, default=None)

    def _queued(self) -> list[Save]:
        return [save for save in self.saves.values() if save.state is SaveState.COMPLETE and not save.failures]

    def held(self) -> set[int]:
        """Return the slots that have a save or are reserved for a load."""
        return {save.slot for save in self.saves.values()} | self._lent

    def restorable(self) -> dict[int, int]:
        """Return step -> slot of every complete save."""
        return {save.step: save.slot for save in self.saves.values() if save.complete}

    # --- loads -----------------------------------------------------------------------------------------------------

    def lend(self) -> int | None:
        """Reserve a slot that a load fills from storage. None if every slot is needed."""
        slot = self._free_slot(for_load=True)
        if slot is not None:
            self._lent.add(slot)
        return slot

    def crowded(self) -> bool:
        """Whether every slot has a whole, unused save. The pods learn only during the load which of these all of them have."""
        idle = {
            save.slot
            for save in self.saves.values()
            if save.state is SaveState.DONE and save.complete and not save.pins
        }
        return len(idle) == self.num_slots and not self._lent

    def take(self, slot: int) -> None:
        """Reserve this slot for a load, because the pods have agreed on a checkpoint on storage. A save in the slot is dropped."""
        self.saves = {step: save for step, save in self.saves.items() if save.slot != slot}
        self._lent.add(slot)

    def give_back(self, slot: int) -> None:
        """End the reservation of a slot for a load."""
        self._lent.discard(slot)

    def settled(self, step: int) -> bool:
        """Whether `step` was skipped or has failed, so that every later claim of it is refused."""
        return step in self._skipped or step in self._doomed

    def awaits_others(self, rank: int) -> bool:
        """Whether a save that this rank has sealed waits for seals of other ranks."""
        return any(
            save.state is SaveState.FILLING and rank in save.sealed and not save.failures
            for save in self.saves.values()
        )

    def failures(self, step: int) -> Mapping[int, ErrorDocument]:
        """Return the errors of the local ranks that will not seal `step`."""
        return dict(self._doomed.get(step, {}))

    def forget_doomed(self) -> None:
        """Forget all failed and skipped steps. After a load, the trainers may save the same steps again."""
        self._doomed.clear()
        self._skipped.clear()

    def set_aside(self, loaded: tuple[tuple[int, int], int]) -> list[Save]:
        """
        Set `set_aside` of all saves newer than the loaded checkpoint, and clear it of all others. (A load may also go forward again.)

        Args:
            loaded: (generation, epoch) and step of the loaded checkpoint.

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
        """Keep every complete save in its slot while a load or a rescue reads the arena. Return these saves."""
        pinned = [save for save in self.saves.values() if save.complete]
        for save in pinned:
            save.pins += 1
        return pinned

    def unpin(self, pinned: Iterable[Save]) -> None:
        for save in pinned:
            save.pins -= 1

    # --- events ----------------------------------------------------------------------------------------------------

    def claim(
        self,
        step: int,
        rank: int,
        *,
        persist: bool,
        for_disk: bool = False,
        destination: Destination | None = None,
    ) -> Decision:
        """Decide a rank's claim of a slot for `step`."""
        if step in self._skipped:
            return Skipped(self._skipped[step])
        if step in self._doomed:
            return Doomed(self._doomed[step])
        save = self.saves.get(step)
        if save is not None and save.state is SaveState.FILLING and rank not in save.sealed:
            save.filling.add(rank)
            return Granted(save)
        if save is not None:
            # The same step is saved again, after a load of an older one. The new save replaces the old one, unless the old one is in use.
            if save.state is SaveState.PERSISTING or save.pins or save.state is SaveState.FILLING:
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
        save = Save(
            step, slot, self._order, persist, destination, filling={rank}, snapshot=not persist, for_disk=for_disk
        )
        self.saves[step] = save
        return Replaced(save, victim) if victim is not None else Granted(save)

    def _victim(self) -> Save | None:
        """Return the save that `Latest` replaces: the oldest queued one, if another complete save stays in memory."""
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
        done = [s for s in self.saves.values() if s.state is SaveState.DONE]
        if self.alone:
            # A queued snapshot may be dropped once a newer save is complete. With other pods it may not, as they wait for its outcome.
            done += [s for s in self._queued() if not s.persist]
        done = [s for s in done if s not in kept and not s.pins]
        if not done:
            return None
        oldest = min(done, key=lambda s: s.order)
        if oldest.state is SaveState.COMPLETE:
            self.overtaken.append(oldest)
        del self.saves[oldest.step]
        return oldest.slot

    def _kept(self, *, for_load: bool) -> list[Save]:
        """Return the saves that must keep their slots, because a restore after a crash may need them."""
        whole = [save for save in self.saves.values() if save.complete and not save.hopeless]
        newest = max(whole, key=lambda s: s.order, default=None)
        agreed = max((save for save in whole if save.concluded), key=lambda s: s.order, default=None)
        if self.alone:
            return [newest] if newest is not None else []
        if for_load:
            # A peer may lack the newest save, because it died before its seal. Or it knows of a concluded save that this pod does not know.
            return whole
        return [save for save in (newest, agreed) if save is not None and (save is newest or not save.persisted)]

    def sealed(self, step: int, rank: int, *, now_ns: int = 0) -> Save | None:
        """Note that a rank has sealed its slot at `now_ns` (wall clock). Return the save if it is complete now."""
        save = self.saves.get(step)
        if save is None or rank not in save.filling:
            return None
        save.filling.discard(rank)
        save.sealed.add(rank)
        if save.failures:
            self._release_if_idle(save)
            return None
        if save.sealed == self.ranks:
            save.state, save.sealed_ns = SaveState.COMPLETE, now_ns
            return save
        return None

    def fail_rank(self, step: int, rank: int, error: ErrorDocument) -> Save | None:
        """
        Note that a rank will not seal `step`. Return the save if this is its first failure, so that the caller reports it.

        The failure is remembered. A rank that claims the step later gets it as the answer.
        """
        save = self.saves.get(step)
        if step in self._skipped or (save is not None and save.state is not SaveState.FILLING):
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
        """Fail the saves that a dead trainer was filling. Return those for which this is the first failure."""
        failed = []
        for save in list(self.saves.values()):
            if save.state is SaveState.FILLING and rank not in save.sealed:
                first = self.fail_rank(save.step, rank, error)
                if first is not None:
                    failed.append(first)
        return failed

    def date(self, save: Save, order: tuple[int, int] | None) -> None:
        """Set a save's (generation, epoch), if it has none. None: the session is not open yet, so it is not known."""
        save.born = save.born or order

    def date_all(self, order: tuple[int, int], *, inherited: tuple[int, int]) -> None:
        """Set (generation, epoch) of all saves that have none: `inherited` for saves of an earlier session, `order` for others."""
        for save in self.saves.values():
            self.date(save, inherited if save.inherited else order)

    def start_persist(self, save: Save) -> None:
        """Note that the executor begins with a save."""
        save.state, save.taken_for_storage = SaveState.PERSISTING, save.persist

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
        Note that the executor has finished with a save. The save keeps its slot until another one needs it.

        Args:
            save: the save.
            persisted: whether it is on storage.
            concluded: whether every rank of the job has it.
            hopeless: whether a rank of the job will never have it.
            born: (generation, epoch) of its checkpoint on storage, so that a load recognizes both as the same checkpoint.

        Returns:
            Whether it is queued again, because the executor took it for memory only, and a rescue has sent it to storage meanwhile.
        """
        save.state = SaveState.DONE
        save.persisted = save.persisted or persisted
        save.concluded, save.hopeless = concluded, hopeless
        save.born = born or save.born
        again = save.persist and not save.taken_for_storage
        if again:
            save.state = SaveState.COMPLETE
        return again

    def to_storage(self, save: Save) -> None:
        """Send a save to storage that was meant for memory (a rescue). If the executor works on it, `finish` queues it again."""
        save.persist = True
        if save.state is SaveState.DONE:
            save.state = SaveState.COMPLETE

    def keep_in_memory(self, save: Save) -> None:
        """Keep a save in memory only, so that the drain does not write it."""
        save.persist = False

    def held_by_all(self, step: int, *, persisted: bool) -> Save | None:
        """Note that every pod has `step`, and whether it is committed. Return the save if the executor has finished with it here."""
        save = self.saves.get(step)
        if save is None or save.state is not SaveState.DONE:
            return None
        save.concluded, save.persisted = True, save.persisted or persisted
        return save

    def adopt(self, leftovers: Iterable[Leftover]) -> list[Save]:
        """Add the whole saves that a restarted sidecar found in the arena, oldest first."""
        adopted = []
        for leftover in leftovers:
            self._order += 1
            save = self.saves[leftover.step] = Save(
                leftover.step,
                leftover.slot,
                self._order,
                not leftover.snapshot,
                None,
                state=SaveState.COMPLETE if leftover.is_owed else SaveState.DONE,
                sealed=set(self.ranks),
                snapshot=leftover.snapshot,
                persisted=leftover.persisted,
                concluded=leftover.concluded,
                set_aside=leftover.set_aside,
                inherited=leftover.inherited,
                born=leftover.born,
                sealed_ns=leftover.sealed_ns,
                adopted=True,
            )
            adopted.append(save)
        return adopted

    def _release_if_idle(self, save: Save) -> None:
        if save.failures and not save.filling and self.saves.get(save.step) is save:
            del self.saves[save.step]
