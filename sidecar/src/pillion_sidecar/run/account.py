"""
The account of a run: from the facts of its journal to the seconds of each kind, and to the goodput. Pure. docs/reference/goodput.md has the definition.

    wall = trained + retrained + stalled + waited + restoring + down

Called from: `pillion report`, the reports to the controller, and the metrics endpoint of the sidecar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pillion.wire import home
from pillion_sidecar.run.journal import Attempt, Journal, Load

NS: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """The begin of an attempt after another one: what it cost."""

    number: int
    began_ns: int
    step: int | None
    """The loaded step. None: nothing was loaded, as far as the journal knows."""
    tier: str
    down_s: float
    """Time without a trainer before it."""
    restoring_s: float
    lost_s: float | None
    """Training that this restart lost: what came after the save of the loaded step. None: nobody knows when that was."""
    lost_steps: int | None
    """The same in steps, by the pace of the saves before. None: the journal has too few saves to tell the pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What the time of a run went to, seconds. The kinds together are `wall_s`."""

    wall_s: float
    """From the begin of the first attempt until the last sign of life."""
    trained_s: float
    """Training that was kept."""
    retrained_s: float
    """Training that a restart or a load has lost: its steps are trained again."""
    stalled_s: float
    """Saves that held up training, while they copied."""
    waited_s: float
    """Saves that held up training, because storage had not freed a slot."""
    restoring_s: float
    """From the first trainer of an attempt to the end of its load; and later loads."""
    down_s: float
    """Between attempts."""
    attempts: int
    restarts: tuple[Restart, ...] = ()

    @property
    def goodput(self) -> float:
        """Share of the wall time that trained, 0 to 1."""
        return self.trained_s / self.wall_s if self.wall_s > 0 else 0.0

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each kind by its name in a report (`home.RUN_KINDS`), to the millisecond."""
        return {kind: round(getattr(self, f"{kind}_s"), 3) for kind in home.RUN_KINDS}


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A time in which an attempt trained, saves included."""

    attempt: int
    """Index of the attempt."""
    begin_ns: int
    end_ns: int
    load: Load | None
    """The load that the stretch begins with."""


def of(journal: Journal) -> Account:
    """Return the account of a journal. An empty journal has an account of zeros."""
    attempts = [attempt for attempt in journal.attempts if attempt.began_ns]
    if not attempts:
        return Account(
            wall_s=0.0,
            trained_s=0.0,
            retrained_s=0.0,
            stalled_s=0.0,
            waited_s=0.0,
            restoring_s=0.0,
            down_s=0.0,
            attempts=0,
        )
    ends = _ends(attempts)
    stretches = [each for index in range(len(attempts)) for each in _stretches(index, attempts[index], ends[index])]
    lost_ns, by_load = _lost(attempts, stretches, journal)
    trained = retrained = stalled = waited = restoring = 0.0
    for index, attempt in enumerate(attempts):
        active_s = sum(each.end_ns - each.begin_ns for each in stretches if each.attempt == index) * NS
        span_s = (ends[index] - attempt.began_ns) * NS
        held_s = attempt.stalled_s + attempt.waited_s
        share = min(1.0, active_s / held_s) if held_s > 0 else 1.0
        trains = 1.0 - held_s * share / active_s if active_s > 0 else 0.0
        again_s = (
            sum(lost for each, lost in zip(stretches, lost_ns, strict=True) if each.attempt == index) * NS * trains
        )
        stalled += attempt.stalled_s * share
        waited += attempt.waited_s * share
        retrained += again_s
        trained += active_s * trains - again_s
        restoring += span_s - active_s
    down = [max(0.0, (after.began_ns - end) * NS) for end, after in zip(ends, attempts[1:], strict=False)]
    return Account(
        wall_s=(ends[-1] - attempts[0].began_ns) * NS,
        trained_s=trained,
        retrained_s=retrained,
        stalled_s=stalled,
        waited_s=waited,
        restoring_s=restoring,
        down_s=sum(down),
        attempts=len(attempts) + journal.dropped,
        restarts=tuple(
            _restart(index, attempts, ends, down[index - 1], by_load, journal) for index in range(1, len(attempts))
        ),
    )


def _ends(attempts: Sequence[Attempt]) -> list[int]:
    """Return the end of each attempt. Clocks of machines differ: an attempt ends at the latest when the next one begins."""
    ends = []
    for index, attempt in enumerate(attempts):
        end = max(attempt.seen_ns, attempt.began_ns)
        if index + 1 < len(attempts):
            end = max(attempt.began_ns, min(end, attempts[index + 1].began_ns))
        ends.append(end)
    return ends


def _stretches(index: int, attempt: Attempt, end_ns: int) -> list[_Stretch]:
    """Return the stretches of an attempt. Its first load counts from the begin of the attempt on."""
    found: list[_Stretch] = []
    begin_ns, load = attempt.began_ns, None
    for position, each in enumerate(attempt.loads):
        if position:
            found.append(_Stretch(index, begin_ns, max(begin_ns, min(each.began_ns, end_ns)), load))
        begin_ns, load = max(begin_ns, min(each.ended_ns, end_ns)), each
    return [*found, _Stretch(index, begin_ns, max(begin_ns, end_ns), load)]


def _lost(
    attempts: Sequence[Attempt], stretches: Sequence[_Stretch], journal: Journal
) -> tuple[list[int], dict[int, int]]:
    """
    Return what is lost of each stretch, and what each load has lost, in nanoseconds. Pure.

    A load loses what was trained after the save of the loaded step, and before the load, if no later load has lost it already.

    Returns:
        Lost time by stretch; and index of the stretch -> what the load at its begin has lost. A load of which nobody knows is missing.
    """
    lost = [0] * len(stretches)
    by_load: dict[int, int] = {}
    for index, stretch in enumerate(stretches):
        cut_ns = _cut(stretch.load, is_first=index == 0, journal=journal)
        if cut_ns is None:
            continue
        total = 0
        for before in reversed(range(index)):
            if stretches[before].end_ns <= cut_ns:
                break  # stretches are in the order of time, so no earlier one reaches the cut
            kept_until = stretches[before].end_ns - lost[before]
            more = max(0, kept_until - max(cut_ns, stretches[before].begin_ns))
            lost[before] += more
            total += more
        by_load[index] = total
    return lost, by_load


def _cut(load: Load | None, *, is_first: bool, journal: Journal) -> int | None:
    """Return the time after which training is lost by a load. None: nothing is, or nobody knows."""
    if load is None or is_first:
        return None
    if load.step < 0:
        return 0  # there was nothing to load: all that was trained before is lost
    if load.saved_ns:
        return load.saved_ns
    return next(
        (save.began_ns for save in reversed(journal.saves) if save.step == load.step and save.began_ns < load.began_ns),
        None,
    )


def _restart(
    index: int,
    attempts: Sequence[Attempt],
    ends: Sequence[int],
    down_s: float,
    by_load: dict[int, int],
    journal: Journal,
) -> Restart:
    attempt = attempts[index]
    load = attempt.loads[0] if attempt.loads else None
    position = sum(max(1, len(each.loads)) for each in attempts[:index])
    lost_ns = by_load.get(position)
    lost_s = None if lost_ns is None else lost_ns * NS
    pace = pace_of(journal, attempts[index - 1].number)
    first_ns = min(load.ended_ns, ends[index]) if load is not None else attempt.began_ns
    return Restart(
        number=attempt.number,
        began_ns=attempt.began_ns,
        step=None if load is None or load.step < 0 else load.step,
        tier="" if load is None else load.tier,
        down_s=down_s,
        restoring_s=max(0, first_ns - attempt.began_ns) * NS,
        lost_s=lost_s,
        lost_steps=None if lost_s is None or pace is None else math.floor(lost_s * pace),
    )


def pace_of(journal: Journal, number: int) -> float | None:
    """Return the steps a second between the first and the last save of an attempt. None: the journal does not have two. Pure."""
    saves = sorted((each for each in journal.saves if each.number == number), key=lambda each: each.began_ns)
    if len(saves) < 2:
        return None
    seconds = (saves[-1].began_ns - saves[0].began_ns) * NS
    steps = saves[-1].step - saves[0].step
    return steps / seconds if seconds > 0 and steps > 0 else None
