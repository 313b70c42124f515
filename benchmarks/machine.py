"""
The machine under a benchmark: what it is, and whether it is quiet.

Called from: run.py, before each benchmark. A number is believed only with these facts beside it.
Must never: end a run because the machine is busy. It says so in the table and in the record.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Final

import torch

QUIET_SHARE: Final = 0.10
"""Share of the processors' time that others may use while a benchmark begins. Above it, a copy in two threads waits for a core."""
LOOK_S: Final = 2.0
"""Time over which that share is measured: longer than one round of a periodic task such as a sidecar's report."""
PAUSE_S: Final = 1.0
"""Pause between two looks while the machine is awaited."""
GIT_TIMEOUT_S: Final = 10.0
_UNUSED: Final = (3, 4)
"""Columns of /proc/stat that are no work: idle, iowait. Source: proc(5)."""
_GUEST: Final = 8
"""First column of /proc/stat that counts what `user` and `nice` count already."""


def facts(directory: Path) -> dict[str, object]:
    """What a reader needs to judge numbers of this machine. `directory`: on the disk that is measured."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "processor": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "last-level cache": _text("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "huge pages of shared memory": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "file system": _file_system(directory),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
    }


def busy_share() -> float:
    """The share of the processors' time that is used now, 0 to 1. Blocks: LOOK_S."""
    before = _times()
    time.sleep(LOOK_S)
    used = [after - begin for begin, after in zip(before, _times(), strict=True)]
    total = sum(used)
    return 1 - sum(used[column] for column in _UNUSED) / total if total else 0.0


def await_quiet(timeout_s: float) -> float:
    """
    Wait until the machine is quiet, and return the share that is used then; the last one, if it did not become quiet.

    Blocks: up to timeout_s + LOOK_S.
    """
    deadline_s = time.monotonic() + timeout_s
    while (share := busy_share()) > QUIET_SHARE and time.monotonic() < deadline_s:
        time.sleep(PAUSE_S)
    return share


def _times() -> list[int]:
    with open("/proc/stat", encoding="ascii") as stat:
        return [int(each) for each in stat.readline().split()[1 : 1 + _GUEST]]


def _commit() -> str:
    """The commit of this tree, with a plus if the tree differs from it. Empty outside a repository."""
    here = Path(__file__).parent
    command = ("git", "-C", str(here), "describe", "--always", "--dirty=+")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _field(path: str, name: str) -> str:
    lines = _text(path).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _chosen(path: str) -> str:
    """The value in brackets of a file of choices such as `always [never]`."""
    return _text(path).partition("[")[2].partition("]")[0]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _file_system(directory: Path) -> str:
    """The type of the file system that a directory is on: of the longest mount point that leads to it."""
    resolved = directory.resolve()
    mounts = [line.split()[1:3] for line in _text("/proc/mounts").splitlines()]
    under = [(len(place), kind) for place, kind in mounts if resolved == Path(place) or Path(place) in resolved.parents]
    return max(under, default=(0, ""))[1]
