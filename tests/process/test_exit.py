"""
The whole of: the end of a training script that did not close its Checkpointer: saves in flight are drained, or reported lost.

Called from: pytest.
Must never: fork; what is tested is the end of a real interpreter.
"""

from pathlib import Path

import pytest
import torch

from process.ranks import Ranks, committed
from support.deadlines import Deadline
from support.processes import Processes

SCRIPT = """
import contextlib, os, signal, sys
import torch
import pillion
from pillion.wire import control

root, mode = sys.argv[1:]
checkpointer = pillion.Checkpointer(root, policy={"drain": {"timeoutSeconds": 2}})
checkpointer.save({"w": torch.ones(1000)}, 1).result(60)
executor = checkpointer._session.request(control.ReadStatus(), 10).executor_pid
if mode in ("lost", "with"):
    os.kill(executor, signal.SIGSTOP)
torch.set_num_threads(2)
with checkpointer if mode == "with" else contextlib.nullcontext():
    for step in (2, 3):
        checkpointer.save({"w": torch.full((1000,), float(step))}, step, overlap=mode == "overlapped")
print("the last line")
if mode == "error":
    raise RuntimeError("the user's own error")
if mode == "status":
    sys.exit(1)
"""


@pytest.mark.parametrize("mode", ["drained", "overlapped"])
def test_saves_in_flight_at_the_end_of_the_script_are_drained(
    processes: Processes, ranks: Ranks, tmp_path: Path, mode: str
) -> None:
    """The interpreter ends with status 0, all saves are committed, also one that is still copied, and sidecar and arena are gone."""
    processes.python("-c", SCRIPT, tmp_path, mode).check(Deadline.SCRIPT)
    assert committed(tmp_path) == [1, 2, 3]
    ranks.alone()


@pytest.mark.parametrize("mode", ["lost", "with"])
def test_saves_that_are_lost_at_the_end_are_told_by_the_exit_status(
    processes: Processes, ranks: Ranks, tmp_path: Path, mode: str
) -> None:
    """
    With an executor that hangs and a short drain the interpreter ends with 74 and names the steps, whether a `with` has closed the
    Checkpointer or nobody has; the one before stays.
    """
    run = processes.python("-c", SCRIPT, tmp_path, mode)
    assert run.wait(Deadline.SCRIPT) == 74, run.tail()
    assert run.stdout == "the last line\n"
    assert "saves lost at exit" in run.stderr
    assert "step 2" in run.stderr
    assert "step 3" in run.stderr
    assert committed(tmp_path) == [1]


REFUSED = """
import sys
import torch
import pillion

root, mode = sys.argv[1:]
checkpointer = pillion.Checkpointer(root)
state = {"w": torch.ones(1000)}
first = checkpointer.save(state, 7)
if mode == "in a callback of the end":
    first.committed.add_done_callback(lambda _: checkpointer.save(state, 8))
elif mode == "closed":
    checkpointer.close()
    checkpointer.save(state, 8)
elif mode == "to memory":
    checkpointer.save(state, 6, persist=False)
elif mode == "asked":
    print(type(checkpointer.save(state, 6).committed.exception(60)).__name__)
else:
    checkpointer.save(state, {"older": 6, "no whole number": 7.5}[mode])
if mode == "asked":
    first.result(60)
"""


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("closed", "step 8: the Checkpointer is closed"),
        ("in a callback of the end", "step 8: the Checkpointer is closed"),
        ("older", "step 6: step 6 comes after step 7"),
        ("no whole number", "step 7.5: step must be a whole number"),
        ("to memory", ""),
        ("asked", ""),
    ],
)
def test_a_last_save_that_was_refused_is_a_lost_one(
    processes: Processes, ranks: Ranks, tmp_path: Path, mode: str, told: str
) -> None:
    """Status 74, and standard error says which and why; not where it was for memory alone, or somebody asked. What was saved is there."""
    run = processes.python("-c", REFUSED, tmp_path, mode)
    assert run.wait(Deadline.SCRIPT) == (74 if told else 0), run.tail()
    assert ("saves lost at exit: " + told in run.stderr) == bool(told)
    assert committed(tmp_path) == [7]


@pytest.mark.parametrize("mode", ["error", "status"])
def test_an_error_of_the_user_keeps_its_own_exit_status_and_the_arena(
    processes: Processes, ranks: Ranks, tmp_path: Path, mode: str
) -> None:
    """An uncaught exception or sys.exit(1) ends with 1; what was in flight is committed, and a restart loads it from the arena."""
    run = processes.python("-c", SCRIPT, tmp_path, mode)
    assert run.wait(Deadline.SCRIPT) == 1, run.tail()
    assert ("the user's own error" in run.stderr) == (mode == "error")
    assert committed(tmp_path) == [1, 2, 3]
    opened = ranks.open(tmp_path)
    state = {"w": torch.zeros(1000)}
    assert opened.load(state) == 3
    assert opened.last_load is not None
    assert opened.last_load.tier == "arena"
    assert float(state["w"][0]) == 3.0


OVERTAKEN = """
import os, signal, sys
import torch
import pillion
from pillion.wire import control

checkpointer = pillion.Checkpointer(sys.argv[1], policy={"staging": {"slots": 3}})
checkpointer.save({"w": torch.ones(1000)}, 1).result(60)
executor = checkpointer._session.request(control.ReadStatus(), 10).executor_pid
os.kill(executor, signal.SIGSTOP)
checkpointer.save({"w": torch.ones(1000)}, 2)
snapshots = {step: checkpointer.save({"w": torch.ones(1000)}, step, persist=False) for step in (3, 4, 5, 6)}
print([step for step, each in snapshots.items() if step < 5 and each.result(60).path is None], flush=True)
os.kill(executor, signal.SIGCONT)
"""


def test_a_snapshot_that_a_newer_one_overtakes_is_told_and_not_counted_as_lost(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Snapshots come faster than the executor looks at them, which is stopped here. Each of them was whole in memory."""
    run = processes.python("-c", OVERTAKEN, tmp_path)
    assert run.wait(Deadline.SCRIPT) == 0, run.tail()
    assert "[3, 4]" in run.tail()
    assert committed(tmp_path) == [1, 2, 6], "and the newest is written at the end"
    ranks.alone()
