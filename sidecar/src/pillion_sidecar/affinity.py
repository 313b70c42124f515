"""
Gives the sidecar the processors of its trainers, and takes each rank's memory from that trainer's NUMA node.

Called from: the supervisor, and the modules that grow an arena. An embedded sidecar is a child of the first rank, and inherits that rank's
binding (`numactl`, `taskset`, a launcher). Without this module, all arenas would lie in that rank's memory, and its processors would write all
checkpoints. The sidecar gets the processors of all ranks that have joined, and no others. A thread on a rank's processors takes that rank's
memory. Errors of the kernel are ignored, because only speed depends on them. Sources: sched_setaffinity(2), set_mempolicy(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterable, Iterator
from typing import Final

SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}
"""Machine -> number of the system call set_mempolicy. glibc has no function for it."""
MPOL_DEFAULT: Final = 0
"""Memory policy that takes pages from the node on which the thread runs."""


def processors(pid: int) -> frozenset[int]:
    """Return the processors that a process or thread may use. Empty if this process cannot see it."""
    if pid <= 0:
        return frozenset()
    try:
        return frozenset(os.sched_getaffinity(pid))
    except OSError:
        return frozenset()


def widen(pids: Iterable[int], more: Iterable[int]) -> None:
    """Let every thread of these processes use `more` processors as well."""
    for pid in pids:
        cpus = processors(pid) | frozenset(more)
        if pid <= 0 or cpus == processors(pid):
            continue
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread), cpus)


@contextlib.contextmanager
def beside(pid: int) -> Iterator[None]:
    """Run this thread on the processors of a trainer's process within the block, so that its new memory is on their node."""
    near, before = processors(pid), os.sched_getaffinity(0)
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
    """
    Set this process's memory policy to the default: each thread takes memory from the node on which it runs.

    Called from: the main thread, before other threads exist.
    """
    number = SET_MEMPOLICY.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(MPOL_DEFAULT), None, ctypes.c_ulong(0))
