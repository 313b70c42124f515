"""
The whole of: the cells of the matrix, each a fault at a phase of a save or load, and what may come of it.

Called from: tests/distributed/test_matrix.py and test_stories.py (run them), tools/reliability.py (writes them down), tests/unit/docs (compares the two).
Must never: hold a cell that cannot happen, or leave one out that can; what is left out is named in `LEFT_OUT`, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pillion.fault_points import FaultPoint
from pillion.testing.faults import Kind

OUTCOMES: Final = Path(__file__).with_name("matrix_outcomes.txt")
LEFT_OUT: Final = {
    "plan, report x storage faults": "nothing is written there",
    "commit, publish, retain x peers": "the coordinator alone gets there",
    "claim x executor": "it has no part in it",
    "OOM kill": "is SIGKILL to the process; for real, by a cgroup, on the cluster (tests/cluster/test_oom.py)",
    "load, rescue x trainer": "it waits for the one, and is dead in the other",
    "torn, cut, flip x other phases": "only data files are large enough to be torn; small files are replaced by rename",
}


class Who(StrEnum):
    """Whose fault it is."""

    TRAINER = "trainer"
    SUPERVISOR = "supervisor"
    EXECUTOR = "executor"
    STORE = "store"
    """The process that hosts the job's store: rank 0's, or torchrun's agent."""
    NETWORK = "network"
    """The link between one pod and all others, the store among them."""


class Where(StrEnum):
    """In which pod it is reached, and struck unless `of` says another."""

    COORDINATOR = "coordinator"
    PEER = "peer"


class Outcome(StrEnum):
    """The outcome of a save, or of the checkpoint that a load took."""

    COMMITTED = "committed"
    """Loadable bit for bit by stock DCP."""
    ABSENT = "absent"
    """And the one before is whole."""
    REFUSED = "refused"
    """Committed by storage that lied; a load refuses it and takes the one before."""


class Deed(StrEnum):
    """The deed of a test while a process is held at a fault point."""

    NONE = ""
    KILL = "SIGKILL"
    LOSE = "lost"
    """The store's process is killed."""
    SILENCE = "silent"
    """It is stopped: it takes questions and answers none."""
    CUT = "cut"
    """Packets are lost, from now on."""
    INTERRUPT = "interrupted"
    """Packets are lost, for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One fault at one phase."""

    phase: FaultPoint
    where: Where
    who: Who
    kind: Kind
    deed: Deed = Deed.NONE
    """For `Kind.HOLD`: what is done to `who` meanwhile."""
    of: Where | None = None
    """For a deed: whose pod's; None: the one that is held."""
    times: int = 1
    seconds: float = 0.0

    @property
    def fault(self) -> str:
        """In words."""
        if self.deed is not Deed.NONE:
            whose = "" if self.who is Who.STORE else f" {(self.of or self.where).value}'s"
            return f"{self.deed.value}{whose} {self.who.value}"
        return self.kind.value + (f" x{self.times}" if self.times > 1 else "")

    @property
    def name(self) -> str:
        text = f"{self.phase.value}-{self.where.value}-{self.who.value}-{self.fault}"
        return text.replace(" ", "-").replace("'s", "")

    @property
    def rank(self) -> int:
        """Whose process reaches the point."""
        return 0 if self.where is Where.COORDINATOR else 1

    @property
    def row(self) -> str:
        """In the table of the page: whose fault, in words."""
        return self.fault if self.deed is not Deed.NONE else f"{self.who.value} {self.fault}"

    @property
    def kills_a_trainer(self) -> bool:
        own = self.who is Who.TRAINER and self.kind in (Kind.SIGKILL, Kind.SIGSEGV)
        return own or (self.who is Who.TRAINER and self.deed is Deed.KILL)


class Story(StrEnum):
    """The story of training or its machine around a save. Each has a letter, like a cell."""

    AGAIN_REFUSED = "again-executor-EIO-x4"
    """An older step is loaded, and a committed one saved again: storage refuses it each time."""
    AGAIN_DIES = "again-executor-SIGKILL-x2"
    """The same, and two executors die of it."""
    FOREIGN = "foreign-files"
    """Others have files in the root, and in directories of steps that retention removes."""
    SHORT_SUPERVISOR = "descriptors-supervisor"
    """The executor dies while the supervisor has no descriptor for another one."""
    SHORT_TRAINER = "descriptors-trainer"
    """The supervisor dies while the trainer has no descriptor for another one."""
    FORKED = "forked-child-trainer-SIGKILL"
    """The trainers are killed, and what they forked lives on."""
    SLOW_RETENTION = "retain-slow-6-s"
    """A deletion takes longer than the bound for storage."""
    SLOW_CALLBACK = "callback-slow"
    """A callback of a commit takes longer than the saves that follow."""


LETTERS: Final = {"C": Outcome.COMMITTED, "A": Outcome.ABSENT, "R": Outcome.REFUSED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The expected results of one cell."""

    outcomes: frozenset[Outcome]
    reason: str
    """Why there is more than one; empty where there is one."""


def expected() -> dict[str, Expected]:
    """The outcomes of every cell, by its name, as `matrix_outcomes.txt` has them."""
    found = {}
    for line in OUTCOMES.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, letters, *reason = line.split(" ", 2)
            found[name] = Expected(outcomes=frozenset(LETTERS[each] for each in letters), reason="".join(reason))
    return found


SIGNALS: Final = (Kind.SIGKILL, Kind.SIGSEGV, Kind.SIGSTOP)
REFUSALS: Final = (Kind.ENOSPC, Kind.EIO)
SLOW_S: Final = 1.0
PERSISTENT: Final = 4
"""As many attempts as one save gets."""

EVERY_POD: Final = (FaultPoint.PLAN, FaultPoint.WRITE, FaultPoint.FSYNC, FaultPoint.REPORT)
COORDINATORS: Final = (FaultPoint.COMMIT, FaultPoint.PUBLISH, FaultPoint.RETAIN)


def cells() -> Iterator[Cell]:
    """All of them."""
    for where in Where:
        for phase in (FaultPoint.STAGE, FaultPoint.SEAL):
            for kind in SIGNALS:
                yield Cell(phase=phase, where=where, who=Who.TRAINER, kind=kind)
        for kind in SIGNALS:
            yield Cell(phase=FaultPoint.CLAIM, where=where, who=Who.SUPERVISOR, kind=kind)
        yield Cell(phase=FaultPoint.CLAIM, where=where, who=Who.SUPERVISOR, kind=Kind.CLOCK)
        yield Cell(phase=FaultPoint.SEAL, where=where, who=Who.TRAINER, kind=Kind.CLOCK)
    for phase in (*EVERY_POD, FaultPoint.LOAD):
        for where in Where:
            yield from _executor(phase, where)
            yield from _deeds(phase, where)
    for phase in COORDINATORS:
        yield from _executor(phase, Where.COORDINATOR)
        yield from _deeds(phase, Where.COORDINATOR)
    for where in Where:
        yield from _executor(FaultPoint.RESCUE, where)
        yield from _deeds(FaultPoint.RESCUE, where)


def sample() -> Iterator[Cell]:
    """Some of them, with every phase and every fault at least once: for `make test`. `make matrix` runs all."""
    phases: set[FaultPoint] = set()
    faults: set[str] = set()
    for cell in cells():
        fault = f"{cell.who.value} {cell.kind.value} {cell.deed.value} {cell.times}"
        if cell.phase not in phases or fault not in faults:
            phases.add(cell.phase)
            faults.add(fault)
            yield cell


ON_FILE_SYSTEMS: Final = (
    "write-peer-executor-torn",
    "fsync-coordinator-executor-cut",
    "fsync-peer-executor-flip",
    "publish-coordinator-executor-SIGKILL",
    "retain-coordinator-executor-SIGKILL",
)
"""Cells in which it matters what the file system does: a write that is cut short or lost, names that a death leaves half changed."""


def selected(choice: str) -> list[Cell]:
    """
    Return the cells of a choice: `all`, `file-systems`; empty: the sample.

    Raises:
        ValueError: there is no such choice.
    """
    if choice == "file-systems":
        return [cell for cell in cells() if cell.name in ON_FILE_SYSTEMS]
    if choice not in ("", "all"):
        raise ValueError(f"PILLION_MATRIX={choice!r}: all, file-systems, or empty for a sample")
    return list(cells() if choice else sample())


def _executor(phase: FaultPoint, where: Where) -> Iterator[Cell]:
    for kind in SIGNALS:
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=kind)
    writes = phase in (FaultPoint.WRITE, FaultPoint.FSYNC, *COORDINATORS)
    if writes:
        for kind in REFUSALS:
            yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=kind)
    if writes or phase is FaultPoint.LOAD:
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=Kind.SLOW, seconds=SLOW_S)
    if phase in (FaultPoint.WRITE, FaultPoint.FSYNC, FaultPoint.COMMIT, FaultPoint.PUBLISH):
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=Kind.STUCK)
    if phase is FaultPoint.WRITE:
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=Kind.EIO, times=PERSISTENT)
    if phase in (FaultPoint.WRITE, FaultPoint.FSYNC):
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=Kind.TORN)
    if phase is FaultPoint.FSYNC:
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=Kind.CUT)
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=Kind.FLIP)
    if phase is FaultPoint.COMMIT:
        yield Cell(phase=phase, where=where, who=Who.EXECUTOR, kind=Kind.CLOCK)


def _deeds(phase: FaultPoint, where: Where) -> Iterator[Cell]:
    held: dict[str, Any] = {"phase": phase, "where": where, "kind": Kind.HOLD}
    if phase not in (FaultPoint.LOAD, FaultPoint.RESCUE):
        for of in Where:
            yield Cell(who=Who.TRAINER, deed=Deed.KILL, of=of, **held)
    for of in Where:
        yield Cell(who=Who.SUPERVISOR, deed=Deed.KILL, of=of, **held)
    other = Where.PEER if where is Where.COORDINATOR else Where.COORDINATOR
    yield Cell(who=Who.EXECUTOR, deed=Deed.KILL, of=other, **held)
    if where is Where.COORDINATOR or phase in (FaultPoint.REPORT, FaultPoint.LOAD, FaultPoint.RESCUE):
        yield Cell(who=Who.STORE, deed=Deed.LOSE, **held)
        yield Cell(who=Who.STORE, deed=Deed.SILENCE, **held)
    if where is Where.COORDINATOR:
        for of in Where:
            yield Cell(who=Who.NETWORK, deed=Deed.CUT, of=of, **held)
            yield Cell(who=Who.NETWORK, deed=Deed.INTERRUPT, of=of, **held)
