"""
The whole of: two pods on a real shared file system, each through a mount of its own, as a ReadWriteMany claim is mounted.

Called from: pytest; `make test-filesystem` installs what it needs, and where that is missing it says so.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.distributed import checkpoint as stock

from pillion import checkpointer
from pillion.wire import names
from process.ranks import Peer, Ranks
from support import moosefs, mounts, on_file_systems
from support.deadlines import Deadline
from support.file_systems import Kind

STEPS = (1, 2, 3)
NUMEL = 100_000


def values(step: int, rank: int) -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32) + step * 3 + rank * 7


LATE: Final = "mfsnegentrycacheto=2,mfsentrycacheto=2,mfsdirentrycacheto=2,mfsattrcacheto=2"
"""A mount that believes for 2 s what it has looked up, also that a name is not there."""


@pytest.fixture(params=["", LATE], ids=["default", "late names"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nothing_left: str
) -> Iterator[list[Path]]:
    """Two mounts of one file system."""
    on_file_systems.need(Kind.MOOSEFS, request.config)
    folder = tmp_path_factory.mktemp("moosefs")
    places = [folder / "mount-0", folder / "mount-1"]
    with contextlib.closing(moosefs.MooseFs(folder, places, request.param)):
        yield places


def test_what_two_pods_save_through_mounts_of_their_own_is_loaded_by_stock_dcp_from_either(
    ranks: Ranks, shared: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Commits look at files that another client of the file system has written; the next trainers load the newest, and go on."""
    root = tmp_path_factory.mktemp("checkpoints")

    def train(peer: Peer) -> list[int | None]:
        mounts.lay_over(root, shared[peer.rank])
        name = f"weight{peer.rank}"
        with checkpointer.Checkpointer(root / "run", policy={"retention": {"keepLast": 2}}) as opened:
            state: dict[str, Any] = {name: torch.zeros(NUMEL), "step": 0}
            found = opened.load(state)
            if found is not None:
                assert torch.equal(state[name], values(found, peer.rank))
            first = found or 0
            return [found] + [
                opened.save({name: values(step, peer.rank), "step": step}, step).result(Deadline.COMMITTED.s).step
                for step in (first + each for each in STEPS)
            ]

    assert ranks.start(train, num_ranks=2, pods="ab").finish() == [[None, 1, 2, 3]] * 2
    assert ranks.start(train, num_ranks=2, pods="cd", attempt=1).finish() == [[3, 4, 5, 6]] * 2
    for place in shared:
        steps = {each.name for each in (place / "run").glob("step-*")}
        assert steps == {names.step_directory(3), names.step_directory(5), names.step_directory(6)}, (
            "the last two, and the one that a load has verified"
        )
        for step in (5, 6):
            state = {f"weight{rank}": torch.zeros(NUMEL) for rank in (0, 1)}
            stock.load(state, checkpoint_id=place / "run" / names.step_directory(step), no_dist=True)
            assert all(torch.equal(state[f"weight{rank}"], values(step, rank)) for rank in (0, 1))
