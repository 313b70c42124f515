"""
The fault kit: faults at named phases, for tests of Pillion and of jobs that use it. Off unless PILLION_FAULTS is set.

    faults = [fail_at(rank=1, phase=FaultPoint.WRITE, fault=Kind.SIGKILL, step=20)]
    environment = to_environment(folder, faults)      # for the trainers; their sidecars inherit it
    ...
    hits(folder)                                      # the faults that struck: a fault that never struck proves nothing

Called from: `pillion.fault_points`, at import, in every process with PILLION_FAULTS. The chart never sets that variable.
Must never: strike without a request, or more often than requested, even across restarts. Each strike first claims a file in `folder`.

A fault strikes the process that reaches the point. Use `HOLD` for a fault of something else (a dead coordinator while a peer writes, a
lost store, a cut network): the process waits at the point. The test sees the file of the strike, causes the fault, and releases it.
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
"""Timeout for a HOLD that no test releases. Then the process continues, and the test fails by its own timeout."""
HOLD_POLL_S: Final = 0.005
STUCK_S: Final = 3600.0
"""Duration of a storage call that never returns: longer than any timeout of Pillion."""
CLOCK_JUMP_S: Final = -7200.0
"""Default jump of the clock: two hours back, as on a node whose clock is set for the first time."""


class Kind(StrEnum):
    """What happens at the point."""

    SIGKILL = "SIGKILL"
    SIGSTOP = "SIGSTOP"
    """The process stops until it gets SIGCONT."""
    SIGSEGV = "SIGSEGV"
    ENOSPC = "ENOSPC"
    EIO = "EIO"
    SLOW = "slow"
    """The call takes `seconds` and succeeds."""
    STUCK = "stuck"
    """The call never returns."""
    TORN = "torn"
    """The file is cut to half, and the process dies: a crash in the middle of a write."""
    CUT = "cut"
    """The file is cut to half, and every call succeeds: storage that loses data silently."""
    FLIP = "flip"
    """One bit of the file flips, and every call succeeds."""
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
    """Rank whose process is struck: the trainer, or the sidecar that serves it. None: the first process at the point."""
    step: int | None = None
    """Step at which the fault strikes. None: the first step at the point."""
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
    """Return a fault, in the words of a test: ``fail_at(rank=1, phase=FaultPoint.WRITE, fault=Kind.SIGKILL)``."""
    return Fault(phase=phase, kind=fault, rank=rank, step=step, times=times, seconds=seconds)


def to_environment(folder: str | os.PathLike[str], faults: Iterable[Fault]) -> dict[str, str]:
    """Return the environment variable with these faults. `folder` records the strikes, and must be empty at first."""
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
    """Index of the fault in the list of `to_environment`."""
    pid: int
    step: int | None
    path: str


def hits(folder: str | os.PathLike[str]) -> list[Hit]:
    """Return the strikes so far, ordered by fault. A strike whose file is still being written is not included."""
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
    """PILLION_FAULTS cannot be read. The text names the problem and the allowed values."""


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
    Observe every point of this process for the faults in its environment, if there are any.

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
    """Shift `time.time` and `time.time_ns` of this process from now on."""
    wall, wall_ns = time.time, time.time_ns
    time.time = lambda: wall() + seconds
    time.time_ns = lambda: wall_ns() + int(seconds * 1e9)
