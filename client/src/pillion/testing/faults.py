"""
The fault kit: faults at named phases, for tests of this product and of jobs that use it. Off unless PILLION_FAULTS asks for them.

    faults = [fail_at(rank=1, phase=FaultPoint.WRITE, fault=Kind.SIGKILL, step=20)]
    environment = to_environment(folder, faults)      # for the trainers; their sidecars inherit it
    ...
    hits(folder)                                      # what really happened: a fault that never struck proves nothing

Called from: `pillion.fault_points`, at import, in every process whose environment asks for faults. The chart never sets it.
Must never: strike when it was not asked to, or more often than it was asked to, whatever restarts in between: each strike claims a
file in `folder` first.

A fault strikes the process that reaches the point. What strikes another one (a dead coordinator at the write of a peer, a lost
store, a cut network) is a `HOLD`: the process waits at the point until a test, told by the file, has done the deed.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pillion import fault_points
from pillion.fault_points import FaultPoint
from pillion.wire import names

HOLD_LIMIT_S: Final = 120.0
"""Bound for a HOLD that nobody ends: the process goes on, and the test finds out by its own bound."""
HOLD_POLL_S: Final = 0.005
STUCK_S: Final = 3600.0
"""How long a storage call that never returns takes: longer than any bound of the product."""
CLOCK_JUMP_S: Final = -7200.0
"""Two hours back: what a node does whose clock was never set before."""


class Kind(StrEnum):
    """What happens at the point."""

    SIGKILL = "SIGKILL"
    SIGSTOP = "SIGSTOP"
    """Stopped, until somebody sends SIGCONT."""
    SIGSEGV = "SIGSEGV"
    ENOSPC = "ENOSPC"
    EIO = "EIO"
    SLOW = "slow"
    """The call takes `seconds`, and succeeds."""
    STUCK = "stuck"
    """The call never returns."""
    TORN = "torn"
    """Half of the file is there, and the process dies: a crash in the middle of a write."""
    CUT = "cut"
    """Half of the file is there, and every call reported success: storage that lies."""
    FLIP = "flip"
    """One bit of the file is another, and every call reported success."""
    HOLD = "hold"
    """Wait for the test: see the module."""
    CLOCK = "clock"
    """The wall clock of this process jumps by `seconds` (default: CLOCK_JUMP_S)."""


_SIGNALS: Final = {
    Kind.SIGKILL: signal.SIGKILL,
    Kind.SIGSTOP: signal.SIGSTOP,
    Kind.SIGSEGV: signal.SIGSEGV,
}
_ERRORS: Final = {Kind.ENOSPC: errno.ENOSPC, Kind.EIO: errno.EIO}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, to strike up to `times` times."""

    phase: FaultPoint
    kind: Kind
    rank: int | None = None
    """Which rank's process: a trainer's own, or the sidecar that serves it. None: whoever comes first."""
    step: int | None = None
    """At which step; None: the first that comes."""
    times: int = 1
    seconds: float = 0.0
    """For SLOW and CLOCK."""


def fail_at(
    *,
    phase: FaultPoint,
    fault: Kind,
    rank: int | None = None,
    step: int | None = None,
    times: int = 1,
    seconds: float = 0.0,
) -> Fault:
    """A fault, as a test reads it: ``fail_at(rank=1, phase=FaultPoint.WRITE, fault=Kind.SIGKILL)``."""
    return Fault(phase=phase, kind=fault, rank=rank, step=step, times=times, seconds=seconds)


def to_environment(folder: str | os.PathLike[str], faults: Iterable[Fault]) -> dict[str, str]:
    """The variable that asks for these faults; `folder` holds what has struck, and is empty at first."""
    listed = [
        {
            "phase": fault.phase.value,
            "fault": fault.kind.value,
            "rank": fault.rank,
            "step": fault.step,
            "times": fault.times,
            "seconds": fault.seconds,
        }
        for fault in faults
    ]
    return {names.ENV_FAULTS: json.dumps({"folder": os.fspath(folder), "faults": listed})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One strike."""

    index: int
    """Of the fault, in the order they were asked for."""
    pid: int
    step: int | None
    path: str


def hits(folder: str | os.PathLike[str]) -> list[Hit]:
    """What has struck so far, by fault. A strike that is being written down at this moment is not in it yet."""
    struck = []
    for file in sorted(Path(folder).glob("*.hit")):
        text = file.read_text()
        if text.endswith("\n"):
            document = json.loads(text)
            struck.append(
                Hit(
                    index=int(file.name.split(".")[0]),
                    pid=document["pid"],
                    step=document["step"],
                    path=document["path"],
                )
            )
    return struck


def release(folder: str | os.PathLike[str], index: int = 0) -> None:
    """End every HOLD of a fault."""
    (Path(folder) / f"{index}.go").touch()


class BadFaults(ValueError):
    """PILLION_FAULTS cannot be read; the text says where and what is allowed."""


def parse(text: str) -> tuple[Path, list[Fault]]:
    """
    Read the variable.

    Raises:
        BadFaults.
    """
    try:
        document: Mapping[str, Any] = json.loads(text)
        folder = Path(document["folder"])
        faults = [
            Fault(
                phase=FaultPoint(entry["phase"]),
                kind=Kind(entry["fault"]),
                rank=entry.get("rank"),
                step=entry.get("step"),
                times=int(entry.get("times", 1)),
                seconds=float(entry.get("seconds", 0.0)),
            )
            for entry in document["faults"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        allowed = f"phases {', '.join(FaultPoint)}; faults {', '.join(Kind)}"
        raise BadFaults(f"{names.ENV_FAULTS}={text!r}: {err!r}; allowed are {allowed}") from err
    if not folder.is_dir():
        raise BadFaults(f"{names.ENV_FAULTS}: there is no folder {folder}")
    return folder, faults


def arm() -> None:
    """
    Watch every point of this process for the faults of its environment; for none when it asks for none.

    Raises:
        BadFaults.
    """
    text = os.environ.get(names.ENV_FAULTS)
    fault_points.observe(_Armed(*parse(text)) if text else None)


class _Armed:
    """The observer."""

    def __init__(self, folder: Path, faults: list[Fault]) -> None:
        self._folder = folder
        self._faults = faults

    def __call__(self, phase: FaultPoint, rank: int | None, step: int | None, path: str) -> None:
        served = fault_points.ranks() if rank is None else (rank,)
        for index, fault in enumerate(self._faults):
            if fault.phase is not phase or (fault.step is not None and fault.step != step):
                continue
            if fault.rank is not None and fault.rank not in served:
                continue
            if self._claim(index, fault.times, step, path):
                self._strike(index, fault, path)

    def _claim(self, index: int, times: int, step: int | None, path: str) -> bool:
        for number in range(times):
            try:
                fd = os.open(self._folder / f"{index}.{number}.hit", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                continue
            try:
                os.write(fd, json.dumps({"pid": os.getpid(), "step": step, "path": path}).encode() + b"\n")
            finally:
                os.close(fd)
            return True
        return False

    def _strike(self, index: int, fault: Fault, path: str) -> None:
        kind = fault.kind
        if kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[kind])
        elif kind in _ERRORS:
            raise OSError(_ERRORS[kind], os.strerror(_ERRORS[kind]), path or None)
        elif kind is Kind.SLOW:
            time.sleep(fault.seconds)
        elif kind is Kind.STUCK:
            time.sleep(STUCK_S)
        elif kind in (Kind.TORN, Kind.CUT):
            os.truncate(path, os.path.getsize(path) // 2)
            if kind is Kind.TORN:
                os.kill(os.getpid(), signal.SIGKILL)
        elif kind is Kind.FLIP:
            _flip(path)
        elif kind is Kind.HOLD:
            self._hold(index)
        elif kind is Kind.CLOCK:
            _turn_clock(fault.seconds or CLOCK_JUMP_S)

    def _hold(self, index: int) -> None:
        deadline = time.monotonic() + HOLD_LIMIT_S
        while not (self._folder / f"{index}.go").exists() and time.monotonic() < deadline:
            time.sleep(HOLD_POLL_S)


def _flip(path: str) -> None:
    """Flip a bit in the middle of a file: payload, in any file that has some."""
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


def _turn_clock(seconds: float) -> None:
    """Have `time.time` and `time.time_ns` of this process tell another time from now on."""
    wall, wall_ns = time.time, time.time_ns
    time.time = lambda: wall() + seconds
    time.time_ns = lambda: wall_ns() + int(seconds * 1e9)
