"""
The whole of: what callbacks of a save may do without anybody else noticing.

Called from: pytest.
"""

import threading

import pytest

from pillion import callbacks
from pillion.callbacks import Outcome
from pillion.errors import SidecarUnavailable
from pillion.handle import Checkpoint, SaveHandle
from support.deadlines import Deadline

CHECKPOINT = Checkpoint(step=1, path="runs/step-1")


def test_a_slow_callback_holds_up_neither_whoever_ends_the_save_nor_whoever_waits_for_it() -> None:
    """The listening thread goes on at once, and so does result(), for this save and for the next."""
    leave, entered = threading.Event(), threading.Event()

    def upload(_: object) -> None:
        entered.set()
        leave.wait(Deadline.REPLY.s)

    first, second = SaveHandle(1), SaveHandle(2)
    first.committed.add_done_callback(upload)
    first.resolve(CHECKPOINT)
    assert entered.wait(Deadline.REPLY.s)
    second.resolve(CHECKPOINT)
    assert first.result(0) is second.result(0) is CHECKPOINT
    leave.set()
    callbacks.drain()


@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_whatever_a_callback_raises_the_next_one_runs(error: BaseException) -> None:
    """`lambda f: f.result()` of a failed save raises a CheckpointException, which is no Exception; later callbacks run all the same."""

    def failing(_: object) -> None:
        raise error

    ran = threading.Event()
    handle = SaveHandle(1)
    handle.committed.add_done_callback(failing)
    handle.committed.add_done_callback(lambda _: ran.set())
    handle.fail(SidecarUnavailable("gone"))
    assert ran.wait(Deadline.REPLY.s)


def test_a_callback_may_wait_for_the_others_to_end() -> None:
    """One that closes the Checkpointer does so: it does not wait for itself."""
    ended = threading.Event()

    def close(_: object) -> None:
        callbacks.drain()
        ended.set()

    handle = SaveHandle(1)
    handle.committed.add_done_callback(close)
    handle.resolve(CHECKPOINT)
    assert ended.wait(Deadline.REPLY.s)


def test_a_callback_of_what_has_ended_does_not_hold_up_the_training_loop_either() -> None:
    """It runs in the thread of callbacks, as one that was added in time: which of the two it is is chance."""
    handle = SaveHandle(1)
    handle.resolve(CHECKPOINT)
    threads: list[threading.Thread] = []
    handle.committed.add_done_callback(lambda _: threads.append(threading.current_thread()))
    callbacks.drain()
    assert [thread.name for thread in threads] == ["pillion-callbacks"]


def test_a_callback_is_called_at_once_where_the_interpreter_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end: else a callback of what has ended would be an error, or would never run."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    callbacks.drain()
    monkeypatch.setattr(callbacks, "_caller", None)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    handle = SaveHandle(1)
    handle.resolve(CHECKPOINT)
    threads: list[threading.Thread] = []
    handle.committed.add_done_callback(lambda _: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()]


def test_a_handle_knows_whether_somebody_has_asked_how_the_save_ended() -> None:
    """Its own text and the Checkpointer's looks do not count, a wait that ended too early does not, and the caller's question does."""
    handle = SaveHandle(1)
    with pytest.raises(TimeoutError):
        handle.result(0)
    handle.fail(SidecarUnavailable("gone"))
    assert "failed" in repr(handle)
    assert isinstance(handle.error(), SidecarUnavailable)
    assert not handle.examined
    assert isinstance(handle.committed.exception(0), SidecarUnavailable)
    assert handle.examined


def test_a_future_of_another_ones_outcome_asks_for_it() -> None:
    """`pillion.dcp` gives its callers such a one."""
    handle = SaveHandle(1)
    outcome: Outcome[int] = Outcome(handle.note_examined)
    outcome.set_result(1)
    assert outcome.result(0) == 1
    assert handle.examined
