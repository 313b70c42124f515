"""
The whole of: a policy that changes while ranks train: that they agree on every step, whatever the control channel does.

Called from: pytest.
Must never: deliver two messages to two ranks in another order: sidecars pass them on in one.
"""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pillion import cadence, rule_timeline
from pillion.cadence import Due
from pillion.rule_timeline import Rule
from pillion.wire import policy

RULES = st.builds(
    lambda period, snapshot, suspended: Rule(
        policy.Trigger(period_steps=period, snapshot_steps=snapshot if snapshot < period else None), suspended
    ),
    st.integers(2, 9),
    st.integers(1, 9),
    st.booleans(),
)


class RanksUnderChangingRules(RuleBasedStateMachine):
    """Several ranks, each at its own step, and a control channel that delays every message as it likes."""

    @initialize(num_ranks=st.integers(2, 4), first=RULES, lead_s=st.floats(0.1, 5.0))
    def start(self, num_ranks: int, first: Rule, lead_s: float) -> None:
        self.ranks = [cadence.Cadence(first, decides=rank == 0, lead_s=lead_s) for rank in range(num_ranks)]
        self.wanted = first
        self.now_s = 0.0
        self.steps = [0] * num_ranks
        self.answers: list[dict[int, Due]] = [{} for _ in self.ranks]
        self.inbox: list[deque[tuple[str, int, Rule | None]]] = [deque() for _ in self.ranks]
        self.told: dict[int, Rule] = {}
        self.declined: set[int] = set()
        self.declined_saves: set[int] = set()

    def tell(self, what: str, target: int, about: Rule | None = None) -> None:
        for box in self.inbox:
            box.append((what, target, about))

    def step_once(self, rank: int) -> None:
        self.steps[rank] += 1
        step = self.steps[rank]
        self.answers[rank][step] = self.ranks[rank].due(step, self.now_s)
        target = self.ranks[rank].proposal(step, self.now_s)
        if target is not None:
            self.tell("announce", target)
        change = self.ranks[rank].change_proposal(step, self.now_s)
        if change is not None:
            assert rank == 0
            target, about = change
            # A step of its own, far enough ahead; or the one that holds, told again.
            assert target >= step + cadence.MIN_LEAD_STEPS or self.told.get(target) == about
            assert self.told.setdefault(target, about) == about
            self.tell("change", target, about)

    def deliver_one(self, rank: int) -> None:
        what, target, about = self.inbox[rank].popleft()
        of = self.ranks[rank]
        if what == "announce":
            if not of.announce(target):
                self.declined_saves.add(target)
                self.tell("decline", target)
        elif what == "decline":
            if rank == 0:
                of.declined(target)
            else:
                of.withdraw(target)
        elif what == "change":
            assert about is not None
            if not of.announce_change(target, about):
                self.declined.add(target)
                self.tell("decline change", target)
        elif rank == 0:
            of.declined_change(target)
        else:
            of.withdraw_change(target)

    def deliver_all(self) -> None:
        while any(self.inbox):
            for rank, box in enumerate(self.inbox):
                for _ in range(len(box)):
                    self.deliver_one(rank)

    @rule(data=st.data(), took_s=st.just(0.0) | st.floats(0.5, 5.0), num_steps=st.integers(1, 4))
    def walk(self, data: st.DataObject, took_s: float, num_steps: int) -> None:
        rank = data.draw(st.integers(0, len(self.ranks) - 1))
        for _ in range(num_steps):
            self.now_s += took_s
            self.step_once(rank)

    @rule(num_steps=st.integers(1, 12))
    def walk_together(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.now_s += 1.0
            for rank in range(len(self.ranks)):
                self.step_once(rank)
            self.deliver_all()

    @precondition(lambda self: any(self.inbox))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.deliver_one(data.draw(st.sampled_from([rank for rank, box in enumerate(self.inbox) if box])))

    @rule(about=RULES)
    def change(self, about: Rule) -> None:
        self.wanted = about
        self.ranks[0].request_change(about)

    @rule()
    def tell_again(self) -> None:
        self.ranks[0].request_change(self.wanted)

    @rule()
    def request_save(self) -> None:
        self.ranks[0].request_save()

    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """An answer never changes once it was given."""
        rank = data.draw(st.integers(0, len(self.ranks) - 1))
        if self.answers[rank]:
            step = data.draw(st.sampled_from(sorted(self.answers[rank])))
            assert self.ranks[rank].due(step, self.now_s) is self.answers[rank][step]

    def teardown(self) -> None:
        if not hasattr(self, "ranks"):
            return
        # The slow ones catch up, and everything that is on its way arrives.
        self.deliver_all()
        together = max(self.steps) + 1
        while min(self.steps) < together:
            self.now_s += 1.0
            for rank in range(len(self.ranks)):
                if self.steps[rank] < together:
                    self.step_once(rank)
            self.deliver_all()
        self.tell_again()
        declined = set(self.declined)
        self.walk_together(60)
        # From here on messages are quick. A change that is told again may be declined once more by who has missed it.
        late = self.declined - declined
        assert len(late) <= 1
        same = {step for step in self.answers[0] if len({answers[step] for answers in self.answers}) == 1}
        settled = together + 2 if late else together
        assert {step for step in self.answers[0] if step > settled} - same <= self.declined_saves
        assert all(of._rules.newest == self.wanted for of in self.ranks)
        if not self.declined:
            # What nobody declined never sets the ranks apart, at any step.
            assert set(self.answers[0]) - same <= self.declined_saves


TestRanksUnderChangingRules = RanksUnderChangingRules.TestCase
TestRanksUnderChangingRules.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(
    num_ranks=st.integers(2, 4),
    changes=st.lists(st.tuples(st.integers(1, 80), RULES), max_size=4),
    first=RULES,
    step_s=st.integers(1, 20),
    lead_s=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_with_a_lead_that_suffices_all_ranks_change_at_one_step(
    num_ranks: int, changes: list[tuple[int, Rule]], first: Rule, step_s: int, lead_s: int, data: st.DataObject
) -> None:
    """When messages take less than the lead, and come in their order, all answers are equal, and the last rule holds in the end."""
    ranks = [cadence.Cadence(first, decides=rank == 0, lead_s=float(lead_s)) for rank in range(num_ranks)]
    on_the_way: list[tuple[float, int, int, Rule]] = []
    asked = dict(changes)
    newest_s = [0.0] * num_ranks
    for step in range(1, 200):
        now_s = float(step * step_s)
        for arrives_s, rank, target, about in [each for each in on_the_way if each[0] <= now_s]:
            on_the_way.remove((arrives_s, rank, target, about))
            assert ranks[rank].announce_change(target, about)
        if step in asked:
            ranks[0].request_change(asked[step])
        assert len({each.due(step, now_s) for each in ranks}) == 1
        change = ranks[0].change_proposal(step, now_s)
        if change is not None:
            delays_s = data.draw(st.lists(st.floats(0, lead_s), min_size=num_ranks, max_size=num_ranks))
            # The channel keeps their order (`executor.exchange.broadcast`): one that is told again does not come behind its successor.
            newest_s = [max(before_s, now_s + delay_s) for before_s, delay_s in zip(newest_s, delays_s, strict=True)]
            on_the_way += [(arrives_s, rank, *change) for rank, arrives_s in enumerate(newest_s)]
    wanted = asked[max(asked)] if asked else first
    assert {each._rules.newest for each in ranks} == {wanted}


@given(data=st.data(), first=RULES)
@settings(max_examples=100, deadline=None)
def test_what_holds_at_a_step_that_was_answered_for_never_changes(data: st.DataObject, first: Rule) -> None:
    """Accepting and withdrawing in any order changes only the steps ahead; as many changes as are remembered are answered for."""
    of = rule_timeline.RuleTimeline(first)
    highest, seen = 0, {0: first}
    for _ in range(data.draw(st.integers(0, 30))):
        if data.draw(st.booleans()):
            highest += data.draw(st.integers(1, 5))
            for step in range(max(seen) + 1, highest + 1):
                seen[step] = of.at(step)
        target = data.draw(st.integers(0, highest + 10))
        if data.draw(st.booleans()):
            about = data.draw(RULES)
            accepted = of.accept(target, about, highest)
            assert accepted == (target > highest or of.holds(target, about))
            assert not accepted or of.holds(target, about)
        else:
            of.withdraw(target, highest)
        assert all(of.at(step) == held for step, held in seen.items())
