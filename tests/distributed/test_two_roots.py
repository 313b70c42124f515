"""
The whole of: two pods whose root has one name and is not one storage: an emptyDir, a claim for each pod, a mount that was left out.

Called from: pytest. Needs root, to mount a directory over a path.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import pillion
from pillion import checkpointer
from process.ranks import Peer, Ranks
from support import mounts
from support.deadlines import Deadline


def state_of(step: int, rank: int) -> dict[str, Any]:
    return {f"weight{rank}": torch.full((4096,), float(step)), "step": step}


def test_pods_that_do_not_share_their_root_are_told_so_and_nothing_is_called_committed(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Every save fails on every rank, and so does the load; the text has both pods and both roots, and says which rank."""
    if absent := mounts.missing():
        pytest.skip(absent)
    root = tmp_path / "checkpoints"
    root.mkdir()
    for rank in (0, 1):
        (tmp_path / f"disk{rank}").mkdir()

    def train(peer: Peer) -> tuple[list[str], str]:
        mounts.lay_over(root, tmp_path / f"disk{peer.rank}")
        said = ["", ""]
        with checkpointer.Checkpointer(root) as opened:
            try:
                opened.load(state_of(0, peer.rank))
            except pillion.LoadError as err:
                said[0] = str(err)
            try:
                opened.save(state_of(1, peer.rank), 1).result(Deadline.COMMITTED.s)
            except pillion.SaveError as err:
                said[1] = str(err)
        return said, opened._session.runtime_dir

    for said, runtime_dir in ranks.start(train, num_ranks=2, pods="ab").finish():
        ranks.keeps(runtime_dir)
        for text in said:
            assert "do not share one root" in text
            assert text.count(str(root)) == 2
            assert "ranks [1]" in text
    assert not list(tmp_path.glob("disk*/step-*"))


def test_a_root_of_another_name_on_some_rank_is_an_error_of_the_constructor_on_every_rank(
    ranks: Ranks, tmp_path: Path
) -> None:
    """At once, and with both names: nobody waits for a sidecar of the other root."""

    def train(peer: Peer) -> str:
        try:
            checkpointer.Checkpointer(tmp_path / f"run-{peer.rank}")
        except pillion.SettingsError as err:
            return str(err)
        return "no error"

    for said in ranks.start(train, num_ranks=2).finish():
        assert str(tmp_path / "run-0") in said
        assert str(tmp_path / "run-1") in said
    assert not list(tmp_path.iterdir())
