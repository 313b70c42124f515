"""
The whole of: what the facts of a run come to, in seconds of each kind.

Called from: pytest.
"""

from dataclasses import replace
from typing import Any

import pytest

from pillion_sidecar.run import account
from pillion_sidecar.run.journal import Attempt, Journal, Load, Save

S = 10**9
T0 = 1_700_000_000 * S


def attempt(number: int, begin_s: float, end_s: float, **more: Any) -> Attempt:
    return Attempt(
        number=number, session=str(number), began_ns=T0 + int(begin_s * S), seen_ns=T0 + int(end_s * S), **more
    )


def load(step: int, begin_s: float, end_s: float, saved_s: float | None = None) -> Load:
    return Load(
        step=step,
        tier="storage" if step >= 0 else "fresh",
        began_ns=T0 + int(begin_s * S),
        ended_ns=T0 + int(end_s * S),
        saved_ns=0 if saved_s is None else T0 + int(saved_s * S),
    )


def save(number: int, step: int, begin_s: float) -> Save:
    began_ns = T0 + int(begin_s * S)
    return Save(number=number, step=step, began_ns=began_ns, committed_ns=began_ns + S)


FIRST = attempt(1, 0, 100, loads=(load(-1, 2, 4),), stalled_s=4.0, waited_s=2.0)
SECOND = attempt(2, 130, 230, loads=(load(80, 135, 140, saved_s=80),), stalled_s=3.0)


def kinds(of: account.Account) -> float:
    return of.trained_s + of.retrained_s + of.stalled_s + of.waited_s + of.restoring_s + of.down_s


def test_a_run_without_facts_has_an_account_of_zeros() -> None:
    """Nothing is divided by the length of a run that never was."""
    nothing = account.of(Journal())
    assert (nothing.wall_s, nothing.goodput, nothing.attempts, nothing.restarts) == (0.0, 0.0, 0, ())


def test_an_attempt_trains_from_its_load_to_its_end_but_for_its_saves() -> None:
    """100 s, of which 4 s went to the load and 6 s to saves."""
    only = account.of(Journal(attempts=(FIRST,)))
    assert only.wall_s == pytest.approx(100)
    assert only.restoring_s == pytest.approx(4)
    assert only.stalled_s == pytest.approx(4)
    assert only.waited_s == pytest.approx(2)
    assert only.trained_s == pytest.approx(90)
    assert only.goodput == pytest.approx(0.9)


def test_a_restart_loses_what_was_trained_after_the_save_that_it_loads() -> None:
    """20 s came after the save of step 80, at the pace and with the share of stalls of their attempt; 30 s nobody trained."""
    saves = (save(1, 40, 40), save(1, 80, 80))
    both = account.of(Journal(attempts=(FIRST, SECOND), saves=saves))
    assert both.retrained_s == pytest.approx(20 * 90 / 96)
    assert both.down_s == pytest.approx(30)
    assert both.restoring_s == pytest.approx(4 + 10)
    assert both.trained_s == pytest.approx(90 - 20 * 90 / 96 + 87)
    assert kinds(both) == pytest.approx(both.wall_s) == pytest.approx(230)
    (restart,) = both.restarts
    assert (restart.step, restart.tier) == (80, "storage")
    assert restart.down_s == pytest.approx(30)
    assert restart.restoring_s == pytest.approx(10)
    assert restart.lost_s == pytest.approx(20)
    assert restart.lost_steps == 20


def test_a_second_restart_from_the_same_step_loses_its_own_attempt_and_not_the_first_loss_again() -> None:
    """Two failures after one checkpoint: what the first one lost is counted once."""
    third = attempt(3, 240, 300, loads=(load(80, 240, 241, saved_s=80),))
    all_three = account.of(Journal(attempts=(FIRST, SECOND, third)))
    assert [each.lost_s for each in all_three.restarts] == [pytest.approx(20), pytest.approx(90)]
    assert kinds(all_three) == pytest.approx(all_three.wall_s)


def test_a_start_from_nothing_loses_all_that_was_trained_before() -> None:
    """Its load found no checkpoint."""
    fresh = attempt(2, 100, 200, loads=(load(-1, 100, 101),))
    both = account.of(Journal(attempts=(FIRST, fresh)))
    assert both.retrained_s == pytest.approx(90)
    assert both.restarts[0].step is None
    assert both.restarts[0].lost_s == pytest.approx(96)


def test_what_nobody_knows_is_not_counted_as_lost() -> None:
    """A restart whose checkpoint has no known time, and one that loaded nothing through Pillion."""
    unknown = attempt(2, 100, 200, loads=(load(50, 100, 101),))
    silent = attempt(3, 210, 250)
    of = account.of(Journal(attempts=(FIRST, unknown, silent)))
    assert [each.lost_s for each in of.restarts] == [None, None]
    assert of.retrained_s == 0.0


def test_the_save_s_own_time_serves_where_the_load_does_not_know_it() -> None:
    """A snapshot from another sidecar's memory: the journal has the save."""
    unknown = replace(SECOND, loads=(load(80, 135, 140),))
    of = account.of(Journal(attempts=(FIRST, unknown), saves=(save(1, 80, 80),)))
    assert of.restarts[0].lost_s == pytest.approx(20)
    assert of.restarts[0].lost_steps is None  # one save has no pace


def test_a_rollback_within_an_attempt_loses_what_came_after_its_checkpoint() -> None:
    """The script loaded step 40 again after 50 s: ten seconds are lost, and the load is a restore."""
    rolled = attempt(1, 0, 100, loads=(load(-1, 0, 0), load(40, 50, 52, saved_s=40)))
    of = account.of(Journal(attempts=(rolled,)))
    assert of.retrained_s == pytest.approx(10)
    assert of.restoring_s == pytest.approx(2)
    assert kinds(of) == pytest.approx(100)


def test_clocks_that_differ_make_no_negative_time() -> None:
    """The last sign of life has the storage's clock, which may be ahead of the next attempt's begin."""
    ahead = replace(FIRST, seen_ns=T0 + 500 * S)
    of = account.of(Journal(attempts=(ahead, SECOND)))
    assert of.down_s == 0.0
    assert kinds(of) == pytest.approx(of.wall_s) == pytest.approx(230)


def test_saves_that_take_longer_than_an_attempt_lived_take_all_of_it() -> None:
    """Two machines' measures never make a share above one."""
    held = replace(FIRST, stalled_s=300.0, waited_s=100.0)
    of = account.of(Journal(attempts=(held,)))
    assert of.trained_s == pytest.approx(0)
    assert kinds(of) == pytest.approx(100)
