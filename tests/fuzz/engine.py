"""
The whole of: running one target on many inputs, within its bounds of time and memory, and what was found.

Called from: `__main__`, in a process of its own for each target. The input that runs now lies in a file that is mapped into memory, so
that the parent has it when this process is killed by what it did.
Must never: go on after a finding as if nothing were; hide one behind another of the same place.
"""

import contextlib
import mmap
import os
import random
import resource
import signal
import struct
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from fuzz.mutate import LARGE_BYTES, Mutator
from fuzz.targets import Feed, Target

SLOW_S: Final = 1.0
"""Most processor time for one input: what other processes take of a busy machine does not count. A slower one is tried twice again."""
HUNG_S: Final = 30.0
"""After this, by the clock, an input is interrupted, where the interpreter still looks at signals."""
MEMORY_BYTES: Final = 512 << 20
"""Address space that a target may take beyond what it has when it begins: what asks for more gets a MemoryError, which no target
may raise."""
MAX_FINDINGS: Final = 12
"""Different findings after which a run ends: they have to be mended first."""
MAX_POOL: Final = 256
"""Inputs that others are made of, besides the corpus: those that were accepted, and not only refused."""
POOLED_BYTES: Final = 4096
POOLED_SHARE: Final = 0.02
"""Which accepted inputs go into the pool: short ones, and few, so that it changes slowly."""
_SHARES: Final = (5, 3, 2)
"""Of inputs that are made of a seed, of one in the pool, of one in the corpus."""
_HEADER: Final = struct.Struct("<QQ")
JOURNAL_BYTES: Final = _HEADER.size + LARGE_BYTES + 4096


class Hung(BaseException):
    """An input took longer than HUNG_S."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One input that a target did not take as it should."""

    target: str
    why: str
    """The error's class and place, or which bound was broken."""
    data: bytes

    @property
    def kind(self) -> str:
        """The class and the place: two inputs of one kind are one finding."""
        return self.why.split(": ")[0] + self.why.rsplit(" at ", 1)[-1]


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    target: str
    inputs: int = 0
    accepted: int = 0
    """Inputs that were taken, and not refused with the documented error: mutations that reach behind the first check."""
    elapsed_s: float = 0.0
    slowest_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)


class Journal:
    """The input that runs now, for whoever looks after this process has died."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            file.truncate(JOURNAL_BYTES)
            self._map = mmap.mmap(file.fileno(), JOURNAL_BYTES)

    def write(self, count: int, data: bytes) -> None:
        """Say what comes now."""
        self._map[: _HEADER.size] = _HEADER.pack(count, len(data))
        self._map[_HEADER.size : _HEADER.size + len(data)] = data

    def read(self) -> tuple[int, bytes]:
        """How many inputs came before, and the last one."""
        count, length = _HEADER.unpack(self._map[: _HEADER.size])
        return count, bytes(self._map[_HEADER.size : _HEADER.size + length])


def limit_memory() -> None:
    """Bound the address space of this process to MEMORY_BYTES more than it has."""
    has_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has_bytes + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def inputs(target: Target, corpus: Sequence[bytes], draw: random.Random, pool: list[bytes]) -> Iterator[bytes]:
    """The corpus as it is, then mutations of the seeds, of it and of the pool, without end."""
    yield from corpus
    mutator, seeds = Mutator(draw, target.words, target.split), target.seeds()
    while True:
        # What is right reaches furthest, and what was a finding has neighbours.
        among = draw.choices((seeds, pool or seeds, corpus), _SHARES)[0]
        yield mutator.mutate(draw.choice(among), draw.choice(corpus), is_json=target.is_json)


@contextlib.contextmanager
def alarms() -> Iterator[None]:
    """SIGALRM interrupts an input while this lasts."""
    before = signal.signal(signal.SIGALRM, _hung)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(target: Target, corpus: Sequence[bytes], *, runs: int, seed: int, journal: Journal | None = None) -> Outcome:
    """Feed `runs` inputs to a target, the corpus first. Blocks: for as long as they take; each for HUNG_S at most."""
    draw = random.Random(f"{seed}/{target.name}")
    outcome, pool, seen = Outcome(target.name), list[bytes](), set[str]()
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        feed = target.make(stack)
        stack.enter_context(alarms())
        for data in inputs(target, corpus, draw, pool):
            if outcome.inputs >= runs or len(outcome.findings) >= MAX_FINDINGS:
                break
            if journal is not None:
                journal.write(outcome.inputs, data)
            finding, is_accepted = judge(feed, target, data, outcome)
            if finding is not None and finding.kind not in seen:
                seen.add(finding.kind)
                outcome.findings.append(finding)
            outcome.accepted += is_accepted
            if is_accepted and len(data) < POOLED_BYTES and draw.random() < POOLED_SHARE:
                pool.append(data)
                if len(pool) > MAX_POOL:
                    del pool[draw.randrange(MAX_POOL)]
    outcome.elapsed_s = time.perf_counter() - begun
    return outcome


def judge(feed: Feed, target: Target, data: bytes, outcome: Outcome) -> tuple[Finding | None, bool]:
    """What an input is a finding for, if it is one, and whether it was accepted; counts it."""
    why, elapsed_s, is_accepted = _attempt(feed, target, data)
    if elapsed_s > SLOW_S or why.startswith("hung"):
        # Again, twice: the first time something may have been made that stays, or the whole process was stopped.
        again = [_attempt(feed, target, data) for _ in range(2)]
        least_s = min(elapsed_s, *(each[1] for each in again))
        why = f"slow: {least_s:.1f} s" if least_s > SLOW_S else again[-1][0]
    outcome.inputs += 1
    outcome.slowest_s = max(outcome.slowest_s, elapsed_s)
    return Finding(target.name, why, data) if why else None, is_accepted


def _attempt(feed: Feed, target: Target, data: bytes) -> tuple[str, float, bool]:
    """Why an input is a finding (empty: it is none), how long it took, and whether it was accepted."""
    why, is_accepted = "", False
    signal.setitimer(signal.ITIMER_REAL, HUNG_S)
    begun = time.process_time()
    try:
        feed(data)
        is_accepted = True
    except target.allowed:
        pass
    except Hung:
        why = f"hung: longer than {HUNG_S:.0f} s"
    except Exception as err:
        why = f"{type(err).__name__}: {str(err)[:200]} at {_place(err)}"
        err.__traceback__ = None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return why, time.process_time() - begun, is_accepted


def _place(err: BaseException) -> str:
    """File and line of the innermost frame of ours that is not a test's."""
    ours = [
        f"{os.path.basename(frame.filename)}:{frame.lineno}"
        for frame in traceback.extract_tb(err.__traceback__, limit=-60)
        if "/pillion" in frame.filename
    ]
    return ours[-1] if ours else "the target"


def _hung(number: int, frame: FrameType | None) -> None:
    raise Hung
