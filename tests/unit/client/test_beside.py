"""
The whole of: the thread that finishes overlapped saves.

Called from: pytest.
"""

import threading

import pytest

from pillion import beside
from support import deadlines
from support.deadlines import Deadline


def test_jobs_run_one_after_another_in_one_thread_and_wait_ends_with_each() -> None:
    """`begin` returns while its job runs; `wait` returns when it has ended; the next job runs in the same thread."""
    worker, go_on, seen = beside.Beside(), threading.Event(), []

    def job() -> None:
        go_on.wait(Deadline.SETTLE.s)
        seen.append(threading.current_thread())

    for number in (1, 2):
        go_on.clear()
        worker.begin(job)
        assert len(seen) == number - 1
        go_on.set()
        worker.wait()
        assert len(seen) == number
    worker.close()
    assert seen[0] is seen[1] is not threading.current_thread()
    deadlines.eventually(lambda: not seen[0].is_alive(), Deadline.SETTLE, "the thread has ended")


def test_where_no_thread_can_start_the_job_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of threads, or at the interpreter's exit, a save is still made: without overlap."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    worker, seen = beside.Beside(), []
    worker.begin(lambda: seen.append(threading.current_thread()))
    worker.wait()
    worker.close()
    assert seen == [threading.current_thread()]
