"""
Which processors, and which memory of a machine with several nodes, a sidecar works with: those of its trainers.

Called from: the supervisor, and whoever grows an arena. An embedded sidecar is a child of the first rank, and inherits what that one was bound to
(`numactl`, `taskset`, a launcher): all arenas would lie in that rank's memory, and its processors would do everybody's writing. It gets the
processors of all ranks that have joined, never more, and a rank's memory is taken by a thread on that rank's processors.
Nothing here is needed to be right: whatever the kernel refuses stays as it is. Sources: sched_setaffinity(2), set_mempolicy(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterable, Iterator
from typing import Final

SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}
"""Number of the system call, by machine; glibc has no function for it."""
MPOL_DEFAULT: Final = 0
"""Memory of the node that the thread runs on."""


def of(pid: int) -> frozenset[int]:
    """The processors that a process, or a thread, may use; empty: not known from here."""
    if pid <= 0:
        return frozenset()
    try:
        return frozenset(os.sched_getaffinity(pid))
    except OSError:
        return frozenset()


def widen(pids: Iterable[int], more: Iterable[int]) -> None:
    """Let every thread of these processes use `more` processors as well."""
    for pid in pids:
        cpus = of(pid) | frozenset(more)
        if pid <= 0 or cpus == of(pid):
            continue
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread), cpus)


@contextlib.contextmanager
def beside(pid: int) -> Iterator[None]:
    """Have this thread run on the processors of a trainer's process: memory that it takes now is near to them."""
    near, before = of(pid), os.sched_getaffinity(0)
    moved = False
    if near and near != before:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, near)
            moved = True
    try:
        yield
    finally:
        if moved:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)


def forget_memory_policy() -> None:
    """Take memory from where a thread runs, whatever this process was started with. Called from: the main thread, before any other is there."""
    number = SET_MEMPOLICY.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(MPOL_DEFAULT), None, ctypes.c_ulong(0))
