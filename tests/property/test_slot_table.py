"""
The whole of: the slot table against a model that is obviously right, under any order of events.

Called from: pytest.
Must never: read the table's private fields to decide what to expect.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pillion.errors import ErrorDocument
from pillion.wire.policy import Overlap
from pillion_sidecar.arena import slots
from pillion_sidecar.arena.slots import Save, SaveState, SlotTable


class Slots(RuleBasedStateMachine):
    """
    Ranks that claim, seal and fail in any order; a sidecar that persists, loads and finishes in any order.

    The model: for each slot, which step's bytes lie in it whole, and who is using it now.
    """

    @initialize(num_slots=st.integers(2, 4), num_ranks=st.integers(1, 3), overlap=st.sampled_from(list(Overlap)))
    def begin(self, num_slots: int, num_ranks: int, overlap: Overlap) -> None:
        self.overlap = overlap
        self.ranks = list(range(num_ranks))
        self.table = SlotTable(num_slots, self.ranks, overlap)
        self.num_slots = num_slots
        self.next_step = [1] * num_ranks
        self.filling: dict[int, tuple[int, int]] = {}  # rank -> (step, slot)
        self.whole: dict[int, int] = {}  # slot -> step that every rank sealed
        self.sealed: dict[int, set[int]] = {}
        self.failed: set[int] = set()
        self.skipped: set[int] = set()
        self.writing: Save | None = None
        self.lent: set[int] = set()
        self.pinned: list[Save] = []
        self.newest: int | None = None
        self.persist_of: dict[int, bool] = {}

    def _granted(self, save: Save, rank: int) -> None:
        step, slot = save.step, save.slot
        assert 0 <= slot < self.num_slots
        used = {self.filling[r][1] for r in self.filling if self.filling[r][0] != step}
        assert slot not in used, "granted a slot that another save is being filled into"
        assert slot not in self.lent, "granted a slot that a load fills"
        assert self.writing is None or self.writing.slot != slot, "granted a slot that is being written"
        assert slot not in {each.slot for each in self.pinned}, "granted a slot that a load reads"
        if self.overlap is not Overlap.LATEST:
            assert self.newest is None or self.whole.get(slot) != self.newest, "granted the newest whole snapshot"
        self.whole.pop(slot, None)
        self.filling[rank] = (step, slot)
        assert len({s for _, s in self.filling.values()}) == len({t for t, _ in self.filling.values()})

    @rule(data=st.data(), persist=st.booleans())
    def claim(self, data: st.DataObject, persist: bool) -> None:
        """The next step of a rank that fills nothing now."""
        free = [rank for rank in self.ranks if rank not in self.filling]
        if not free:
            return
        rank = data.draw(st.sampled_from(free))
        step = self.next_step[rank]
        persist = self.persist_of.setdefault(step, persist)
        before = dict(self.table.restorable())
        decision = self.table.claim(step, rank, persist=persist)
        if isinstance(decision, slots.MustWait):
            assert self.overlap is not Overlap.SKIP or step in before
            assert self.table.restorable() == before
            return
        self.next_step[rank] += 1
        if isinstance(decision, slots.Skipped):
            assert self.overlap is Overlap.SKIP
            assert step not in self.sealed, "skipped on one rank what another one staged"
            assert decision.first == (step not in self.skipped)
            self.skipped.add(step)
            return
        assert step not in self.skipped, "staged on one rank what another one skipped"
        if isinstance(decision, slots.Doomed):
            assert step in self.failed
            return
        assert step not in self.failed, "granted a step that has failed already"
        if isinstance(decision, slots.Replaced):
            victim = decision.victim
            assert self.overlap is Overlap.LATEST
            assert victim is not self.writing
            assert victim.persist
            assert self.table.newest_complete() is not None, "replaced the only whole snapshot"
            if victim.step == self.newest:
                remaining = [s for slot, s in self.whole.items() if slot != victim.slot]
                self.newest = max(remaining)
        self.sealed.setdefault(step, set())
        self._granted(decision.save, rank)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        """A rank seals what it fills."""
        rank = data.draw(st.sampled_from(sorted(self.filling)))
        step, slot = self.filling.pop(rank)
        complete = self.table.sealed(step, rank)
        self.sealed[step].add(rank)
        if step not in self.failed and self.sealed[step] == set(self.ranks):
            assert complete is not None
            assert complete.step == step
            self.whole[slot] = step
            self.newest = step if self.newest is None else max(self.newest, step)
        else:
            assert complete is None

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A rank gives up what it fills; the first failure of a step is reported, no later one."""
        rank = data.draw(st.sampled_from(sorted(self.filling)))
        step, _ = self.filling.pop(rank)
        reported = self.table.fail_rank(step, rank, ErrorDocument("StagingError", "x"))
        assert (reported is not None) == (step not in self.failed)
        self.failed.add(step)

    @rule(data=st.data())
    def fail_before_the_claim(self, data: st.DataObject) -> None:
        """A rank cannot even flatten its state: it abandons a step that it has not claimed."""
        free = [rank for rank in self.ranks if rank not in self.filling]
        if not free:
            return
        rank = data.draw(st.sampled_from(free))
        step = self.next_step[rank]
        self.next_step[rank] += 1
        if step in self.skipped:
            # A rank whose claim was skipped says so too; that makes no failure of it.
            self.table.fail_rank(step, rank, ErrorDocument("SaveSkipped", "x"))
            return
        self.table.fail_rank(step, rank, ErrorDocument("UnsupportedLeaf", "x"))
        self.failed.add(step)

    @precondition(lambda self: self.writing is None)
    @rule()
    def start(self) -> None:
        """The executor takes the oldest queued save."""
        save = self.table.next_to_persist()
        if save is not None:
            assert save.step in self.whole.values()
            self.table.start_persist(save)
            self.writing = save

    @precondition(lambda self: self.writing is not None)
    @rule(persisted=st.booleans())
    def finish(self, persisted: bool) -> None:
        """The outcome is known; the snapshot stays."""
        assert self.writing is not None
        self.table.finish(self.writing, persisted=persisted)
        self.writing = None

    @precondition(lambda self: not self.pinned and not self.lent)
    @rule()
    def begin_load(self) -> None:
        """A load takes a slot to fill, and pins what is whole."""
        slot = self.table.lend()
        if slot is not None:
            assert slot not in {s for _, s in self.filling.values()}
            assert self.whole.get(slot) != self.newest or self.newest is None
            assert self.writing is None or self.writing.slot != slot
            self.whole.pop(slot, None)
            self.lent.add(slot)
            self.pinned = self.table.pin()

    @precondition(lambda self: self.lent)
    @rule()
    def end_load(self) -> None:
        """The ranks have copied what they wanted."""
        self.table.unpin(self.pinned)
        self.pinned = []
        self.table.give_back(self.lent.pop())

    @invariant()
    def what_is_offered_for_a_restore_is_whole(self) -> None:
        """Every restorable step lies whole in the slot that is named for it, and the newest one is among them."""
        offered = self.table.restorable()
        for step, slot in offered.items():
            assert self.whole.get(slot) == step
        if self.newest is not None:
            assert self.newest in offered

    @invariant()
    def no_two_saves_share_a_slot(self) -> None:
        """Saves and loads hold slots of their own."""
        held = [save.slot for save in self.table.saves.values()] + list(self.lent)
        assert len(held) == len(set(held))

    def teardown(self) -> None:
        """When all is sealed, written and read, a claim is granted at once: no slot was lost on the way."""
        if not hasattr(self, "table"):
            return
        while self.filling:
            rank = min(self.filling)
            step, slot = self.filling.pop(rank)
            self.sealed[step].add(rank)
            if self.table.sealed(step, rank) is not None:
                self.whole[slot] = step
        for step in range(1, max(self.next_step)):
            for rank in self.ranks:
                if self.next_step[rank] <= step and step in self.table.saves:
                    self.table.fail_rank(step, rank, ErrorDocument("BarrierTimeout", "x"))
        if self.lent:
            self.end_load()
        if self.writing is not None:
            self.table.finish(self.writing, persisted=True)
        while (save := self.table.next_to_persist()) is not None:
            self.table.start_persist(save)
            self.table.finish(save, persisted=True)
        assert not [save for save in self.table.saves.values() if save.state is SaveState.FILLING]
        decision = self.table.claim(max(self.next_step) + 1, 0, persist=True)
        assert isinstance(decision, slots.Granted)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
