"""
The whole of: what holds of every automatic interval, whatever was measured.

Called from: pytest.
"""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from pillion_sidecar import interval
from pillion_sidecar.interval import Bounds, Costs, History

costs = st.builds(
    Costs,
    stall_s=st.floats(0, 600),
    persist_s=st.floats(0, 7200),
    step_s=st.floats(0.0001, 600),
)
histories = st.builds(History, observed_s=st.floats(0, interval.WINDOW_S), failures=st.floats(0, 1000))
bounds = st.builds(
    Bounds,
    overhead_percent=st.integers(1, 50),
    max_s=st.integers(1, 604_800),
    more_than_steps=st.integers(0, 1000),
)
sizes = st.integers(1, 100_000)


@given(costs, histories, sizes, bounds)
def test_a_period_keeps_its_bounds(measured: Costs, history: History, size: int, within: Bounds) -> None:
    """Each floor holds. The maximum holds unless a floor, or one step, is longer."""
    found = interval.choose(measured, history, size, within)
    stall_s = max(measured.stall_s, interval.LEAST_STALL_S)
    slack = 1 + 1e-6
    assert found.steps >= max(1, within.more_than_steps + 1)
    budget_s = min(within.max_s, stall_s * 100 / within.overhead_percent)
    persist_s = measured.persist_s * interval.PERSIST_MARGIN
    assert found.seconds * slack + measured.step_s >= max(budget_s, persist_s)
    if found.bound is interval.Bound.PERSIST:
        assert found.seconds * slack >= persist_s
    floor_s = max(persist_s, (within.more_than_steps + 1) * measured.step_s)
    assert found.seconds <= max(within.max_s, floor_s) * slack + measured.step_s


@given(costs, histories, sizes, bounds, st.floats(1, 100))
def test_a_period_never_shrinks_when_saves_cost_more(
    measured: Costs, history: History, size: int, within: Bounds, factor: float
) -> None:
    """A longer stall, or a longer persist, makes the period longer or leaves it (one step of rounding apart)."""
    before = interval.choose(measured, history, size, within).steps
    for name in ("stall_s", "persist_s"):
        dearer = dataclasses.replace(measured, **{name: getattr(measured, name) * factor})
        assert interval.choose(dearer, history, size, within).steps >= before


@given(costs, histories, sizes, bounds, st.floats(1, 1000))
def test_a_period_never_grows_when_failures_come_more_often(
    measured: Costs, history: History, size: int, within: Bounds, more: float
) -> None:
    """Among trainings that failed, the one with more failures in the same time saves at least as often."""
    once = dataclasses.replace(history, failures=history.failures + 1)
    often = dataclasses.replace(once, failures=once.failures + more)
    assert interval.choose(measured, often, size, within).steps <= interval.choose(measured, once, size, within).steps


@given(costs, histories, sizes, bounds, st.lists(st.floats(0.97, 1.03), min_size=1, max_size=20))
def test_small_scatter_changes_a_period_at_most_once(
    measured: Costs, history: History, size: int, within: Bounds, scatter: list[float]
) -> None:
    """Costs within three percent of each other: the period does not go to and fro (a step of rounding apart)."""
    steps = list[int]()
    held: interval.Interval | None = None
    for factor in scatter:
        scattered = dataclasses.replace(
            measured, stall_s=measured.stall_s * factor, persist_s=measured.persist_s * factor
        )
        held = interval.steady(held, interval.choose(scattered, history, size, within), within)
        steps.append(held.steps)
    changes = sum(earlier != later for earlier, later in itertools.pairwise(steps))
    if min(steps) >= 100:
        assert changes <= 1
