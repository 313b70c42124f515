"""
The whole of: the cadence of one rank, and the protocol between the deciding rank and the others, in virtual time.

Called from: pytest.
Must never: read a clock.
"""

import pytest

from pillion import cadence, rule_timeline
from pillion.cadence import Due
from pillion.errors import UsageError
from pillion.wire import policy


def a_rank(
    *,
    period_steps: int | None = None,
    period_seconds: int | None = None,
    snapshot_steps: int | None = None,
    decides: bool = True,
    lead_s: float = 1.0,
) -> cadence.Cadence:
    trigger = policy.Trigger(period_steps=period_steps, period_seconds=period_seconds, snapshot_steps=snapshot_steps)
    return cadence.Cadence(rule_timeline.Rule(trigger), decides=decides, lead_s=lead_s)


def walk(rank: cadence.Cadence, first: int, last: int, *, step_s: float = 1.0) -> list[int]:
    """Takes the steps from first to last, at step * step_s seconds each; the steps that were persisted."""
    return [step for step in range(first, last + 1) if rank.due(step, step * step_s) is Due.PERSIST]


def test_step_periods_are_multiples_and_persisting_wins() -> None:
    """A multiple of the persist period is persisted, another multiple of the snapshot period is only staged."""
    rank = a_rank(period_steps=6, snapshot_steps=2)
    answers = {step: rank.due(step, float(step)) for step in range(1, 13)}
    assert [step for step, answer in answers.items() if answer is Due.PERSIST] == [6, 12]
    assert [step for step, answer in answers.items() if answer is Due.SNAPSHOT] == [2, 4, 8, 10]


def test_step_zero_is_never_persisted() -> None:
    """Before the first step there is nothing worth a checkpoint; a snapshot of it costs no storage."""
    assert a_rank(period_steps=1).due(0, 0.0) is Due.NOT_DUE
    assert a_rank(period_steps=2, snapshot_steps=1).due(0, 0.0) is Due.SNAPSHOT


def test_without_a_period_nothing_is_ever_due() -> None:
    """A run that names no period saves when its author calls save, and at no other time."""
    rank = a_rank()
    assert {rank.due(step, float(step)) for step in range(100)} == {Due.NOT_DUE}
    assert rank.proposal(99, 1e9) is None


def test_the_period_is_proposed_once_and_far_enough_ahead() -> None:
    """When the period is over, the deciding rank names one step, one lead ahead, and names it once."""
    rank = a_rank(period_seconds=10, lead_s=3.5)
    walk(rank, 1, 10)
    assert rank.proposal(10, 10.0) is None
    rank.due(11, 11.0)
    assert rank.proposal(11, 11.0) == 15
    assert rank.proposal(11, 11.0) is None
    rank.due(12, 12.0)
    assert rank.proposal(12, 12.0) is None


def test_the_lead_is_two_steps_when_steps_are_long() -> None:
    """Steps that are longer than the lead still leave two of them for a message to arrive."""
    rank = a_rank(period_seconds=10, lead_s=0.5)
    walk(rank, 1, 2, step_s=60.0)
    assert rank.proposal(2, 120.0) == 4


def test_an_announced_step_is_persisted_and_starts_the_period_again() -> None:
    """At the accepted step the answer is persist, and the next proposal comes a whole period after it."""
    rank = a_rank(period_seconds=10)
    walk(rank, 1, 11)
    target = rank.proposal(11, 11.0)
    assert target == 13
    assert rank.announce(target)
    assert walk(rank, 12, 22) == [13]
    assert rank.proposal(22, 22.9) is None
    assert rank.proposal(22, 23.0) is not None


def test_a_persisted_save_by_steps_starts_the_period_of_time_again() -> None:
    """With both periods set, time counts from the last persisted save, whatever made it due."""
    rank = a_rank(period_seconds=10)
    walk(rank, 1, 9)
    rank.saved(9, 9.0)
    walk(rank, 10, 18)
    assert rank.proposal(18, 18.0) is None
    rank.due(19, 19.0)
    assert rank.proposal(19, 19.0) == 21


def test_a_rank_past_the_announced_step_declines() -> None:
    """A rank that has answered for a step does not take that answer back."""
    rank = a_rank(decides=False)
    walk(rank, 1, 5)
    assert not rank.announce(5)
    assert rank.due(5, 5.0) is Due.NOT_DUE
    assert rank.announce(6)
    assert walk(rank, 6, 7) == [6]


def test_a_rank_that_has_not_begun_declines() -> None:
    """Before its first step a rank cannot know whether the announced one is ahead of it."""
    rank = a_rank(decides=False, period_steps=5)
    assert not rank.announce(5)
    assert not rank.announce(7)


def test_an_announcement_that_comes_twice_is_answered_alike() -> None:
    """A repeated announcement of a step that was persisted is not a decline."""
    rank = a_rank(decides=False)
    rank.due(1, 1.0)
    assert rank.announce(3)
    assert walk(rank, 2, 5) == [3]
    assert rank.announce(3)


def test_a_declined_step_is_proposed_again_twice_as_far() -> None:
    """After a decline the next proposal is immediate and its lead doubles, until one holds."""
    rank = a_rank(period_seconds=10, lead_s=3.0)
    walk(rank, 1, 11)
    assert rank.proposal(11, 11.0) == 14
    rank.declined(14)
    assert rank.proposal(11, 11.0) == 17
    rank.declined(14)
    assert rank.proposal(11, 11.0) is None
    rank.declined(17)
    assert rank.proposal(11, 11.0) == 23
    assert rank.announce(23)
    assert walk(rank, 12, 33) == [23]
    assert rank.proposal(33, 33.0) == 36


def test_a_decline_after_the_save_was_taken_asks_for_another_one() -> None:
    """A save that a rank declined is incomplete: when the decline comes late, a new step is proposed at once."""
    rank = a_rank(lead_s=3.0)
    walk(rank, 1, 2)
    rank.request_save()
    target = rank.proposal(2, 2.0)
    assert target == 5
    assert rank.announce(target)
    assert walk(rank, 3, 6) == [5]
    rank.declined(5)
    assert rank.proposal(6, 6.0) == 12
    rank.declined(5)
    assert rank.proposal(6, 6.0) is None


def test_a_withdrawn_step_is_not_persisted() -> None:
    """A rank that accepted a step which another rank declined skips it if the decline is in time, and else reports that it is too late."""
    rank = a_rank(decides=False)
    rank.due(1, 1.0)
    assert rank.announce(3)
    assert rank.withdraw(3)
    assert rank.announce(4)
    assert walk(rank, 2, 4) == [4]
    assert not rank.withdraw(4)


def test_a_lost_announcement_is_proposed_again() -> None:
    """A deciding rank that passes its own proposal without its announcement proposes another step."""
    rank = a_rank(period_seconds=10)
    walk(rank, 1, 11)
    assert rank.proposal(11, 11.0) == 13
    walk(rank, 12, 13)
    assert rank.proposal(13, 13.0) == 17


def test_a_request_makes_the_next_proposal_immediate() -> None:
    """Save-now needs no period, and one save answers it."""
    rank = a_rank()
    walk(rank, 1, 4)
    assert rank.proposal(4, 4.0) is None
    rank.request_save()
    target = rank.proposal(4, 4.0)
    assert target == 6
    assert rank.announce(target)
    assert walk(rank, 5, 9) == [6]
    rank.saved(6, 8.0)
    assert rank.proposal(9, 9.0) is None


def test_a_request_is_not_answered_by_an_older_save() -> None:
    """The report of a save that is older than the request leaves the request standing."""
    rank = a_rank()
    walk(rank, 1, 4)
    rank.request_save()
    rank.saved(2, 4.5)
    assert rank.proposal(4, 4.5) == 6


def test_only_the_deciding_rank_proposes() -> None:
    """A rank that does not decide proposes nothing, and a request made to it is an error."""
    rank = a_rank(period_seconds=1, decides=False)
    walk(rank, 1, 100)
    assert rank.proposal(100, 1000.0) is None
    with pytest.raises(UsageError):
        rank.request_save()


def test_a_step_asked_about_twice_is_answered_alike() -> None:
    """An announcement between two questions about one step does not change the answer, and no time is learned."""
    rank = a_rank(period_steps=4, period_seconds=10)
    walk(rank, 1, 5)
    assert not rank.announce(5)
    assert rank.due(5, 500.0) is Due.NOT_DUE
    assert rank.due(4, 501.0) is Due.PERSIST


def test_one_long_step_barely_shortens_the_lead() -> None:
    """A stall of a minute among steps of a second leaves the lead as many steps as before, give or take one."""
    rank = a_rank(lead_s=10.0)
    walk(rank, 1, 20)
    rank.due(21, 81.0)
    rank.request_save()
    assert rank.proposal(21, 81.0) in (21 + 9, 21 + 10)


def test_a_loop_that_asks_at_every_tenth_step_meets_its_target() -> None:
    """The proposed step is one that the loop will ask about."""
    rank = a_rank(lead_s=1.0)
    for step in (10, 20, 30):
        rank.due(step, float(step))
    rank.request_save()
    assert rank.proposal(30, 30.0) == 50


def test_after_a_rollback_the_proposed_step_is_new_to_everyone() -> None:
    """A rank that went back to an older step proposes a step beyond all that have an answer, so no rank declines."""
    rank = a_rank()
    walk(rank, 1, 50)
    rank.due(20, 51.0)
    rank.request_save()
    target = rank.proposal(20, 51.0)
    assert target is not None
    assert target > 50
    assert rank.announce(target)


def test_a_deciding_rank_takes_a_declined_step_back() -> None:
    """A rank that was past the step saves there never: neither does the one that proposed it and is not there yet."""
    rank = a_rank(lead_s=3.0)
    walk(rank, 1, 2)
    rank.request_save()
    assert rank.proposal(2, 2.0) == 5
    assert rank.announce(5)
    rank.declined(5)
    assert rank.proposal(2, 2.0) == 8
    assert rank.announce(8)
    assert walk(rank, 3, 10) == [8]


def test_a_save_asked_for_among_microsecond_steps_comes_soon_when_training_begins() -> None:
    """A loop that passes over data it has seen, then trains: the step named first is far, a near one follows, and the request is answered."""
    rank = a_rank(lead_s=2.0)
    now_s = 0.0
    for step in range(1, 5001):
        now_s += 10e-6
        rank.due(step, now_s)
    rank.request_save()
    far = rank.proposal(5000, now_s)
    assert far is not None
    assert far > 100_000
    assert rank.announce(far)
    asked_s = now_s
    for step in range(5001, 5100):
        now_s += 1.0
        if rank.due(step, now_s) is Due.PERSIST:
            break
        target = rank.proposal(step, now_s)
        assert target is None or rank.announce(target)
    assert now_s - asked_s <= 6.0
    rank.saved(step, now_s)
    # A save was requested: the far step is recalled, on this rank at once.
    assert rank.recalled(step) == far
    assert rank.recalled(step) is None
    assert walk(rank, step + 1, step + 100) == []
    assert rank.proposal(step + 100, now_s + 100.0) is None


def test_a_step_that_some_rank_may_have_reached_is_not_recalled() -> None:
    """A rank that learns of it too late would save there alone, and that save would fail. One more checkpoint does less harm."""
    rank = a_rank(lead_s=2.0)
    walk(rank, 1, 100, step_s=0.01)
    rank.request_save()
    assert rank.proposal(100, 1.0) == 300
    assert rank.announce(300)
    for step in range(101, 111):
        rank.due(step, 1.0 + (step - 100) * 0.5)
    near = rank.proposal(110, 6.0)
    assert near == 114
    assert rank.announce(near)
    assert rank.recalled(110) is None, "the save is not taken yet"
    assert rank.due(near, 8.0) is Due.PERSIST
    for step in range(115, 298):
        rank.due(step, 8.0 + (step - 114) * 0.5)
    assert rank.recalled(297) is None
    assert rank.due(300, 120.0) is Due.PERSIST


def test_one_slow_step_does_not_name_another_one() -> None:
    """An evaluation between the proposal and its step changes nothing, nor does asking at once."""
    rank = a_rank(lead_s=2.0)
    walk(rank, 1, 30, step_s=0.1)
    rank.request_save()
    assert rank.proposal(30, 3.0) == 50
    assert rank.announce(50)
    assert rank.proposal(30, 3.0) is None
    for step in range(31, 51):
        now_s = 603.0 + step / 10
        rank.due(step, now_s)
        assert rank.proposal(step, now_s) is None


def test_failed_proposals_do_not_put_the_next_one_out_of_reach() -> None:
    """However many were declined, the lead is 32 times itself at most."""
    rank = a_rank(lead_s=2.0)
    walk(rank, 1, 10, step_s=0.5)
    rank.request_save()
    for _ in range(100):
        target = rank.proposal(10, 5.0)
        assert target is not None
        rank.declined(target)
    assert rank.proposal(10, 5.0) == 10 + 4 * 32


def test_a_step_that_jumps_once_does_not_lengthen_the_lead() -> None:
    """A loop that continues after a jump over thousands of steps gets a step that is a few steps ahead."""
    rank = a_rank()
    walk(rank, 1, 10)
    rank.due(10_000, 11.0)
    rank.request_save()
    assert rank.proposal(10_000, 11.0) == 10_002


@pytest.mark.parametrize("stride", [3, 7, 8, 25])
def test_a_loop_that_passes_steps_over_saves_in_every_period(stride: int) -> None:
    """A save that is due between two calls of the loop is due at the second, once, even if that call is repeated."""
    rank = a_rank(period_steps=20, snapshot_steps=10)
    rank.loaded(0, 0.0)
    asked = list(range(stride, 400, stride))
    answers = {step: rank.due(step, float(step)) for step in asked}
    assert [rank.due(step, 400.0) for step in asked] == list(answers.values())
    due = {multiple: next((step for step in asked if step >= multiple), None) for multiple in range(20, 400, 20)}
    assert {step for step, answer in answers.items() if answer is Due.PERSIST} == set(due.values()) - {None}
    assert len([each for each in answers.values() if each is not Due.NOT_DUE]) >= 400 // max(stride, 10) - 2


def test_an_announced_step_that_the_loop_passes_over_is_saved_at_the_next() -> None:
    """Steps of irregular length, such as counts of tokens, meet no step exactly."""
    rank = a_rank()
    tokens = [4_000, 8_100, 11_900, 16_050, 20_010, 24_000, 28_200]
    for number, step in enumerate(tokens[:4]):
        rank.due(step, float(number))
    rank.request_save()
    target = rank.proposal(tokens[3], 3.0)
    assert target is not None
    assert rank.announce(target)
    saved = [step for number, step in enumerate(tokens[4:]) if rank.due(step, 4.0 + number) is Due.PERSIST]
    assert saved == [min(step for step in tokens if step >= target)]
    assert rank.proposal(28_200, 7.0) is None
    assert rank.announce(target)


def test_a_loop_that_does_not_ask_for_an_hour_saves_two_steps_later() -> None:
    """The period is over when it comes back, and the pace of its steps is what it was."""
    rank = a_rank(period_seconds=600)
    walk(rank, 1, 20)
    rank.due(21, 3620.0)
    assert rank.proposal(21, 3620.0) == 23


def test_a_save_asked_for_behind_a_rollback_comes_soon() -> None:
    """A load takes all ranks back: steps that were answered for before are ahead of all again, and an old proposal is no answer."""
    rank = a_rank(period_steps=500)
    walk(rank, 1, 1000)
    rank.request_save()
    assert rank.proposal(1000, 1000.0) == 1002
    assert rank.announce(1002)
    rank.loaded(100, 1001.0)
    assert rank.due(101, 1002.0) is Due.NOT_DUE
    target = rank.proposal(101, 1002.0)
    assert target == 103
    assert rank.announce(target)
    assert [step for step in range(102, 1003) if rank.due(step, 1000.0 + step) is Due.PERSIST] == [103, 500, 1000, 1002]
    assert rank.proposal(1002, 2002.0) is None


def test_what_was_due_between_the_loaded_step_and_the_first_is_due_at_the_first() -> None:
    """A restarted loop with a call at every eighth step misses no period. The loaded step itself may be saved again."""
    rank = a_rank(period_steps=100)
    rank.loaded(96, 0.0)
    assert rank.due(104, 1.0) is Due.PERSIST
    assert rank.due(112, 2.0) is Due.NOT_DUE
    again = a_rank(period_steps=100)
    again.loaded(100, 0.0)
    assert again.due(100, 1.0) is Due.PERSIST


@pytest.mark.parametrize("lead_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lead_that_is_no_time_is_refused(lead_s: float) -> None:
    """The lead is a positive, finite number of seconds."""
    with pytest.raises(UsageError, match="lead_s"):
        a_rank(lead_s=lead_s)
