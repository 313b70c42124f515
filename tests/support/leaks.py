"""
The whole of: what a test may not leave behind, and the fixture that looks for it.

Called from: tests/conftest.py, which makes `nothing_left` automatic for the levels `process` and `distributed`.
Must never: pass over a leak silently; what is exempt is named here, with the reason.

A process counts as the test's own when it descends from the test process, or when it carries the test's mark in its
environment: a daemon that was re-parented to init is no child any more, but it still carries the mark.
"""

import dataclasses
import os
import threading
import uuid
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Final

import psutil
import pytest

from support import deadlines

MARK_VARIABLE: Final = "PILLION_TEST_ID"
"""Environment variable that every process of a test inherits; its value is different for each test."""

_SHARED_MEMORY: Final = Path("/dev/shm")
_SHARED_MEMORY_PREFIX: Final = "pillion"
_KILL_GRACE_S: Final = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """
    What exists now that a test could leave behind. Keys identify a thing, values describe it to a person.
    """

    processes: dict[int, str]
    """pid -> command line and listening ports."""
    shared_memory: frozenset[str]
    """Names in /dev/shm that begin with ours."""
    descriptors: dict[int, str]
    """fd of the test process -> what it points to."""
    threads: dict[int, str]
    """ident -> name."""


def take(mark: str) -> Snapshot:
    """
    Blocks: never; reads /proc.
    """
    return Snapshot(
        processes={process.pid: _describe(process) for process in own_processes(mark)},
        shared_memory=frozenset(path.name for path in _SHARED_MEMORY.glob(_SHARED_MEMORY_PREFIX + "*"))
        - _foreign(mark),
        descriptors=_descriptors(),
        threads={thread.ident: thread.name for thread in threading.enumerate() if thread.ident is not None},
    )


def own_processes(mark: str) -> list[psutil.Process]:
    """
    The descendants of this process, and every process that carries the mark; zombies included, this process left out.

    Python's resource tracker is exempt: multiprocessing starts one for each interpreter, and it ends with it.
    """
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid not in found and process.pid != os.getpid() and carries(process, mark):
            found[process.pid] = process
    exempt = getattr(resource_tracker._resource_tracker, "_pid", None)
    return [process for pid, process in found.items() if pid != exempt]


def _foreign(mark: str) -> frozenset[str]:
    """
    Runtime directories of living sidecars that are not of this test: somebody else trains on this machine as well.
    """
    own = {process.pid for process in own_processes(mark)}
    found = set()
    for process in psutil.process_iter():
        try:
            arguments = process.cmdline()
        except (psutil.Error, OSError):
            continue
        if "pillion_sidecar" in arguments and process.pid not in own:
            found |= {Path(each).name for each in arguments if Path(each).parent == _SHARED_MEMORY}
    return frozenset(found)


def carries(process: psutil.Process, mark: str) -> bool:
    """
    Whether the process was started with the mark in its environment.
    """
    try:
        return process.environ().get(MARK_VARIABLE) == mark
    except (psutil.Error, OSError):
        # Gone meanwhile, a zombie (its environment is gone), or another user's.
        return False


def end(processes: list[psutil.Process]) -> None:
    """
    Kills these processes, by their ids, and reaps those that are our children.

    Blocks: up to _KILL_GRACE_S.
    """
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_KILL_GRACE_S)


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """
    One sentence for each thing that is there after and was not before.
    """
    left = [
        f"process {pid}: {after.processes[pid]}" for pid in sorted(after.processes.keys() - before.processes.keys())
    ]
    left += [f"/dev/shm/{name}" for name in sorted(after.shared_memory - before.shared_memory)]
    left += [
        f"descriptor {fd} -> {target}"
        for fd, target in sorted(after.descriptors.items())
        if before.descriptors.get(fd) != target
    ]
    left += [f"thread {after.threads[ident]!r}" for ident in sorted(after.threads.keys() - before.threads.keys())]
    return left


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """
    Fails the test when it leaves a process, a shared memory file, a descriptor or a thread. Gives the test's mark.

    Things may take Deadline.SETTLE to go. Processes that are left are named, then killed, so that the next test is not
    hurt by them.
    """
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK_VARIABLE, mark)
    before = take(mark)
    yield mark

    def left() -> list[str]:
        return differences(before, take(mark))

    try:
        deadlines.eventually(lambda: not left(), deadlines.Deadline.SETTLE, "nothing is left behind")
    except deadlines.DeadlinePassed:
        remains = left()
        end([process for process in own_processes(mark) if process.pid not in before.processes])
        if remains:
            pytest.fail("the test left behind:\n  " + "\n  ".join(remains), pytrace=False)


def _describe(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline()) or process.name()
        ports = [
            str(connection.laddr.port)
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        listens = f", listens on {', '.join(ports)}" if ports else ""
        return f"{process.status()}, {command[:200]}{listens}"
    except psutil.Error:
        return "gone while it was looked at, or a zombie"


def _descriptors() -> dict[int, str]:
    exempt = getattr(resource_tracker._resource_tracker, "_fd", None)
    found = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:
            # The descriptor of this very listing.
            continue
    return {fd: target for fd, target in found.items() if fd != exempt}
