"""
The whole of: fields of a policy, and a signal, from where a user sets them to what is on storage.

Called from: pytest.
Must never: sleep; a training loop asks `due` at every step, as one does.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pillion import schedule
from pillion.checkpointer import Checkpointer
from process import ranks as processes
from process.ranks import Ranks
from support import deadlines
from support.deadlines import Deadline


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((64,), float(step))}


def train_until_due(opened: Checkpointer, steps: Iterator[int]) -> int:
    """Steps of a training loop until a save is due; that step."""

    def step() -> int:
        number = next(steps)
        return number if opened.due(number) else 0

    return deadlines.eventually(step, Deadline.COMMITTED, "a save is due")


def test_a_period_in_seconds_makes_saves_due_and_retention_keeps_what_it_names(ranks: Ranks, tmp_path: Path) -> None:
    """`trigger.periodSeconds`, `retention.keepEverySteps`, and a newest checkpoint that is lost and said to be."""
    opened = ranks.open(
        tmp_path, trigger={"periodSeconds": 1}, retention={"keepLast": 1, "keepEverySteps": 10}, staging={"slots": 2}
    )
    for step in (10, 15, 20, 25):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    deadlines.eventually(lambda: processes.committed(tmp_path) == [10, 20, 25], Deadline.SETTLE, "step 15 is gone")
    saved_s = time.monotonic()
    steps = iter(range(26, 10**9))
    assert not opened.due(next(steps)), "a save by hand begins the period anew"
    due = train_until_due(opened, steps)
    assert time.monotonic() - saved_s > 0.9
    opened.save(state_of(due), due).result(Deadline.COMMITTED.s)
    assert not opened.due(next(steps))
    deadlines.eventually(lambda: processes.committed(tmp_path) == [10, 20, due], Deadline.SETTLE, "step 25 is gone")
    opened.close()
    ranks.alone()

    shutil.rmtree(tmp_path / f"step-{due}")
    again = ranks.open(tmp_path)
    state = state_of(0)
    assert again.load(state) == 20
    assert torch.equal(state["weight"], state_of(20)["weight"])
    assert again.last_load is not None
    assert "was committed as the newest" in again.last_load.refused[f"storage:{due}"]


def test_sigusr1_to_the_sidecar_asks_the_trainers_for_one_save(ranks: Ranks, tmp_path: Path) -> None:
    """A policy without periods: nothing is due until somebody asks, and nothing after it."""
    opened = ranks.open(tmp_path)
    steps = iter(range(1, 10**9))
    assert not opened.due(next(steps))
    os.kill(processes.status(opened)["pid"], signal.SIGUSR1)
    due = train_until_due(opened, steps)
    opened.save(state_of(due), due).result(Deadline.COMMITTED.s)
    assert processes.committed(tmp_path) == [due]
    assert not any(opened.due(next(steps)) for _ in range(100))


def test_a_policy_that_asks_for_no_saves_is_warned_of_once(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A script that asks due() and gave no trigger would train to its end, save nothing, and end well. Requests and own saves go on."""
    opened = ranks.open(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    assert schedule.NO_TRIGGER not in caplog.messages, "this script has not asked"
    assert not any(opened.due(step) for step in range(2, 10))
    assert caplog.messages.count(schedule.NO_TRIGGER) == 1
    opened.close()


def test_a_policy_with_any_trigger_is_not_warned_of(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = ranks.open(tmp_path, trigger={"snapshotSteps": 3})
    assert [step for step in range(1, 7) if opened.due(step)] == [3, 6]
    assert schedule.NO_TRIGGER not in caplog.messages
    opened.close()
