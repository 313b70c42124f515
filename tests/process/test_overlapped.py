"""
The whole of: saves with overlap=True: what they return before, what waits for them, and what changes under them.

Called from: pytest.
Must never: run a backward pass (see process.ranks); gradients are set by hand.
"""

import threading
from pathlib import Path

import pytest
import torch

from pillion import checkpointer
from pillion.errors import StagingError
from pillion.handle import SaveHandle
from process import ranks as processes
from process.ranks import Ranks
from support import deadlines
from support.deadlines import Deadline

LARGE = 100_000
"""Elements of a tensor that is copied beside the training, not at once (overlap.SMALL_LEAF_BYTES)."""


def stepped(*weights: torch.Tensor) -> torch.optim.Optimizer:
    """An optimizer of these weights that has made a step, which changed nothing: they have no gradients."""
    optimizer = torch.optim.SGD(weights, lr=1.0)
    optimizer.step()
    return optimizer


def held(ranks: Ranks, root: Path) -> tuple[checkpointer.Checkpointer, int, list[SaveHandle]]:
    """A Checkpointer whose slots are all taken by saves that its stopped executor does not write: the next copy waits."""
    opened = ranks.open(root)
    executor = processes.executor_of(opened)
    processes.stop(executor)
    return opened, executor, [opened.save({"w": torch.zeros(LARGE)}, step) for step in (1, 2)]


def test_an_overlapped_save_returns_before_the_copy_and_the_optimizer_waits_for_it(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The step runs on while the copy waits; an optimizer's step does not change a weight before it was copied."""
    opened, executor, _ = held(ranks, tmp_path)
    weight = torch.nn.Parameter(torch.full((LARGE,), 7.0))
    small = torch.full((10,), 7.0)
    optimizer = stepped(weight)
    weight.grad = torch.ones(LARGE)
    handle = opened.save({"w": weight, "small": small}, 3, overlap=True)
    assert not handle.staged.done()
    small.fill_(-1)  # copied at once: such buffers change in a forward pass
    stepping = threading.Thread(target=optimizer.step)
    stepping.start()
    deadlines.eventually(
        lambda: processes.status(opened)["metrics"]["saves_waited"] == 1, Deadline.STAGED, "the copy waits for a slot"
    )
    assert float(weight.detach()[0]) == 7.0
    assert not handle.staged.done()
    processes.go_on(executor)
    stepping.join(Deadline.COMMITTED.s)
    assert float(weight.detach()[0]) == 6.0
    handle.result(Deadline.COMMITTED.s)
    state = {"w": torch.zeros(LARGE), "small": torch.zeros(10)}
    assert opened.load(state) == 3
    assert state["w"].unique().tolist() == [7.0]
    assert state["small"].unique().tolist() == [7.0]


@pytest.mark.parametrize("counted", [True, False], ids=["in place", "through data"])
def test_a_change_by_other_means_fails_the_overlapped_save_instead_of_tearing_it(
    ranks: Ranks, tmp_path: Path, counted: bool
) -> None:
    """A weight changed while its copy waits ends that save with StagingError and its name; the save after it is whole."""
    opened, executor, before = held(ranks, tmp_path)
    weight = torch.full((LARGE,), 7.0)
    _optimizer = stepped(weight)
    handle = opened.save({"model": {"w": weight}}, 3, overlap=True)
    changing = weight if counted else weight.data
    changing.mul_(2)
    processes.go_on(executor)
    error = handle.committed.exception(Deadline.COMMITTED.s)
    assert isinstance(error, StagingError)
    assert "'model.w'" in str(error)
    assert [each.result(Deadline.COMMITTED.s).step for each in before] == [1, 2]
    again = opened.save({"model": {"w": weight}}, 4, overlap=True)
    assert again.staged.done()
    changing.mul_(2)
    again.result(Deadline.COMMITTED.s)
    assert processes.committed(tmp_path) == [1, 2, 4]
    found = {"model": {"w": torch.zeros(LARGE)}}
    assert opened.load(found) == 4
    assert found["model"]["w"].unique().tolist() == [14.0]


def test_what_no_optimizer_steps_is_copied_before_an_overlapped_save_returns(ranks: Ranks, tmp_path: Path) -> None:
    """An average that is updated through `.data` right behind the save is the one of the save's step, beside weights that wait."""
    opened = ranks.open(tmp_path)
    weight, average = torch.nn.Parameter(torch.full((LARGE,), 1.0)), torch.full((LARGE,), 1.0)
    optimizer = stepped(weight)
    for step in range(1, 4):
        handle = opened.save({"w": weight, "ema": average}, step, overlap=True)
        average.data.fill_(step + 1.0)
        weight.grad = torch.full((LARGE,), -1.0)
        optimizer.step()
        handle.result(Deadline.COMMITTED.s)
        found = {"w": torch.zeros(LARGE), "ema": torch.zeros(LARGE)}
        assert opened.load(found) == step
        assert [tensor.unique().tolist() for tensor in found.values()] == [[float(step)], [float(step)]]
