"""
The whole of: the slot table over what `test_slot_table.py` leaves out: trainers that die and come again at an earlier step, rescues of what was in
memory only, and sidecars that die and adopt what lies in the arena.

Called from: pytest.
Must never: read the table to decide what to expect: the model is what each slot holds, and who uses it.
"""

import random
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pillion.errors import ErrorDocument
from pillion.wire.policy import Overlap
from pillion_sidecar.arena import slots
from pillion_sidecar.arena.slots import Leftover, Save, SaveState, SlotTable

DIED = ErrorDocument("TrainerDied", "x")


@dataclass
class Content:
    """What a slot holds: the bytes of a step, from some ranks or from all."""

    step: int
    order: int
    snapshot: bool
    sealed: set[int]
    persisted: bool = False


class Lives(RuleBasedStateMachine):
    """One pod: its trainers, its sidecar and its arena, each of which may end and begin again."""

    @initialize(num_slots=st.integers(2, 4), num_ranks=st.integers(1, 3), overlap=st.sampled_from(list(Overlap)))
    def begin(self, num_slots: int, num_ranks: int, overlap: Overlap) -> None:
        self.num_slots, self.overlap = num_slots, overlap
        self.ranks = list(range(num_ranks))
        self.arena: dict[int, Content] = {}
        self.order = 0
        self.start_sidecar()
        self.next_step = dict.fromkeys(self.ranks, 1)

    def start_sidecar(self) -> None:
        """A new process: what was being filled is torn, what is whole is adopted, oldest first, as `PodArena._adopt_saves` does it."""
        self.table = SlotTable(self.num_slots, self.ranks, self.overlap)
        self.arena = {slot: held for slot, held in self.arena.items() if self.is_whole(held)}
        adopted = []
        for slot, held in sorted(self.arena.items(), key=lambda entry: entry[1].order):
            owed = not held.persisted and not held.snapshot
            adopted.append(
                Leftover(step=held.step, slot=slot, snapshot=held.snapshot, is_owed=owed, persisted=held.persisted)
            )
        self.table.adopt(adopted)
        self.filling: dict[int, int] = {}  # rank -> slot
        self.writing: tuple[Save, bool] | None = None
        self.rescued: set[int] = set()
        """Wanted on storage since the executor took them up for memory only."""
        self.lent: int | None = None
        self.pinned: list[Save] = []
        self.failed: set[int] = set()
        self.skipped: set[int] = set()

    def is_whole(self, held: Content) -> bool:
        return held.sealed == set(self.ranks)

    def newest(self) -> Content | None:
        return max(
            (held for held in self.arena.values() if self.is_whole(held)), key=lambda held: held.order, default=None
        )

    # --- saves -----------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), snapshot=st.booleans())
    def claim(self, data: st.DataObject, snapshot: bool) -> None:
        """A rank that fills nothing comes to its next step."""
        free = [rank for rank in self.ranks if rank not in self.filling]
        if free:
            self.claim_of(data.draw(st.sampled_from(free)), snapshot=snapshot)

    @rule(snapshot=st.booleans(), order=st.randoms(use_true_random=False))
    def everybody_saves(self, snapshot: bool, order: random.Random) -> None:
        """What goes on most of the time: ranks claim and seal, in some order."""
        for rank in order.sample(self.ranks, len(self.ranks)):
            if rank not in self.filling:
                self.claim_of(rank, snapshot=snapshot)
        for rank in order.sample(self.ranks, len(self.ranks)):
            if rank in self.filling:
                self.seal_of(rank)

    @rule(well=st.booleans())
    def the_queue_is_worked_off(self, well: bool) -> None:
        """The executor is faster than the trainers."""
        for _ in range(self.num_slots):
            if self.writing is None:
                self.take_up()
            if self.writing is not None:
                self.outcome(well)

    def claim_of(self, rank: int, *, snapshot: bool) -> None:
        step = self.next_step[rank]
        others = [held for held in self.arena.values() if self.is_whole(held)]
        decision = self.table.claim(step, rank, persist=not snapshot)
        if isinstance(decision, slots.MustWait):
            return
        self.next_step[rank] += 1
        if isinstance(decision, slots.Skipped):
            assert self.overlap is Overlap.SKIP
            self.skipped.add(step)
            return
        if isinstance(decision, slots.Doomed):
            assert step in self.failed
            return
        assert step not in self.failed | self.skipped
        slot = decision.save.slot
        assert 0 <= slot < self.num_slots
        assert slot != self.lent, "a load fills it"
        assert self.writing is None or slot != self.writing[0].slot, "it is being written"
        assert slot not in {each.slot for each in self.pinned}, "a load reads it"
        held = self.arena.get(slot)
        if held is not None and held.step == step and not self.is_whole(held):
            assert all(
                each == slot or other == rank for other, each in self.filling.items() if self.arena[each].step == step
            )
            self.filling[rank] = slot
            return
        assert slot not in self.filling.values(), "another save is filled into it"
        # The same step again, after a load of an older one: what there was of it is given up when the claim is granted.
        self.arena = {at: each for at, each in self.arena.items() if each.step != step}
        held, others = self.arena.get(slot), [each for each in others if each.step != step]
        if held is not None and self.is_whole(held) and held.step != step:
            assert held is not self.newest() or (self.overlap is Overlap.LATEST and len(others) > 1), (
                "the newest was given away"
            )
        self.order += 1
        self.arena[slot] = Content(step, self.order, snapshot, set())
        self.filling[rank] = slot

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        """A rank has copied its state."""
        self.seal_of(data.draw(st.sampled_from(sorted(self.filling))))

    def seal_of(self, rank: int) -> None:
        held = self.arena[self.filling.pop(rank)]
        complete = self.table.sealed(held.step, rank)
        held.sealed.add(rank)
        assert (complete is not None) == (self.is_whole(held) and held.step not in self.failed)
        self.drop_failed()

    def drop_failed(self) -> None:
        """What failed and is filled by nobody is no content any more."""
        busy = set(self.filling.values())
        gone = [slot for slot, held in self.arena.items() if held.step in self.failed and slot not in busy]
        for slot in gone:
            if not self.is_whole(self.arena[slot]):
                del self.arena[slot]

    @rule(data=st.data())
    def a_trainer_dies(self, data: st.DataObject) -> None:
        """Every save that it had not sealed fails on all ranks, and is told once."""
        rank = data.draw(st.sampled_from(self.ranks))
        torn = {held.step for held in self.arena.values() if not self.is_whole(held) and rank not in held.sealed}
        told = {save.step for save in self.table.rank_lost(rank, DIED)}
        assert told == torn - self.failed
        self.failed |= torn
        self.filling.pop(rank, None)
        self.drop_failed()

    # --- storage -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.writing is None)
    @rule()
    def take_up(self) -> None:
        """The oldest complete save goes to the executor, as `Persister._next` takes it."""
        save = self.table.next_to_persist()
        if save is not None:
            assert self.is_whole(self.arena[save.slot])
            assert self.arena[save.slot].step == save.step
            self.table.start_persist(save)
            self.writing = save, save.persist

    @precondition(lambda self: self.writing is not None)
    @rule(well=st.booleans())
    def outcome(self, well: bool) -> None:
        """As `Persister._persist` ends; what a rescue asked for meanwhile is queued again."""
        assert self.writing is not None
        (save, wanted), self.writing = self.writing, None
        again = self.table.finish(save, persisted=well and wanted)
        self.arena[save.slot].persisted |= well and wanted
        assert again == (not wanted and save.step in self.rescued)
        self.rescued.discard(save.step)

    @rule()
    def rescue(self) -> None:
        """The newest whole snapshot, if it is in memory only, is wanted on storage: as `Persister.rescue` does it."""
        save, newest = self.table.newest_complete(), self.newest()
        assert (save is None) == (newest is None)
        if save is None or newest is None:
            return
        assert save.step == newest.step, "a rescue would take an older one"
        if not save.persisted and not save.persist:
            self.table.to_storage(save)
            newest.snapshot = False
            if self.writing is not None and self.writing[0] is save:
                self.rescued.add(save.step)

    # --- loads and restarts --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.lent is None)
    @rule(back=st.integers(0, 3))
    def load(self, back: int) -> None:
        """All ranks come again, some steps before the newest: what they were filling is torn, and steps come twice."""
        for rank in self.ranks:
            self.failed |= {save.step for save in self.table.rank_lost(rank, DIED)}
            self.filling.pop(rank, None)
        self.drop_failed()
        newest = self.newest()
        slot = self.table.lend()
        if slot is None:
            return
        assert self.writing is None or slot != self.writing[0].slot
        assert newest is None or self.arena.get(slot) is not newest, "the newest whole snapshot was lent"
        self.arena.pop(slot, None)
        self.lent, self.pinned = slot, self.table.pin()
        self.table.forget_doomed()
        self.failed.clear()
        self.skipped.clear()
        first = max(1, (newest.step if newest else 0) + 1 - back)
        self.next_step = dict.fromkeys(self.ranks, first)

    @precondition(lambda self: self.lent is not None)
    @rule()
    def loaded(self) -> None:
        """The ranks have copied what they wanted."""
        assert self.lent is not None
        self.table.unpin(self.pinned)
        self.table.give_back(self.lent)
        self.lent, self.pinned = None, []

    @rule()
    def the_sidecar_dies(self) -> None:
        """Its successor knows nothing but the arena. The trainers go on with their next step."""
        ahead = max(self.next_step.values())
        self.start_sidecar()
        self.next_step = dict.fromkeys(self.ranks, ahead)

    # --- what holds ------------------------------------------------------------------------------------------------------

    @invariant()
    def what_is_offered_is_whole_and_the_newest_is_offered(self) -> None:
        """Each restorable step lies whole in its slot."""
        offered = self.table.restorable()
        for step, slot in offered.items():
            assert self.arena[slot].step == step
            assert self.is_whole(self.arena[slot])
        newest = self.newest()
        if newest is not None:
            assert newest.step in offered

    @invariant()
    def every_slot_is_free_or_has_one_owner(self) -> None:
        """No two saves or loads share one; a save that is still filled is waited for by a rank that lives."""
        owners = [save.slot for save in self.table.saves.values()] + ([] if self.lent is None else [self.lent])
        assert len(owners) == len(set(owners))
        assert set(self.filling.values()) <= set(owners)

    def teardown(self) -> None:
        """When trainers are gone and the queue is empty, a new save is granted: no slot was lost on the way."""
        if not hasattr(self, "table"):
            return
        if self.lent is not None:
            self.loaded()
        if self.writing is not None:
            self.outcome(True)
        for rank in self.ranks:
            self.table.rank_lost(rank, DIED)
            self.filling.pop(rank, None)
        while self.writing is None:
            self.take_up()
            if self.writing is None:
                break
            self.outcome(True)
        assert all(save.state is SaveState.DONE for save in self.table.saves.values())
        assert isinstance(self.table.claim(10**6, 0, persist=True), slots.Granted)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
