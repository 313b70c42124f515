"""
What every benchmark here shares: one measured line, a state to save, and a session that leaves nothing behind.

Called from: the other modules of this folder. A module measures a thing and its floor in turn, in one process, and gives
`Line`s; `run.py` prints them. It must never compare seconds of different runs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import floors
import torch

import pillion
from pillion import session

SAVE_TIMEOUT_S = 600.0
MAX_SHOWN_BYTES = 20_000
"""Maximum of the standard error of a failed benchmark that is shown, its end: some two hundred lines."""
SIDECAR_GONE_S = 60.0
"""Bound for an embedded sidecar to end after its trainer has closed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    num_bytes: int
    repeat: int
    directory: Path


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table. `goal` None: for the record, no goal was set."""

    what: str
    measured: float
    unit: str = ""
    goal: float | None = None
    sense: Literal["<=", ">="] = "<="
    samples: Sequence[float] = field(default_factory=tuple)
    note: str = ""
    group: str = ""
    """The benchmark that it is of. `run.py` writes it."""

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        met = self.measured <= self.goal if self.sense == "<=" else self.measured >= self.goal
        return "met" if met else "MISSED"


def median_line(what: str, samples: Sequence[float], **more: Any) -> Line:
    return Line(what=what, measured=statistics.median(samples), samples=tuple(samples), **more)


def state(num_bytes: int, num_tensors: int) -> dict[str, Any]:
    """float32 tensors of equal size, and one hyperparameter."""
    numel = num_bytes // num_tensors // 4
    return {"model": {f"layer.{i}.weight": torch.randn(numel) for i in range(num_tensors)}, "optimizer": {"lr": 0.1}}


@contextlib.contextmanager
def scratch(of: Settings) -> Iterator[Path]:
    """A directory on the disk that is measured; gone at the end."""
    path = Path(tempfile.mkdtemp(prefix="pillion-bench-", dir=of.directory))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keep what this process and its children write to standard error: DCP's background process logs each request. It is shown if the benchmark fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:  # shown, and raised again
            sys.stderr.flush()
            said.seek(0)
            os.write(kept, said.read()[-MAX_SHOWN_BYTES:])
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def checkpointer(root: Path, *, keep_last: int = 1) -> Iterator[pillion.Checkpointer]:
    """A run without a cluster, with a sidecar of its own. Blocks, at the end: until that is gone, and its arena with it."""
    with pillion.Checkpointer(root, policy={"retention": {"keepLast": keep_last}}) as made:
        yield made
    deadline_s = time.monotonic() + SIDECAR_GONE_S
    while os.path.exists(made._session.runtime_dir):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the sidecar of {root} is not gone after {SIDECAR_GONE_S:.0f} s")
        time.sleep(0.02)


def prepare(of: pillion.Checkpointer, state_dict: dict[str, Any]) -> None:
    """Load (there is nothing yet), which prepares the arena, and wait for it, as a trainer's first steps would."""
    of.load(state_dict)
    of._saver.join(session.RESERVE_TIMEOUT_S)


@contextlib.contextmanager
def busy_gil(wanted: bool) -> Iterator[None]:
    """A second Python thread that never gives the GIL up by itself."""
    stop = threading.Event()

    def spin() -> None:
        count = 0
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=spin, name="bench-spin", daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if wanted:
            thread.join()


def private_memory(num_bytes: int) -> memoryview:
    """Touched private memory, as a trainer's tensors live in: the source of a copy's floor."""
    view = memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    block = os.urandom(1 << 20)
    for start in range(0, num_bytes, len(block)):
        view[start : start + len(block)] = block[: num_bytes - start]
    return view


def copy_floor_s(target: memoryview, source: memoryview) -> float:
    """The better of memmove and `Tensor.copy_`, with as many threads as torch uses here."""
    return min(floors.memcpy_s(target, source, torch.get_num_threads()), floors.torch_copy_s(target, source))


def seconds(act: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    act()
    return time.perf_counter() - begin_s
