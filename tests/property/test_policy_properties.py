"""
The whole of: what holds for every policy and for every order in which ranks walk and messages arrive.

Called from: pytest.
Must never: read a clock; time is drawn.
"""

from collections import deque
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pillion import cadence, rule_timeline
from pillion.cadence import Due
from pillion.wire import policy

positive = st.integers(1, 2**63 - 1)
words = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def triggers(draw: st.DrawFn) -> policy.Trigger:
    period_steps = draw(st.none() | st.integers(2, 2**63 - 1))
    return policy.Trigger(
        period_steps=period_steps,
        period_seconds=draw(positive),
        snapshot_steps=draw(st.none() | st.integers(1, (period_steps or 2**62) - 1)),
        on_termination=draw(st.sampled_from(policy.OnTermination)),
    )


@st.composite
def resources(draw: st.DrawFn) -> policy.Resources:
    lists = st.builds(
        policy.ResourceList,
        cpu_millicores=st.none() | st.integers(1, 10**15),
        memory_bytes=st.none() | positive,
    )
    requests, limits = draw(lists), draw(lists)
    assume(None in (requests.cpu_millicores, limits.cpu_millicores) or fits(requests, limits, "cpu_millicores"))
    assume(None in (requests.memory_bytes, limits.memory_bytes) or fits(requests, limits, "memory_bytes"))
    return policy.Resources(requests=requests, limits=limits)


def fits(requests: policy.ResourceList, limits: policy.ResourceList, what: str) -> bool:
    return bool(getattr(requests, what) <= getattr(limits, what))


writers = st.builds(
    policy.Writer,
    name=st.builds("{}.{}:{}".format, words, words, words),
    arguments=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)
claims = st.builds(
    policy.VolumeClaim, claim_name=words, sub_path=st.none() | st.lists(words, min_size=1, max_size=3).map("/".join)
)
retentions = st.just(policy.Retention()) | st.builds(
    policy.Retention,
    keep_last=positive,
    keep_every_steps=st.none() | positive,
    max_age_seconds=st.none() | st.integers(1, 999_999).map(lambda days: days * 86_400),
    max_bytes=st.none() | positive,
)
restores = st.builds(
    policy.Restore,
    mode=st.sampled_from([policy.RestoreMode.LATEST, policy.RestoreMode.NONE]),
    on_missing=st.sampled_from(policy.OnMissing),
) | st.builds(policy.Restore, mode=st.just(policy.RestoreMode.STEP), step=st.integers(0, 2**63 - 1))


@st.composite
def policies(draw: st.DrawFn, *, embedded: bool) -> policy.Policy:
    """Any policy that holds together."""
    claim = draw(claims | st.none() if embedded else claims)
    path = draw(st.none() | words) if embedded and claim is None else None
    return policy.Policy(
        trigger=draw(triggers()),
        staging=policy.Staging(
            size_limit_bytes=draw(positive),
            slots=draw(st.integers(2, 16)),
            overlap=draw(st.sampled_from(policy.Overlap)),
            memory_accounting=draw(st.sampled_from(policy.MemoryAccounting)),
        ),
        store=draw(st.sampled_from(policy.StoreMode)),
        storage=policy.Storage(path=path, persistent_volume_claim=claim, writer=draw(st.none() | writers)),
        retention=draw(retentions),
        restore=draw(restores),
        drain=policy.Drain(timeout_seconds=draw(st.integers(1, 86_400))),
        failure_policy=draw(st.sampled_from(policy.FailurePolicy)),
        suspend=draw(st.booleans()),
        sidecar=policy.Sidecar(resources=draw(resources())),
    )


@pytest.mark.parametrize("embedded", [True, False])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_dumped_is_read_as_the_same_policy(embedded: bool, data: st.DataObject) -> None:
    """No field, default or spelling is lost on the way through a document, and the document is canonical."""
    made = data.draw(policies(embedded=embedded))
    document = policy.dump(made)
    assert policy.parse(document, embedded=embedded) == made
    assert policy.dump(policy.parse(document, embedded=embedded)) == document


@given(document=st.dictionaries(st.sampled_from([*policy.dump(policy.Policy()), "spek", "kind", "spec"]), json_values))
@settings(max_examples=200, deadline=None)
def test_any_document_is_a_policy_or_a_list_of_problems(document: dict[str, object]) -> None:
    """Nothing that a user can write ends in another error than the one that says what is allowed."""
    try:
        policy.parse(document, embedded=True)
        found = None
    except policy.PolicyError as refused:
        found = refused.problems
    assert found is None or (found and all(each.allowed for each in found))


@given(num_bytes=st.integers(0, 2**63 - 1) | st.builds(lambda n, e: n << e, st.integers(0, 7), st.integers(0, 60)))
def test_bytes_survive_their_quantity(num_bytes: int) -> None:
    """A number of bytes is written and read exactly."""
    assert policy.quantity_bytes(policy.format_bytes(num_bytes)) == num_bytes


@given(whole=st.integers(0, 10**6), thousandths=st.integers(0, 999), suffix=st.sampled_from(["k", "M", "G", "T"]))
def test_a_decimal_fraction_of_a_large_unit_is_exact(whole: int, thousandths: int, suffix: str) -> None:
    """No floating point is on the way from a quantity to its bytes."""
    factor = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[suffix]
    exact = (whole + Fraction(thousandths, 1000)) * factor
    assert policy.quantity_bytes(f"{whole}.{thousandths:03}{suffix}") == exact


class RanksAndMessages(RuleBasedStateMachine):
    """Several ranks, each at its own step, and a control channel that delays every message as it likes."""

    @initialize(
        num_ranks=st.integers(2, 4),
        period_steps=st.none() | st.integers(2, 12),
        period_seconds=st.none() | st.integers(1, 30),
        lead_s=st.floats(0.1, 5.0),
    )
    def start(self, num_ranks: int, period_steps: int | None, period_seconds: int | None, lead_s: float) -> None:
        trigger = policy.Trigger(period_steps=period_steps, period_seconds=period_seconds)
        self.ranks = [
            cadence.Cadence(rule_timeline.Rule(trigger), decides=rank == 0, lead_s=lead_s) for rank in range(num_ranks)
        ]
        self.period_steps = period_steps
        self.now_s = 0.0
        self.steps = [0] * num_ranks
        self.answers: list[dict[int, Due]] = [{} for _ in self.ranks]
        self.inbox: list[deque[tuple[str, int]]] = [deque() for _ in self.ranks]
        self.accepted: list[set[int]] = [set() for _ in self.ranks]
        self.declined: set[int] = set()
        self.proposed: list[int] = []

    def tell(self, what: str, target: int, *ranks: int) -> None:
        for rank in ranks:
            self.inbox[rank].append((what, target))

    def step_once(self, rank: int) -> None:
        self.steps[rank] += 1
        step = self.steps[rank]
        self.answers[rank][step] = answer = self.ranks[rank].due(step, self.now_s)
        by_steps = self.period_steps is not None and step % self.period_steps == 0
        assert (answer is Due.PERSIST) == (by_steps or step in self.accepted[rank])
        target = self.ranks[rank].proposal(step, self.now_s)
        if target is not None:
            assert rank == 0
            assert target >= step + cadence.MIN_LEAD_STEPS
            # One at a time: the one before was declined, or this rank has walked up to it.
            assert not self.proposed or self.proposed[-1] in self.declined or self.proposed[-1] <= step
            self.proposed.append(target)
            self.tell("announce", target, *range(len(self.ranks)))

    def deliver_one(self, rank: int) -> None:
        what, target = self.inbox[rank].popleft()
        if what == "announce":
            at = self.steps[rank]
            if self.ranks[rank].announce(target):
                self.accepted[rank].add(target)
                assert target > at or self.answers[rank][target] is Due.PERSIST
            else:
                assert target <= at or at == 0
                self.declined.add(target)
                self.tell("declined", target, 0)
                self.tell("withdraw", target, *range(1, len(self.ranks)))
        elif what == "withdraw":
            if self.ranks[rank].withdraw(target):
                self.accepted[rank].discard(target)
        else:
            self.ranks[rank].declined(target)
            if target > self.steps[rank]:
                self.accepted[rank].discard(target)

    @rule(data=st.data(), took_s=st.just(0.0) | st.floats(0.5, 5.0), num_steps=st.integers(1, 4))
    def walk(self, data: st.DataObject, took_s: float, num_steps: int) -> None:
        rank = data.draw(st.integers(0, len(self.ranks) - 1))
        for _ in range(num_steps):
            self.now_s += took_s
            self.step_once(rank)

    @precondition(lambda self: any(self.inbox))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.deliver_one(data.draw(st.sampled_from([rank for rank, box in enumerate(self.inbox) if box])))

    @precondition(lambda self: any(self.inbox))
    @rule()
    def deliver_everything(self) -> None:
        for rank, box in enumerate(self.inbox):
            for _ in range(len(box)):
                self.deliver_one(rank)

    @rule()
    def request(self) -> None:
        self.ranks[0].request_save()

    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        taken = [step for step, answer in self.answers[0].items() if answer is Due.PERSIST]
        if taken:
            self.ranks[0].saved(data.draw(st.sampled_from(taken)), self.now_s)

    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        rank = data.draw(st.integers(0, len(self.ranks) - 1))
        if self.answers[rank]:
            step = data.draw(st.sampled_from(sorted(self.answers[rank])))
            assert self.ranks[rank].due(step, self.now_s) is self.answers[rank][step]

    def teardown(self) -> None:
        if not hasattr(self, "ranks"):
            return
        while any(self.inbox):
            self.deliver_everything()
        last = max([*self.steps, *self.proposed])
        for rank in range(len(self.ranks)):
            while self.steps[rank] < last:
                # The walk to the end is silent: what rank 0 would still propose is not told to anyone.
                self.steps[rank] += 1
                self.answers[rank][self.steps[rank]] = self.ranks[rank].due(self.steps[rank], self.now_s)
        for target in set(self.proposed) - self.declined:
            assert {answers[target] for answers in self.answers} == {Due.PERSIST}
        if self.period_steps is not None:
            for step in range(self.period_steps, last + 1, self.period_steps):
                assert {answers[step] for answers in self.answers} == {Due.PERSIST}


TestRanksAndMessages = RanksAndMessages.TestCase
TestRanksAndMessages.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(
    num_ranks=st.integers(2, 4),
    period_steps=st.none() | st.integers(2, 50),
    period_seconds=st.integers(1, 60),
    step_s=st.integers(1, 20),
    lead_s=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_with_a_lead_that_suffices_all_ranks_save_at_the_same_steps_and_in_time(
    num_ranks: int, period_steps: int | None, period_seconds: int, step_s: int, lead_s: int, data: st.DataObject
) -> None:
    """When messages take less than the lead, the ranks persist the same steps, and none is late by more than it."""
    trigger = policy.Trigger(period_steps=period_steps, period_seconds=period_seconds)
    ranks = [
        cadence.Cadence(rule_timeline.Rule(trigger), decides=rank == 0, lead_s=float(lead_s))
        for rank in range(num_ranks)
    ]
    on_the_way: list[tuple[float, int, int]] = []
    persisted: list[list[int]] = [[] for _ in ranks]
    for step in range(1, 120):
        now_s = float(step * step_s)
        for arrives_s, rank, announced in [each for each in on_the_way if each[0] <= now_s]:
            on_the_way.remove((arrives_s, rank, announced))
            assert ranks[rank].announce(announced)
        # The ranks come to a step in any order, and all are there before any is at the next.
        for rank in data.draw(st.permutations(range(num_ranks))) if step % 10 == 0 else range(num_ranks):
            if ranks[rank].due(step, now_s) is Due.PERSIST:
                persisted[rank].append(step)
        target = ranks[0].proposal(step, now_s)
        if target is not None:
            delays_s = data.draw(st.lists(st.floats(0, lead_s), min_size=num_ranks, max_size=num_ranks))
            on_the_way += [(now_s + delay_s, rank, target) for rank, delay_s in enumerate(delays_s)]
        if persisted[0] and persisted[0][-1] == step:
            ranks[0].saved(step, now_s)
    assert all(steps == persisted[0] for steps in persisted)
    most_s = period_seconds + max(lead_s, cadence.MIN_LEAD_STEPS * step_s) + 2 * step_s
    gaps_s = [(after - before) * step_s for before, after in zip([1, *persisted[0]], [*persisted[0], 120], strict=True)]
    assert max(gaps_s) <= most_s
