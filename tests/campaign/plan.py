"""
The whole of: what happens to a run of the campaign, drawn from its seed. Pure.

Called from: `campaign.runs`.
Must never: depend on anything but the seed; a run is repeated by its number.
"""

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pillion.fault_points import FaultPoint
from pillion.testing.faults import Fault, Kind

TWO_PODS_SHARE: Final = 0.1
"""Of the runs: they take three times as long, as their executors import torch."""
EARLY_SHARE: Final = 0.2
"""Of the strikes: at a random time while the job starts, loads, or starts again."""
MAX_EARLY_S: Final = 3.0
MAX_LATE_S: Final = 0.05
"""Of the others: a few steps at most behind a random step. Not by the clock alone, as a loaded machine would strike before the start."""
LAST_STEP: Final = 98
STUCK_SHARE: Final = 0.3
ROLLED_BACK_SHARE: Final = 0.2
ROLLED_BACK: Final = (25, 75)
"""Between these steps, so that something is committed before, and something comes behind."""
MAX_PAUSE_S: Final = 1.5


class Strike(StrEnum):
    """What is done from outside, at a random time."""

    KILL_TRAINER = "trainer SIGKILL"
    SEGV_TRAINER = "trainer SIGSEGV"
    STOP_TRAINER = "trainer SIGSTOP, then SIGCONT"
    KILL_SIDECAR = "sidecar SIGKILL"
    STOP_SIDECAR = "sidecar SIGSTOP, then SIGCONT"
    KILL_EXECUTOR = "executor SIGKILL"
    STOP_EXECUTOR = "executor SIGSTOP, then SIGCONT"
    KILL_BOTH = "sidecar and its executor SIGKILL"
    KILL_POD = "pod lost with its memory: agent, trainers, sidecar, arena"
    KILL_JOB = "all trainers and agents SIGKILL, pods stay"
    LOSE_JOB = "all pods lost with their memory"


class Inside(StrEnum):
    """What is done by the fault kit, at a random phase."""

    NONE = "none"
    REFUSED = "storage refuses (EIO, ENOSPC), up to four times"
    SLOW = "storage is slow"
    STUCK = "storage never returns"
    TORN = "SIGKILL in the middle of a write"
    DIES = "executor dies at a phase"


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One strike."""

    at_step: int
    """Strike when rank 0 has gone so far; 0: at once."""
    delay_s: float
    """And this long afterwards."""
    strike: Strike
    rank: int
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run."""

    seed: int
    pods: int
    acts: tuple[Act, ...]
    inside: Inside
    faults: tuple[Fault, ...]
    stuck: bool
    """A worker of a data loader is stuck."""
    rollback_at: int
    """The job goes back to an older step there, once; 0: never."""


def draw(seed: int) -> Plan:
    """The run of this seed."""
    dice = random.Random(seed)
    pods = 2 if dice.random() < TWO_PODS_SHARE else 1
    strikes = [each for each in Strike if pods == 2 or each is not Strike.KILL_POD]
    acts = sorted((_act(strikes, dice) for _ in range(dice.choice((1, 1, 1, 2, 3)))), key=lambda act: act.at_step)
    inside = dice.choice([Inside.NONE, Inside.NONE, Inside.NONE, *list(Inside)[1:]])
    struck = _faults(inside, dice)
    stuck = dice.random() < STUCK_SHARE
    rollback_at = dice.randint(*ROLLED_BACK) if dice.random() < ROLLED_BACK_SHARE else 0
    return Plan(
        seed=seed, pods=pods, acts=tuple(acts), inside=inside, faults=struck, stuck=stuck, rollback_at=rollback_at
    )


def _act(strikes: list[Strike], dice: random.Random) -> Act:
    early = dice.random() < EARLY_SHARE
    return Act(
        at_step=0 if early else dice.randint(1, LAST_STEP),
        delay_s=dice.uniform(0.0, MAX_EARLY_S if early else MAX_LATE_S),
        strike=dice.choice(strikes),
        rank=dice.randrange(2),
        pause_s=dice.uniform(0.05, MAX_PAUSE_S),
    )


def _faults(inside: Inside, dice: random.Random) -> tuple[Fault, ...]:
    step = dice.choice([None, 10, 20, 30, 40, 50])
    writing = dice.choice((FaultPoint.WRITE, FaultPoint.FSYNC, FaultPoint.COMMIT, FaultPoint.PUBLISH))
    data = dice.choice((FaultPoint.WRITE, FaultPoint.FSYNC))
    anywhere = dice.choice(
        (
            FaultPoint.PLAN,
            FaultPoint.WRITE,
            FaultPoint.FSYNC,
            FaultPoint.REPORT,
            FaultPoint.COMMIT,
            FaultPoint.PUBLISH,
            FaultPoint.RETAIN,
        )
    )
    if inside is Inside.REFUSED:
        kind = dice.choice((Kind.EIO, Kind.ENOSPC))
        return (Fault(phase=writing, kind=kind, step=step, times=dice.randint(1, 4)),)
    if inside is Inside.SLOW:
        return (Fault(phase=data, kind=Kind.SLOW, step=step, times=3, seconds=0.7),)
    if inside is Inside.STUCK:
        return (Fault(phase=writing, kind=Kind.STUCK, step=step),)
    if inside is Inside.TORN:
        return (Fault(phase=data, kind=Kind.TORN, step=step),)
    if inside is Inside.DIES:
        return (Fault(phase=anywhere, kind=dice.choice((Kind.SIGKILL, Kind.SIGSEGV)), step=step),)
    return ()
