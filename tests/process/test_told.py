"""
The whole of: a script is told of each commit and each failure once, on rank 0, also of what was committed after its trainers died.

Called from: pytest.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pillion
from pillion import checkpointer
from pillion.wire import names
from process.ranks import Peer, Ranks, committed
from support import deadlines
from support.deadlines import Deadline


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((50,), float(step)), "step": step}


def test_each_commit_and_each_failure_is_told_once_in_a_thread_of_ours_and_an_error_there_stays_there(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot is no commit; a save that is refused is a failure; what the last save became is told before close() returns."""
    told: list[Any] = []

    def on_commit(checkpoint: pillion.Checkpoint) -> None:
        told.append((checkpoint.step, checkpoint.metrics, threading.current_thread() is threading.main_thread()))
        if checkpoint.step == 2:
            raise SystemExit("a push that failed")

    def on_failure(step: int, error: BaseException) -> None:
        told.append((step, type(error).__name__))

    def open_again() -> checkpointer.Checkpointer:
        return checkpointer.Checkpointer(tmp_path, on_commit=on_commit, on_failure=on_failure)

    with open_again() as opened:
        opened.save(state_of(1), 1, metrics={"loss": 2})
        opened.save(state_of(2), 2)
        opened.save(state_of(3), 3, persist=False)
        opened.save({"bad": lambda: None}, 4)
        opened.save(state_of(1), 1)
        opened.save(state_of(5), 5)
    by_step: dict[int, list[Any]] = {}
    for step, *rest in told:
        by_step.setdefault(step, []).append(tuple(rest))
    assert by_step == {
        1: [({"loss": 2.0}, False), ("UsageError",)],
        2: [({}, False)],
        4: [("UnsupportedLeaf",)],
        5: [({}, False)],
    }
    assert "on_commit raised" in caplog.text
    assert "a push that failed" in caplog.text
    told.clear()
    ranks.alone()
    with open_again() as opened:
        assert opened.load(state_of(0)) == 5
    assert told == []


def test_what_was_committed_after_both_trainers_died_is_told_after_the_restart_once_and_on_rank_0(
    ranks: Ranks, tmp_path: Path
) -> None:
    """With the metrics of its save. What was there before anybody wanted to be told is not news."""

    def train(then: Callable[[checkpointer.Checkpointer, Peer], object]) -> Callable[[Peer], list[Any]]:
        def run(peer: Peer) -> list[Any]:
            told: list[Any] = []
            with checkpointer.Checkpointer(
                tmp_path, on_commit=lambda found: told.append((found.step, dict(found.metrics), found.path))
            ) as opened:
                then(opened, peer)
            return told

        return run

    def snapshot(opened: checkpointer.Checkpointer, peer: Peer) -> None:
        state = state_of(2) | {f"own{peer.rank}": peer.rank}
        opened.save(state, 2, persist=False, metrics={"loss": 0.5}).result(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()

    def resume(opened: checkpointer.Checkpointer, peer: Peer) -> None:
        assert opened.load(state_of(0) | {f"own{peer.rank}": 9}) == 2

    def before(_: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)

    ranks.start(before).finish()
    ranks.alone()
    job = ranks.start(train(snapshot), num_ranks=2)
    job.hear()
    job.kill()
    deadlines.eventually(lambda: committed(tmp_path) == [1, 2], Deadline.COMMITTED, "the snapshot is rescued")
    told = ranks.start(train(resume), num_ranks=2, attempt=1).finish(Deadline.LOADED)
    assert told == [[(2, {"loss": 0.5}, f"{tmp_path}/step-2")], []]
    assert ranks.start(train(resume), num_ranks=2, attempt=2).finish(Deadline.LOADED) == [[], []]


def test_a_commit_that_the_next_load_finishes_is_told_after_it(ranks: Ranks, tmp_path: Path) -> None:
    """The run before ended between the last part and the commit."""
    told: list[int] = []

    def told_of(found: pillion.Checkpoint) -> None:
        told.append(found.step)

    with checkpointer.Checkpointer(tmp_path, on_commit=told_of) as opened:
        opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    ranks.alone()
    note = tmp_path / names.INTERNAL_DIR / "told.json"
    assert list(json.loads(note.read_text())["told"]) == ["1"]
    note.write_text('{"told": {}}')
    for name in (names.MANIFEST, names.COMMIT_MARKER):
        (tmp_path / "step-1" / name).unlink()
    told.clear()
    with checkpointer.Checkpointer(tmp_path, on_commit=told_of) as opened:
        assert opened.load(state_of(0)) == 1
    assert told == [1]
