"""
The whole of: what training code does around its saves: callbacks, numbers of other libraries, interrupts, shortages.

Called from: pytest.
"""

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from pillion import callbacks, dcp
from pillion.errors import UsageError
from pillion.wire import events
from pillion.wire.messages import BadFrame
from process.ranks import Peer, Ranks, committed
from support import deadlines
from support.deadlines import Deadline


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((1000,), float(step))}


def test_callbacks_save_load_sleep_and_raise_beside_a_training_loop_that_saves(ranks: Ranks, tmp_path: Path) -> None:
    """A callback that is slow holds no save up, and one may save and wait for that save itself."""
    opened = ranks.open(tmp_path)
    leave, saved = threading.Event(), threading.Event()

    def back_up(_: object) -> None:
        opened.save(state_of(3), 3).result(Deadline.COMMITTED.s)
        saved.set()
        leave.wait(Deadline.COMMITTED.s)
        raise SystemExit("the user's own")

    first, second = opened.save(state_of(1), 1), opened.save(state_of(2), 2)
    second.committed.add_done_callback(back_up)
    first.result(Deadline.COMMITTED.s)
    second.result(Deadline.COMMITTED.s)
    assert saved.wait(Deadline.COMMITTED.s)
    opened.save(state_of(4), 4).result(Deadline.COMMITTED.s)
    leave.set()
    callbacks.drain()
    assert opened.save(state_of(5), 5).result(Deadline.COMMITTED.s).step == 5


def test_a_failed_dcp_save_whose_callback_asks_for_the_result_is_the_only_one_that_fails(
    ranks: Ranks, tmp_path: Path
) -> None:
    """CheckpointException is a BaseException: it ends neither the listening thread nor that of the callbacks."""

    def train(_: Peer) -> tuple[bool, int]:
        there = FileSystemWriter(tmp_path / "a", overwrite=False)
        dcp.async_save(state_of(1), storage_writer=there).result(Deadline.COMMITTED.s)
        refused = dcp.async_save(state_of(2), storage_writer=there)
        refused.add_done_callback(lambda future: future.result())
        error = refused.exception(Deadline.COMMITTED.s)
        done = dcp.async_save(state_of(3), checkpoint_id=tmp_path / "b").result(Deadline.COMMITTED.s)
        dcp.close()
        return isinstance(error, CheckpointException), done.size_bytes

    ((failed, size_bytes),) = ranks.start(train).finish()
    assert failed
    assert size_bytes > 0


def test_a_step_is_whatever_python_takes_for_an_index(ranks: Ranks, tmp_path: Path) -> None:
    """NumPy's and torch's integers are the same to due, save and load; what is no step is refused by each, with what is allowed."""
    opened = ranks.open(tmp_path, trigger={"periodSteps": 2})
    for step in (np.int64(2), torch.tensor(4), np.uint8(6)):
        assert opened.due(step)
        handle = opened.save(state_of(int(step)), step)
        assert type(handle.step) is int
        assert handle.result(Deadline.COMMITTED.s).step == step
    assert opened.load(state_of(0), step=np.int64(4)) == 4
    for wrong in (True, 1.0, "1", -1, 2**63):
        with pytest.raises(UsageError, match="whole number from 0"):
            opened.due(wrong)  # type: ignore[arg-type] # what is wrong
        with pytest.raises(UsageError, match="whole number from 0"):
            opened.load(state_of(0), step=wrong)  # type: ignore[arg-type] # what is wrong
        assert isinstance(opened.save(state_of(0), wrong).committed.exception(0), UsageError)  # type: ignore[arg-type] # what is wrong


def test_the_newest_step_saved_again_is_the_same_save(ranks: Ranks, tmp_path: Path) -> None:
    """A periodic save and a last one meet; but one that was for memory alone is not taken for one on storage."""
    opened = ranks.open(tmp_path)
    first = opened.save(state_of(1), 1)
    assert opened.save(state_of(1), 1) is first
    snapshot = opened.save(state_of(2), 2, persist=False)
    assert opened.save(state_of(2), 2, persist=False) is snapshot
    assert isinstance(opened.save(state_of(2), 2, persist=True).committed.exception(0), UsageError)
    assert isinstance(opened.save(state_of(1), 1).committed.exception(0), UsageError)
    opened.wait(Deadline.COMMITTED.s)
    assert committed(tmp_path) == [1]


def test_a_save_that_is_interrupted_keeps_no_slot(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C goes on to whoever catches it, and a loop that goes on saves at once: with two slots, both are free."""
    opened = ranks.open(tmp_path)
    mapping = opened._session.mapping
    assert mapping is not None
    with monkeypatch.context() as patched:
        patched.setattr(mapping, "copy_in", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            opened.save(state_of(1), 1)
    assert opened.in_flight() == []
    for step in (2, 3, 4):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    assert committed(tmp_path) == [2, 3, 4]


def test_the_search_for_a_sidecar_outlives_a_shortage_of_anything(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar that dies while the trainer has no descriptor, process or sense left is looked for until there is one."""
    opened = ranks.open(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    greet = opened._session._greet
    shortages: list[Exception] = [
        OSError(errno.EMFILE, "Too many open files"),
        BlockingIOError(errno.EAGAIN, "no process"),
        RuntimeError("can't start new thread"),
        BadFrame("no sense"),
    ]

    def short(timeout_s: float) -> Any:
        if shortages:
            raise shortages.pop()
        return greet(timeout_s)

    monkeypatch.setattr(opened._session, "_greet", short)
    before = ranks.sidecar()
    os.kill(before, signal.SIGKILL)
    deadlines.eventually(
        lambda: not shortages and not opened._session._connection.lost,
        Deadline.PROCESS_START,
        "another sidecar is found",
    )
    assert opened.save(state_of(2), 2).result(Deadline.COMMITTED.s).step == 2


def test_an_event_before_the_constructor_has_ended_waits_for_it(ranks: Ranks, tmp_path: Path) -> None:
    """A pod that is to end, or a save that somebody asks for, may come while a trainer of a large job waits for its welcome."""
    opened = ranks.open(tmp_path)
    session = opened._session
    session._held_back = []
    session._on_event(events.SaveNow())
    session._on_event(events.Announced(step=7))
    assert not opened.due(6)
    session.listen()
    assert opened.due(7)
