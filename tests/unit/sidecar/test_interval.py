"""
The whole of: the period that the automatic interval chooses, its reason, and when it changes.

Called from: pytest.
"""

import math

import pytest

from pillion_sidecar import interval
from pillion_sidecar.interval import Bound, Bounds, Costs, History, Measurements

BOUNDS = Bounds(overhead_percent=1, max_s=3600)
COSTS = Costs(stall_s=0.5, persist_s=20.0, step_s=2.0)
DAY_S = 86_400.0


def test_the_optimum_is_that_of_young_and_daly() -> None:
    """A stall of 0.5 s and a failure each hour: sqrt(2 * 0.5 * 3600) = 60 s, which are 30 steps."""
    found = interval.choose(COSTS, History(observed_s=10 * 3600, failures=10), 8, BOUNDS)
    assert (found.steps, found.seconds, found.bound) == (30, 60.0, Bound.OPTIMUM)
    assert found.mtbf_s == 3600


@pytest.mark.parametrize(
    ("costs", "bounds", "steps", "bound"),
    [
        (Costs(stall_s=2, persist_s=20, step_s=2), BOUNDS, 100, Bound.OVERHEAD),
        (Costs(stall_s=2, persist_s=20, step_s=2), Bounds(overhead_percent=4, max_s=3600), 60, Bound.OPTIMUM),
        (Costs(stall_s=0.5, persist_s=200, step_s=2), BOUNDS, 125, Bound.PERSIST),
        (COSTS, Bounds(overhead_percent=1, max_s=51), 25, Bound.MAXIMUM),
        (Costs(stall_s=2, persist_s=20, step_s=2), Bounds(overhead_percent=1, max_s=100), 50, Bound.MAXIMUM),
        (Costs(stall_s=2, persist_s=200, step_s=2), Bounds(overhead_percent=1, max_s=100), 125, Bound.PERSIST),
        (COSTS, Bounds(overhead_percent=1, max_s=3600, more_than_steps=50), 51, Bound.STEPS),
        (Costs(stall_s=0.001, persist_s=1, step_s=90), BOUNDS, 1, Bound.OPTIMUM),
    ],
    ids=[
        "the overhead",
        "a larger overhead",
        "the persist",
        "the maximum",
        "the maximum before the overhead",
        "the persist before the maximum",
        "snapshots",
        "long steps",
    ],
)
def test_a_bound_takes_the_place_of_the_optimum(costs: Costs, bounds: Bounds, steps: int, bound: Bound) -> None:
    """With a failure each hour. The maximum takes precedence over the budget of the overhead, and the persist over both."""
    found = interval.choose(costs, History(observed_s=3600, failures=1), 8, bounds)
    assert (found.steps, found.bound) == (steps, bound)


def test_the_rate_of_failures_is_assumed_by_ranks_while_none_was_seen() -> None:
    """More ranks fail more often. One failure that was seen counts more than the assumption."""
    one, many = (interval.mtbf_s(History(observed_s=DAY_S), ranks) for ranks in (1, 16_384))
    assert one / many == pytest.approx(16_384)
    assert many == pytest.approx(3.05 * 3600, rel=0.01), "54 days with 419 interruptions are 3.1 h each"
    assert interval.mtbf_s(History(observed_s=DAY_S, failures=2), 1) == DAY_S / 2
    assert interval.mtbf_s(History(observed_s=60, failures=30), 1) == interval.MIN_MTBF_S


def test_old_failures_fade() -> None:
    """Ten failures in the first days are less than one after ten quiet windows, and the rate falls with them."""
    history = History(observed_s=10 * DAY_S, failures=10)
    before = interval.mtbf_s(history, 8)
    for _ in range(10):
        history = history.trained(interval.WINDOW_S)
    assert history.observed_s == interval.WINDOW_S
    assert history.failures < 1
    assert interval.mtbf_s(history, 8) > 10 * before


def test_the_reason_names_the_period_the_bound_and_every_input() -> None:
    """A person sees why, without the formula."""
    history = History(observed_s=7200, failures=2)
    assert interval.choose(COSTS, history, 8, BOUNDS).reason == (
        "every 30 steps (60 s): the optimum by Young and Daly is 60 s, for a stall of 500 ms a save and a failure each 60 min"
        " as seen in this training"
    )
    assumed = interval.choose(COSTS, History(), 8, BOUNDS).reason
    assert assumed == (
        "every 1800 steps (60 min): maxSeconds; the optimum by Young and Daly is 79.1 min, for a stall of 500 ms a save and a"
        " failure each 260 days, which is assumed while none was seen"
    )
    held = interval.choose(Costs(stall_s=0.5, persist_s=200, step_s=2), history, 8, BOUNDS).reason
    assert "a save takes 3.33 min to reach storage" in held


def test_a_period_does_not_follow_every_measurement() -> None:
    """A stall that scatters by a third moves the optimum by a sixth, which changes nothing; one that is four times as long does."""
    history = History(observed_s=36_000, failures=10)
    now = interval.choose(COSTS, history, 8, BOUNDS)
    for stall_s in (0.4, 0.55, 0.6):
        again = interval.choose(Costs(stall_s=stall_s, persist_s=20, step_s=2), history, 8, BOUNDS)
        assert interval.steady(now, again, BOUNDS) is now
    cheap = interval.choose(Costs(stall_s=0.1, persist_s=20, step_s=2), history, 8, BOUNDS)
    assert interval.steady(now, cheap, BOUNDS) is cheap
    assert interval.steady(None, now, BOUNDS) is now


def test_a_bound_is_kept_more_closely_than_an_optimum() -> None:
    """A tenth above the budget of the overhead, or above the maximum, changes the period, and a twentieth does not."""
    history = History(observed_s=3600, failures=1)

    def at(stall_s: float, max_s: float = 3600) -> interval.Interval:
        bounds = Bounds(overhead_percent=1, max_s=max_s)
        return interval.choose(Costs(stall_s=stall_s, persist_s=1, step_s=0.1), history, 8, bounds)

    assert interval.steady(at(2), at(2.2), BOUNDS).steps == at(2.2).steps
    assert interval.steady(at(2), at(2.08), BOUNDS).steps == at(2).steps
    assert interval.steady(at(2), at(1.8), BOUNDS).steps == at(2).steps
    fewer = interval.choose(COSTS, history, 8, Bounds(overhead_percent=1, max_s=52))
    assert interval.steady(interval.choose(COSTS, history, 8, BOUNDS), fewer, BOUNDS) is fewer


def test_two_saves_are_measured_before_there_are_costs() -> None:
    """The stall of the first does not count, and the pace is the time between both without the stall in it."""
    measured = Measurements()
    measured.staged(10, 100.0, 5.0)
    measured.committed(7.0)
    assert measured.costs() is None
    measured.staged(20, 125.0, 0.5)
    assert measured.costs() == Costs(stall_s=0.5, persist_s=7.0, step_s=2.0)
    measured.committed(8.0)
    measured.staged(15, 300.0, 0.4)
    assert measured.costs() == Costs(stall_s=0.5, persist_s=8.0, step_s=2.0), "steps that went back have no pace"


def test_another_session_measures_anew_and_keeps_the_storage() -> None:
    """The pace across a restart is not one, and a persist takes as long as before."""
    measured = Measurements()
    for step in (1, 2):
        measured.staged(step, float(step), 0.1)
        measured.committed(3.0)
    measured.begin()
    assert measured.costs() is None
    measured.staged(1, 50.0, 9.0)
    measured.staged(2, 69.0, 1.0)
    assert measured.costs() == Costs(stall_s=1.0, persist_s=3.0, step_s=10.0)


def test_durations_are_written_for_people() -> None:
    """Two or three digits, in the unit that a person would take."""
    texts = [interval.span(each) for each in (0.0012, 0.5, 59.96, 600, 9000, 30 * DAY_S)]
    assert texts == ["1.2 ms", "500 ms", "60 s", "10 min", "2.5 h", "30 days"]
    assert math.isfinite(interval.LEAST_STALL_S)
