"""
The automatic interval (`trigger.auto`): the period of persisted saves, from what saves cost and how often the training fails. Pure.

Called from: `supervisor.pacing`; benchmarks/simulate_interval.py, which compares the periods with fixed ones.

    optimum   sqrt(2 * stall * MTBF)              Young (1974), Daly (2006, the first order): what a save costs, against the work a failure loses
    at least  stall * 100 / overheadPercent       CheckFreq (Mohan et al., FAST 2021): the overhead has a budget
    at most   maxSeconds                          also where the budget asks for more, as one bad measurement would set a period of hours
    at least  persist * PERSIST_MARGIN            a save finds its slot free, so its stall has no wait for storage
              one step more than snapshotSteps and localSteps

Of two lines that contradict each other, the lower one counts.

A persist runs beside training, so it holds up nothing. It delays the moment from which a save counts by the same time at every period, and
does not move the optimum. The period is in steps, because ranks agree on steps without messages (`pillion.cadence`).

Must never: read a clock; let the period go up and down with each measurement (see `steady`).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

PERSIST_MARGIN: Final = 1.25
"""Minimum ratio of the period to the time of a persist. Times on a shared storage scatter by some tenths."""
HYSTERESIS: Final = 1.25
"""Ratio up to which another optimum changes nothing. A period that is off by this ratio costs 2.5 % of the overhead more (the sum of both
costs is flat at its minimum: (r + 1/r) / 2)."""
TOLERANCE: Final = 1.05
"""Ratio by which a period may be below its floor, or above its maximum, before it changes: measurements scatter."""
LEAST_STALL_S: Final = 0.001
"""Minimum stall, seconds. An overlapped save reports none, and a stall of zero would make every step the optimum."""
LEAST_STEP_S: Final = 1e-6
"""Minimum duration of a step, seconds, as in `pillion.cadence`."""
RECENT_SAVES: Final = 5
"""Number of newest saves whose median counts. One slow save among them changes nothing, and a new cost shows after three."""
CALIBRATION_SAVES: Final = 2
"""Saves that are measured before there is a period. The first allocates and maps memory, so its stall is not typical. Two saves have a
pace between them."""

PRIOR_MTBF_RANK_S: Final = 50_000 * 3600.0
"""Mean time between failures of a rank, seconds, while none was seen. The Llama 3 report (arXiv:2407.21783, section 3.3.4) has 419 unexpected
interruptions in 54 days on 16,384 GPUs: one in 50,700 GPU-hours."""
MIN_MTBF_S: Final = 600.0
"""Minimum mean time between failures, seconds. A failure in the first minutes says little, and a training that fails more often needs a
remedy, not more saves."""
WINDOW_S: Final = 30 * 86_400.0
"""Time of training that counts, seconds. Older time and its failures fade, so that a cluster that was repaired is believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What was measured of saves and steps, seconds each."""

    stall_s: float
    """Time that a persisted save holds up the slowest rank of the pod."""
    persist_s: float
    """Time from the seal until the commit."""
    step_s: float
    """Time of a training step, without stalls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How long a training ran, and how often it failed, all sessions of its root together."""

    observed_s: float = 0.0
    failures: float = 0.0
    """Not whole once older time has faded."""

    def trained(self, elapsed_s: float) -> History:
        """Return the history after `elapsed_s` more seconds of training."""
        observed_s = self.observed_s + max(0.0, elapsed_s)
        if observed_s <= WINDOW_S:
            return replace(self, observed_s=observed_s)
        return History(observed_s=WINDOW_S, failures=self.failures * WINDOW_S / observed_s)

    def failed(self) -> History:
        """Return the history after one more failure."""
        return replace(self, failures=self.failures + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the policy sets."""

    overhead_percent: float
    max_s: float
    more_than_steps: int = 0
    """The larger one of `snapshotSteps` and `localSteps`. 0: there is neither."""


class Bound(StrEnum):
    """What decided the period."""

    OPTIMUM = "Optimum"
    OVERHEAD = "Overhead"
    PERSIST = "Persist"
    MAXIMUM = "Maximum"
    STEPS = "Steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A period, and how it came about."""

    steps: int
    """At least 1."""
    seconds: float
    """Time of that many steps."""
    bound: Bound
    costs: Costs
    mtbf_s: float
    failures: float
    """Failures that `mtbf_s` comes from. 0: it is the prior."""
    reason: str
    """For people, one line."""

    def inputs(self) -> dict[str, float]:
        """Return the period in seconds, and the numbers that it comes from."""
        costs = {
            "stall_s": self.costs.stall_s,
            "persist_s": self.costs.persist_s,
            "step_s": self.costs.step_s,
        }
        return {"period_s": self.seconds, **costs, "mtbf_s": self.mtbf_s, "failures": self.failures}


def mtbf_s(history: History, world_size: int) -> float:
    """
    Return the mean time between failures of a training, seconds.

    Without a failure it is the prior, PRIOR_MTBF_RANK_S shared among the ranks; with failures the time per failure.
    """
    if history.failures <= 0:
        return max(MIN_MTBF_S, PRIOR_MTBF_RANK_S / max(1, world_size))
    return max(MIN_MTBF_S, history.observed_s / history.failures)


def choose(costs: Costs, history: History, world_size: int, bounds: Bounds) -> Interval:
    """Return the period for these costs, this history and these bounds. See the module for the formula."""
    stall_s, step_s = max(costs.stall_s, LEAST_STALL_S), max(costs.step_s, LEAST_STEP_S)
    mean_s = mtbf_s(history, world_size)
    best_s = math.sqrt(2 * stall_s * mean_s)
    bound, period_s = max(
        (Bound.OPTIMUM, best_s), (Bound.OVERHEAD, stall_s * 100 / bounds.overhead_percent), key=_second
    )
    bound, period_s = min((bound, period_s), (Bound.MAXIMUM, bounds.max_s), key=_second)
    bound, period_s = max((bound, period_s), (Bound.PERSIST, costs.persist_s * PERSIST_MARGIN), key=_second)
    # Floors are rounded up, the maximum is rounded down, and a step may be longer than it.
    up, down = math.ceil(period_s / step_s - 1e-9), int(period_s / step_s + 1e-9)
    steps = max(1, up if bound in (Bound.OVERHEAD, Bound.PERSIST) else down)
    if steps <= bounds.more_than_steps:
        bound, steps = Bound.STEPS, bounds.more_than_steps + 1
    interval = Interval(
        steps=steps,
        seconds=steps * step_s,
        bound=bound,
        costs=costs,
        mtbf_s=mean_s,
        failures=history.failures,
        reason="",
    )
    return replace(interval, reason=_reason(interval, best_s, bounds))


def _second(pair: tuple[Bound, float]) -> float:
    return pair[1]


def steady(before: Interval | None, now: Interval, bounds: Bounds) -> Interval:
    """
    Return `before`, if `now` differs too little from it to matter, else `now`.

    A change smaller than HYSTERESIS does not matter to the optimum. Against a bound of the policy or of the storage, one of TOLERANCE does.
    """
    if before is None or before.steps <= bounds.more_than_steps:
        return now
    ratio = now.steps / before.steps
    longest = TOLERANCE if now.bound in (Bound.OVERHEAD, Bound.PERSIST) else HYSTERESIS
    shortest = TOLERANCE if now.bound is Bound.MAXIMUM else HYSTERESIS
    return before if 1 / shortest <= ratio <= longest else now


def _reason(interval: Interval, best_s: float, bounds: Bounds) -> str:
    costs = interval.costs
    if interval.failures > 0:
        failures = f"a failure each {span(interval.mtbf_s)} as seen in this training"
    else:
        failures = f"a failure each {span(interval.mtbf_s)}, which is assumed while none was seen"
    best = (
        f"the optimum by Young and Daly is {span(best_s)}, for a stall of {span(costs.stall_s)} a save and {failures}"
    )
    why = {
        Bound.OPTIMUM: best,
        Bound.MAXIMUM: f"maxSeconds; {best}",
        Bound.OVERHEAD: f"a shorter period would hold up training for more than overheadPercent ({bounds.overhead_percent:g} %); {best}",
        Bound.PERSIST: f"a save takes {span(costs.persist_s)} to reach storage, and the next one waits for it; {best}",
        Bound.STEPS: f"snapshots and saves to the local disk are more frequent than saves to storage; {best}",
    }
    steps = "every step" if interval.steps == 1 else f"every {interval.steps} steps"
    return f"{steps} ({span(interval.seconds)}): {why[interval.bound]}"


def span(seconds: float) -> str:
    """Return a duration as people read it, with two or three digits."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:,.0f} days"


class Measurements:
    """The newest persisted saves of one session, as its sidecar sees them. Written by `status.status`."""

    def __init__(self) -> None:
        self._last: tuple[int, float, float] | None = None
        """Step, begin and stall of the newest staged save; monotonic seconds."""
        self._stalls_s: deque[float] = deque(maxlen=RECENT_SAVES)
        self._steps_s: deque[float] = deque(maxlen=RECENT_SAVES)
        self._persists_s: deque[float] = deque(maxlen=RECENT_SAVES)
        self.num_staged = 0
        """Persisted saves that were staged in this session."""
        self.num_committed = 0
        """Those of them that are committed."""

    def begin(self) -> None:
        """Forget the session before. The times of persists stay, as the storage is the same."""
        self._last, self.num_staged, self.num_committed = None, 0, 0
        self._stalls_s.clear()
        self._steps_s.clear()

    def staged(self, step: int, began_s: float, stall_s: float) -> None:
        """Note a save that the last local rank has sealed: its step, its begin (monotonic seconds), its stall (0: not measured)."""
        self.num_staged += 1
        if self.num_staged == CALIBRATION_SAVES:
            self._stalls_s.clear()
        self._stalls_s.append(stall_s)
        if self._last is not None and step > self._last[0]:
            before, then_s, stalled_s = self._last
            self._steps_s.append(max(LEAST_STEP_S, (began_s - then_s - stalled_s) / (step - before)))
        self._last = step, began_s, stall_s

    def committed(self, persist_s: float) -> None:
        """Note a commit, `persist_s` seconds after its seal."""
        self.num_committed += 1
        self._persists_s.append(persist_s)

    def costs(self) -> Costs | None:
        """Return the costs. None: fewer than CALIBRATION_SAVES saves of this session were staged, or none is committed."""
        if self.num_staged < CALIBRATION_SAVES or not self._steps_s or not self._persists_s:
            return None
        return Costs(
            stall_s=statistics.median_high(self._stalls_s),
            persist_s=statistics.median_high(self._persists_s),
            step_s=statistics.median_low(self._steps_s),
        )
