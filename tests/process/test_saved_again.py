"""
The whole of: a step that is saved again after a load of an older one, in the same session: no file of the committed one is touched
before the new one is committed.

Called from: pytest.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as stock

from pillion import checkpointer
from pillion.errors import SaveError
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from pillion.testing.faults import Kind
from pillion.wire import names
from process.ranks import Ranks
from support.deadlines import Deadline

TIMES = 4
"""As many attempts as one save gets; an executor that dies is tried half as often."""


def values(number: int) -> torch.Tensor:
    return torch.arange(4096, dtype=torch.float32) + number


def stored(root: Path, step: int) -> torch.Tensor:
    """What stock DCP finds."""
    state = {"w": torch.zeros(4096)}
    stock.load(state, checkpoint_id=root / names.step_directory(step), no_dist=True)
    return state["w"]


@pytest.fixture
def rolled_back(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> tuple[checkpointer.Checkpointer, Path, Callable[[], None]]:
    """Steps 1 and 2 are committed and 1 is loaded; the third value arms the fault of the test's parameter for step 2."""
    folder, root = tmp_path / "faults", tmp_path / "run"
    folder.mkdir()
    fault = faults.fail_at(phase=FaultPoint.WRITE, fault=request.param, step=2, times=TIMES)
    for name, text in faults.to_environment(folder, [fault]).items():
        monkeypatch.setenv(name, text)
    # What has struck already strikes no more.
    struck = [folder / f"0.{number}.hit" for number in range(TIMES)]
    for file in struck:
        file.touch()
    opened = ranks.open(root)
    for step in (1, 2):
        opened.save({"w": values(step)}, step).result(Deadline.COMMITTED.s)
    assert opened.load({"w": torch.zeros(4096)}, step=1) == 1

    def arm() -> None:
        for file in struck:
            file.unlink()

    return opened, root, arm


@pytest.mark.parametrize("rolled_back", [Kind.SIGKILL], indirect=True)
def test_a_committed_step_survives_a_second_save_of_it_that_fails(
    rolled_back: tuple[checkpointer.Checkpointer, Path, Callable[[], None]],
) -> None:
    """Every executor dies in it: stock DCP reads what was committed, bit for bit. The matrix has storage that refuses."""
    opened, root, arm = rolled_back
    arm()
    with pytest.raises(SaveError):
        opened.save({"w": values(7)}, 2).result(Deadline.COMMITTED.s)
    assert torch.equal(stored(root, 2), values(2))
    opened.save({"w": values(8)}, 3).result(Deadline.COMMITTED.s)
    assert torch.equal(stored(root, 3), values(8))


@pytest.mark.parametrize("rolled_back", [Kind.EIO], indirect=True)
def test_a_second_save_of_a_step_takes_its_place(
    rolled_back: tuple[checkpointer.Checkpointer, Path, Callable[[], None]],
) -> None:
    """With files of other names; those of the first are gone, and what lies beside them stays."""
    opened, root, _ = rolled_back
    folder = root / names.step_directory(2)
    (folder / "config.json").write_text("mine")
    (folder / names.OLD_MANIFEST).write_text("mine")
    before = {path.name for path in folder.glob("*.distcp")}
    opened.save({"w": values(7)}, 2).result(Deadline.COMMITTED.s)
    after = {path.name for path in folder.glob("*.distcp")}
    assert torch.equal(stored(root, 2), values(7))
    assert len(after) == len(before) == 1
    assert not after & before
    assert (folder / "config.json").read_text() == (folder / names.OLD_MANIFEST).read_text() == "mine"
    assert opened.latest() is not None


def test_a_step_that_another_program_has_committed_is_left_as_it_is(ranks: Ranks, tmp_path: Path) -> None:
    """The save is refused before a byte is written there; what comes behind it is saved, and a load of that step gives theirs."""
    folder = tmp_path / names.step_directory(2)
    stock.save({"w": values(50)}, checkpoint_id=folder, no_dist=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    opened = ranks.open(tmp_path)
    with pytest.raises(SaveError, match="Pillion did not write"):
        opened.save({"w": values(2)}, 2).result(Deadline.COMMITTED.s)
    opened.save({"w": values(3)}, 3).result(Deadline.COMMITTED.s)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    opened.close()
    ranks.alone()
    again = ranks.open(tmp_path)
    state = {"w": torch.zeros(4096)}
    assert again.load(state, step=2) == 2
    assert torch.equal(state["w"], values(50))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
