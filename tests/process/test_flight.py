"""
The whole of: several saves in flight at once, and what each policy of overlap makes of one that finds no slot.

Called from: pytest.
Must never: depend on how fast storage is; the executor is stopped, which is storage that takes for ever.
"""

import threading
from pathlib import Path

import pytest
import torch

from pillion import connection, saving
from pillion.errors import SaveSkipped
from pillion_sidecar.supervisor import staging
from process import ranks as processes
from process.ranks import Ranks
from support import deadlines
from support.deadlines import Deadline


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4096,), float(step)), "count": torch.tensor(step)}


def assert_stored(opened: object, steps: list[int], root: Path) -> None:
    """Each checkpoint on storage holds its own step's values, read by stock DCP."""
    import torch.distributed.checkpoint as dcp

    for step in steps:
        state = state_of(0)
        dcp.load(state, checkpoint_id=root / f"step-{step}")
        assert torch.equal(state["weight"], state_of(step)["weight"]), step
        assert int(state["count"]) == step


def test_saves_in_flight_hold_the_values_of_their_own_step(ranks: Ranks, tmp_path: Path) -> None:
    """Three saves of one tensor that training changes in between: each is committed, with the value that it had then."""
    opened = ranks.open(tmp_path, staging={"slots": 4})
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    executor = processes.executor_of(opened)
    processes.stop(executor)
    live = state_of(0)
    handles = []
    for step in (2, 3, 4):
        live["weight"].fill_(step)
        live["count"].fill_(step)
        handles.append(opened.save(live, step))
        assert handles[-1].staged.done()
    live["weight"].fill_(-1)
    assert not any(handle.committed.done() for handle in handles)
    processes.go_on(executor)
    assert [handle.result(Deadline.COMMITTED.s).step for handle in handles] == [2, 3, 4]
    assert_stored(opened, [1, 2, 3, 4], tmp_path)


def test_wait_holds_the_training_until_a_slot_is_free(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With overlap: Wait the save that finds no slot returns when one is free, counted, and nothing is lost. The log says what it waits for."""
    opened = ranks.open(tmp_path, staging={"slots": 2, "overlap": "Wait"})
    executor = processes.executor_of(opened)
    processes.stop(executor)
    handles = [opened.save(state_of(step), step) for step in (1, 2)]
    third: list[object] = []
    waiting = threading.Thread(target=lambda: third.append(opened.save(state_of(3), 3)))
    waiting.start()
    deadlines.eventually(
        lambda: processes.status(opened)["metrics"]["saves_waited"] == 1, Deadline.STAGED, "a claim waits"
    )
    deadlines.eventually(lambda: saving.NO_SLOT % 3 in caplog.messages, Deadline.REPLY, "the wait is told")
    assert staging.NOTICE_PERIOD_S < connection.SILENCE_WARNING_S, "a sidecar that waits for a slot is not silent"
    assert not any("has not answered" in line for line in caplog.messages)
    assert third == []
    processes.go_on(executor)
    waiting.join(Deadline.COMMITTED.s)
    assert [handle.result(Deadline.COMMITTED.s).step for handle in handles] == [1, 2]
    opened.wait(Deadline.COMMITTED.s)
    assert_stored(opened, [1, 2, 3], tmp_path)


def test_skip_drops_the_save_that_finds_no_slot(ranks: Ranks, tmp_path: Path) -> None:
    """With overlap: Skip it fails at once with SaveSkipped, counted; those in flight and the next one are committed."""
    opened = ranks.open(tmp_path, staging={"slots": 2, "overlap": "Skip"})
    executor = processes.executor_of(opened)
    processes.stop(executor)
    handles = [opened.save(state_of(step), step) for step in (1, 2, 3)]
    with pytest.raises(SaveSkipped, match="no slot is free"):
        handles[2].result(0)
    assert processes.status(opened)["metrics"]["saves_skipped"] == 1
    processes.go_on(executor)
    assert [handle.result(Deadline.COMMITTED.s).step for handle in handles[:2]] == [1, 2]
    opened.save(state_of(4), 4).result(Deadline.COMMITTED.s)
    assert processes.committed(tmp_path) == [1, 2, 4]
    assert_stored(opened, [1, 2, 4], tmp_path)


def test_latest_replaces_the_oldest_save_that_is_not_being_written(ranks: Ranks, tmp_path: Path) -> None:
    """With overlap: Latest the queued save is dropped for the newer one, counted; the one being written is never touched."""
    opened = ranks.open(tmp_path, staging={"slots": 2, "overlap": "Latest"})
    executor = processes.executor_of(opened)
    processes.stop(executor)
    handles = [opened.save(state_of(1), 1)]
    deadlines.eventually(lambda: processes.state_of(opened, 1) == "persisting", Deadline.STAGED, "step 1 is written")
    handles += [opened.save(state_of(step), step) for step in (2, 3, 4)]
    for replaced in (1, 2):
        with pytest.raises(SaveSkipped, match=f"replaced by step {replaced + 2}"):
            handles[replaced].result(Deadline.REPLY.s)
    assert processes.status(opened)["metrics"]["saves_replaced"] == 2
    processes.go_on(executor)
    assert handles[0].result(Deadline.COMMITTED.s).step == 1
    assert handles[3].result(Deadline.COMMITTED.s).step == 4
    assert processes.committed(tmp_path) == [1, 4]
    assert_stored(opened, [1, 4], tmp_path)
