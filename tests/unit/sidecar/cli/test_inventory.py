"""
The whole of: which state a step's folder has, whatever a crash or another program has left in it.

Called from: pytest.
"""

import os
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as stock

from pillion.wire import names
from pillion_sidecar.checkpoint import commit, milestones, pins
from pillion_sidecar.cli import inventory, listing
from pillion_sidecar.cli.inventory import State
from pillion_sidecar.storage.local import LocalFolder
from support.parts import write_part


def make(root: Path, step: int, *, ranks: int = 1, world_size: int = 1, generation: str = "1") -> Path:
    """A step that so many ranks of the world have written."""
    folder = root / names.step_directory(step)
    folder.mkdir()
    for rank in range(ranks):
        write_part(folder, rank, world_size=world_size, generation=generation, step=step)
    return folder


def commit_all(root: Path, steps: dict[int, str]) -> None:
    for step, generation in steps.items():
        assert commit.finish(LocalFolder(str(make(root, step, generation=generation)))) is not None


def states(root: Path) -> dict[int | None, State]:
    return {each.step: each.state for each in inventory.of_root(LocalFolder(str(root)))}


def test_every_state_is_told_from_the_others(tmp_path: Path) -> None:
    """Committed, damaged, complete, torn, of another program; a file and a folder of other names are none."""
    commit_all(tmp_path, {1: "1", 2: "1"})
    (tmp_path / "step-2" / names.MANIFEST).write_bytes(b"{")
    make(tmp_path, 3, ranks=2, world_size=2)
    make(tmp_path, 4, ranks=1, world_size=2)
    (tmp_path / "step-5").mkdir()
    stock.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "step-6", no_dist=True)
    commit_all(tmp_path, {7: "1"})
    os.unlink(tmp_path / "step-7" / names.MANIFEST)
    (tmp_path / "step-8").write_text("a file")
    (tmp_path / "step-009").mkdir()
    assert states(tmp_path) == {
        1: State.COMMITTED,
        2: State.DAMAGED,
        3: State.COMPLETE,
        4: State.TORN,
        5: State.TORN,
        6: State.STOCK,
        7: State.DAMAGED,
    }


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """A complete step stays without a commit: that is the next load's."""
    make(tmp_path, 3)
    before = sorted(tmp_path.rglob("*"))
    assert states(tmp_path) == {3: State.COMPLETE}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_file_that_is_too_short_makes_a_step_torn(tmp_path: Path) -> None:
    """The part is there, and its data is not: the rank does not count."""
    folder = make(tmp_path, 3, ranks=2, world_size=2)
    data = folder / names.data_file(1, 0, "1")
    data.write_bytes(data.read_bytes()[:-1])
    [found] = inventory.of_root(LocalFolder(str(tmp_path)))
    assert (found.state, found.ranks_there, found.ranks) == (State.TORN, 1, 2)


def test_notes_tell_newest_verified_pinned_and_left_behind(tmp_path: Path) -> None:
    """Training went back behind step 30: step 20 was saved last, and is the one that a load takes."""
    commit_all(tmp_path, {10: "1", 30: "1", 20: "2"})
    root = LocalFolder(str(tmp_path))
    milestones.note_verified(root, 10)
    pins.pin(root, 30)
    pins.pin(root, 30, holder="cluster")
    table = listing.table(inventory.of_root(root), 0, is_wide=False)
    cells = {line.split()[0]: line for line in table.splitlines()}
    assert cells["10"].endswith("verified")
    assert cells["20"].endswith("newest")
    assert cells["30"].endswith("cluster,people   left behind")


@pytest.mark.parametrize("is_wide", [False, True])
def test_the_table_names_its_columns(tmp_path: Path, is_wide: bool) -> None:
    """`-o wide` adds generation and place."""
    commit_all(tmp_path, {10: "1"})
    head = listing.table(inventory.of_root(LocalFolder(str(tmp_path))), 0, is_wide=is_wide).splitlines()[0].split()
    assert head == list(listing.WIDE if is_wide else listing.HEADS)
