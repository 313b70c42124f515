"""
The whole of: proof that the tests' own instruments see what they are there to see.

Called from: pytest.
Must never: leave behind what it makes in order to be seen.
"""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pillion_operator.cluster import events
from support import deadlines, kube, leaks

# The interpreter in between ends at once, so that its child is re-parented; the child lives until it is killed.
ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import signal; print(flush=True); signal.pause()"],
                         start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdout.readline()
print(child.pid, flush=True)
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    value = uuid.uuid4().hex
    monkeypatch.setenv(leaks.MARK_VARIABLE, value)
    yield value
    leaks.end(leaks.own_processes(value))


def test_an_orphan_is_seen_and_ended(mark: str) -> None:
    """A process that was re-parented to init still counts as the test's own, and is ended by its id."""
    before = leaks.take(mark)
    done = subprocess.run(
        [sys.executable, "-S", "-c", ORPHAN],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=deadlines.Deadline.PROCESS_START.s,
    )
    pid = int(done.stdout)
    assert pid in leaks.take(mark).processes
    assert any(f"process {pid}" in line for line in leaks.differences(before, leaks.take(mark)))

    leaks.end(leaks.own_processes(mark))
    deadlines.eventually(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE,
        deadlines.Deadline.SETTLE,
        "the orphan is gone",
    )


def test_shared_memory_descriptors_and_threads_are_seen(mark: str) -> None:
    """Each kind of thing that a test could leave is named while it is there, and no longer."""
    before = leaks.take(mark)
    shared = Path("/dev/shm") / f"pillion-guard-{mark}"
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait, args=(deadlines.Deadline.SETTLE.s,), name=f"thread-{mark}")
    descriptor = os.open(shared, os.O_CREAT | os.O_RDWR)
    thread.start()
    try:
        seen = "\n".join(leaks.differences(before, leaks.take(mark)))
    finally:
        leave.set()
        thread.join()
        os.close(descriptor)
        shared.unlink()
    assert f"/dev/shm/{shared.name}" in seen
    assert f"descriptor {descriptor} ->" in seen
    assert f"thread 'thread-{mark}'" in seen
    assert leaks.differences(before, leaks.take(mark)) == []


def test_eventually_gives_what_it_waited_for() -> None:
    """The first true value is returned, and a failing assertion before it only means "not yet"."""
    answers = iter([0, "", None])

    def predicate() -> str:
        for answer in answers:
            assert answer, "not yet"
        return "there"

    assert deadlines.eventually(predicate, deadlines.Deadline.REPLY, "an answer") == "there"


def test_eventually_says_what_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the deadline the error names what was waited for, the deadline, and what was seen last."""
    monkeypatch.setenv(deadlines.SCALE_VARIABLE, "0.001")
    with pytest.raises(deadlines.DeadlinePassed, match=r"for: the moon \(REPLY: .*last seen: 0"):
        deadlines.eventually(lambda: 0, deadlines.Deadline.REPLY, "the moon")


def test_a_warning_that_a_story_does_not_declare_is_found() -> None:
    """Each pattern matches from the beginning of reason and text; without one every Warning is unexpected."""
    said = ["SaveFailed: step 3: No space left on device", "LoadFailed: SessionOver: session a is over"]
    assert kube.undeclared(said, ["SaveFailed: .*No space left"]) == said[1:]
    assert kube.undeclared(said, ["No space", "Load"]) == said[:1]
    assert kube.undeclared(said, []) == said
    assert kube.undeclared([], []) == []


def test_the_warnings_that_are_read_are_those_of_the_operator() -> None:
    """Events name who reports them, and the stories look for that name."""
    assert kube.OPERATOR == events.CONTROLLER
