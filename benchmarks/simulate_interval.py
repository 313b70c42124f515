"""
The automatic interval against fixed ones: the goodput of a simulated training, with the formula that sidecars use.

    python benchmarks/simulate_interval.py [--seeds N] [--days N]

The model. A training needs some days of steps. A save holds it up for the stall; its persist runs beside training, and the next save waits until
the persist before has ended. Failures come at random (exponential times between them). A failure costs the time of a restart, and the work since
the last save that was committed. Goodput is the needed time, divided by the time that it took.
The automatic interval knows nothing of the failures: it begins with the assumed rate, counts what it sees, measures stalls that scatter by
`NOISE`, and changes its period at commits only, as a sidecar does. `fixed best` is the best of a grid of fixed periods, found afterwards.
The seeds are fixed, so the table is the same each time.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pillion_sidecar import interval

STEP_S: Final = 2.0
"""Time of a step, seconds."""
RESTART_S: Final = 300.0
"""Time from a failure until training goes on, seconds: pods that start, and a load."""
NOISE: Final = 0.2
"""Scatter of the stalls and persists, as a share of their mean."""
WORLD_SIZE: Final = 64
HOUR_S: Final = 3600.0
FIXED_S: Final = (60.0, 300.0, 900.0, 3600.0)
"""The fixed periods of the table, seconds."""
GRID_S: Final = tuple(20.0 * 1.5**power for power in range(16))
"""The fixed periods among which the best one is searched, from 20 s to 2.4 hours."""
MTBFS_S: Final = (0.5 * HOUR_S, 3 * HOUR_S, 24 * HOUR_S, 240 * HOUR_S)
SAVES_S: Final = ((0.2, 10.0), (2.0, 60.0), (10.0, 300.0))
"""Stall and persist of a save, seconds: some GB to a local disk, a large state to a fast bucket, a very large one to a slow volume."""
LONGEST: Final = 4
"""Multiple of the needed time after which a training is given up: a period much above the time between failures makes no progress."""
BOUNDS: Final = interval.Bounds(overhead_percent=1, max_s=HOUR_S)
"""The defaults of `trigger.auto`."""


@dataclass(frozen=True)
class World:
    """What a training meets."""

    mtbf_s: float
    stall_s: float
    persist_s: float
    work_s: float
    """Time of the steps that it needs."""


class Auto:
    """The automatic interval of one training. See `pillion_sidecar.supervisor.pacing`, which does the same with what it measures."""

    def __init__(self) -> None:
        self.history = interval.History()
        self.measured = interval.Measurements()
        self.chosen: interval.Interval | None = None

    def period_steps(self) -> int:
        return self.chosen.steps if self.chosen is not None else 2

    def look(self) -> None:
        costs = self.measured.costs()
        if costs is None and self.chosen is not None:
            costs = self.chosen.costs
        if costs is not None:
            self.chosen = interval.steady(self.chosen, interval.choose(costs, self.history, WORLD_SIZE, BOUNDS), BOUNDS)


class Fixed:
    """A fixed period."""

    def __init__(self, seconds: float) -> None:
        self._steps = max(1, round(seconds / STEP_S))

    def period_steps(self) -> int:
        return self._steps


def goodput(world: World, policy: Auto | Fixed, seed: int) -> float:
    """Return the share of the time that became progress, between 0 and 1."""
    failures, scatter = random.Random(f"failures {seed}"), random.Random(f"scatter {seed}")
    auto = policy if isinstance(policy, Auto) else None
    needed = math.ceil(world.work_s / STEP_S)
    now_s, step, stored = 0.0, 0, 0
    fails_s = failures.expovariate(1 / world.mtbf_s)
    while step < needed and now_s < LONGEST * world.work_s:
        persisting: tuple[int, float] | None = None
        began_s = now_s
        if auto is not None:
            auto.measured.begin()
        while step < needed:
            num_steps = policy.period_steps()
            if auto is not None and auto.chosen is None and persisting is not None:
                # A save that is to be measured is asked for when the one before is committed.
                num_steps += math.ceil(max(0.0, persisting[1] - now_s) / STEP_S)
            target = min(needed, step + num_steps)
            at_s = now_s + (target - step) * STEP_S
            stall_s, persist_s = (
                each * scatter.uniform(1 - NOISE, 1 + NOISE) for each in (world.stall_s, world.persist_s)
            )
            own_s = stall_s
            if persisting is not None:
                stall_s += max(0.0, persisting[1] - at_s)
            if persisting is not None and persisting[1] <= min(fails_s, at_s + stall_s):
                stored, persisting = persisting[0], None
            if at_s + stall_s >= fails_s:
                break
            now_s, step = at_s + stall_s, target
            persisting = step, now_s + persist_s
            if auto is not None:
                auto.measured.staged(step, now_s - own_s, own_s)
                auto.measured.committed(persist_s)
                auto.history, began_s = auto.history.trained(now_s - began_s), now_s
                auto.look()
        else:
            break
        if auto is not None:
            auto.history = auto.history.trained(fails_s - began_s).failed()
            auto.look()
        step, now_s = stored, fails_s + RESTART_S
        fails_s = now_s + failures.expovariate(1 / world.mtbf_s)
    return step * STEP_S / now_s


def mean(world: World, seeds: int, seconds: float | None) -> float:
    """Return the mean goodput of a period over the seeds. None: the automatic interval."""
    return statistics.fmean(
        goodput(world, Auto() if seconds is None else Fixed(seconds), seed) for seed in range(seeds)
    )


def last_period_s(world: World) -> float:
    """Return the period that the automatic interval ends with, for the first seed."""
    auto = Auto()
    goodput(world, auto, 0)
    return auto.period_steps() * STEP_S


def rows(seeds: int, days: float) -> Iterator[str]:
    """Return the lines of the table."""
    yield (
        "| a failure each | stall, persist | auto | "
        + " | ".join(f"{interval.span(each)}" for each in FIXED_S)
        + " | fixed best |"
    )
    yield "|---|---|---|" + "---|" * (len(FIXED_S) + 1)
    for mtbf_s in MTBFS_S:
        for stall_s, persist_s in SAVES_S:
            world = World(mtbf_s, stall_s, persist_s, days * 24 * HOUR_S)
            best_s, best = max(((each, mean(world, seeds, each)) for each in GRID_S), key=lambda each: each[1])
            cells = [
                f"**{mean(world, seeds, None):.2%}** ({interval.span(last_period_s(world))})",
                *(f"{mean(world, seeds, each):.2%}" for each in FIXED_S),
                f"{best:.2%} ({interval.span(best_s)})",
            ]
            yield f"| {mtbf_s / HOUR_S:g} h | {stall_s:g} s, {persist_s:g} s | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="The automatic interval against fixed ones, simulated.")
    parser.add_argument("--seeds", type=int, default=20, help="trainings a cell")
    parser.add_argument("--days", type=float, default=20.0, help="time of the steps that a training needs")
    arguments = parser.parse_args()
    for line in rows(arguments.seeds, arguments.days):
        print(line, flush=True)


if __name__ == "__main__":
    main()
