"""
The whole of: a change of the policy on its way to the ranks of a job, in virtual time.

Called from: pytest.
Must never: read a clock.
"""

import pytest

from pillion import cadence
from pillion.cadence import Due
from pillion.errors import UsageError
from pillion.rule_timeline import Rule
from pillion.wire import policy

OFTEN = Rule(policy.Trigger(period_steps=4))
RARELY = Rule(policy.Trigger(period_steps=10))
SUSPENDED = Rule(policy.Trigger(period_steps=4, period_seconds=5, snapshot_steps=2), suspended=True)


def a_rank(rule: Rule = OFTEN, *, decides: bool = True, lead_s: float = 3.0) -> cadence.Cadence:
    return cadence.Cadence(rule, decides=decides, lead_s=lead_s)


def walk(rank: cadence.Cadence, first: int, last: int) -> list[int]:
    """Takes a step each second; the steps that were persisted."""
    return [step for step in range(first, last + 1) if rank.due(step, float(step)) is Due.PERSIST]


def test_a_change_holds_from_its_step_on_and_not_before() -> None:
    """Until the named step the old period decides, from then on the new one. It is announced once."""
    rank = a_rank()
    walk(rank, 1, 5)
    rank.request_change(RARELY)
    change = rank.change_proposal(5, 5.0)
    assert change == (8, RARELY)
    assert rank.change_proposal(5, 5.0) is None
    assert rank.announce_change(*change)
    assert walk(rank, 6, 20) == [10, 20]
    assert rank.change_proposal(20, 20.0) is None


def test_a_rank_that_is_past_the_step_declines_and_keeps_its_rule() -> None:
    """Its past answers stay, and so do its future answers, until it gets another step."""
    rank = a_rank(decides=False)
    walk(rank, 1, 8)
    assert not rank.announce_change(8, RARELY)
    assert walk(rank, 9, 12) == [12]


def test_a_declined_change_is_taken_back_and_proposed_twice_as_far_ahead() -> None:
    """Also by the deciding rank that is past it already: until the next step all go by the old rule."""
    rank = a_rank()
    walk(rank, 1, 5)
    rank.request_change(RARELY)
    change = rank.change_proposal(5, 5.0)
    assert change == (8, RARELY)
    assert rank.announce_change(*change)
    assert walk(rank, 6, 11) == [10]
    rank.declined_change(8)
    again = rank.change_proposal(11, 11.0)
    assert again == (17, RARELY)
    assert walk(rank, 12, 16) == [12, 16]
    rank.declined_change(8)
    assert rank.announce_change(*again)
    assert walk(rank, 17, 30) == [20, 30]


def test_a_later_change_has_a_later_step() -> None:
    """A decline names only a step. The next step is behind it, even if the calls of the loop are closer together then."""
    rank = a_rank(lead_s=4.0)
    for step in (10, 20):
        rank.due(step, step / 10)
    rank.request_change(RARELY)
    assert rank.change_proposal(20, 2.0) == (60, RARELY)
    rank.declined_change(60)
    rank.due(21, 3.0)
    assert rank.change_proposal(21, 3.0) == (61, RARELY)


def test_a_change_that_is_told_again_finds_who_has_missed_it() -> None:
    """It is repeated with its own step: who has it agrees, who missed it declines, and a new step brings all together."""
    ranks = [a_rank(decides=rank == 0) for rank in range(2)]
    for rank in ranks:
        walk(rank, 1, 5)
    ranks[0].request_change(RARELY)
    change = ranks[0].change_proposal(5, 5.0)
    assert change is not None
    assert ranks[0].announce_change(*change)
    assert [walk(rank, 6, 16) for rank in ranks] == [[10], [8, 12, 16]]
    ranks[0].request_change(RARELY)
    assert ranks[0].change_proposal(16, 16.0) == change
    assert [rank.announce_change(*change) for rank in ranks] == [True, False]
    ranks[0].declined_change(change[0])
    ranks[1].withdraw_change(change[0])
    again = ranks[0].change_proposal(16, 16.0)
    assert again is not None
    assert again[0] > 16
    assert all(rank.announce_change(*again) for rank in ranks)
    assert [walk(rank, 17, again[0] + 20) for rank in ranks] == [[20, 30, 40], [20, 30, 40]]


def test_what_holds_from_the_begin_on_is_not_announced() -> None:
    """A policy equal to the one that the job began with changes nothing, however often it is announced."""
    rank = a_rank()
    walk(rank, 1, 5)
    for step in (5, 6):
        rank.request_change(OFTEN)
        assert rank.change_proposal(step, float(step)) is None


def test_a_rank_that_begins_with_the_rule_agrees_to_it_late() -> None:
    """A trainer that was restarted has the rule from its sidecar; the repeated announcement of an old step finds it in place."""
    rank = a_rank(RARELY, decides=False)
    assert rank.announce_change(8, RARELY)
    walk(rank, 1, 50)
    assert rank.announce_change(8, RARELY)
    assert not rank.announce_change(8, OFTEN)


def test_suspended_nothing_is_due_but_what_is_asked_for() -> None:
    """Neither steps nor time make a save or a snapshot due. A requested save is announced as usual."""
    rank = a_rank(SUSPENDED)
    assert walk(rank, 1, 20) == []
    assert {rank.due(step, 21.0) for step in range(1, 21)} == {Due.NOT_DUE}
    assert rank.proposal(20, 1000.0) is None
    rank.request_save()
    target = rank.proposal(20, 1001.0)
    assert target == 23
    assert rank.announce(target)
    assert walk(rank, 21, 40) == [23]


def test_an_announced_save_is_made_although_the_period_changes_before_it() -> None:
    """It was announced for a step that the old period named as well; every rank that accepted it saves there."""
    rank = a_rank(decides=False)
    walk(rank, 1, 5)
    assert rank.announce(8)
    assert rank.announce_change(7, SUSPENDED)
    assert walk(rank, 6, 20) == [8]


def test_only_the_deciding_rank_changes_the_rule() -> None:
    """A request made to another rank is an error, and it proposes nothing."""
    rank = a_rank(decides=False)
    walk(rank, 1, 5)
    with pytest.raises(UsageError):
        rank.request_change(RARELY)
    assert rank.change_proposal(5, 5.0) is None
