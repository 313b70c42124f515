"""
The whole of: the ranks of one pod stage a step on all of them or on none, whichever comes first.

Called from: pytest.
Must never: let the order of the ranks be chance; each waits until it is told.
"""

from pathlib import Path
from typing import Any

import torch

from pillion import checkpointer
from pillion.errors import SaveError, SaveSkipped, StagingError, UnsupportedLeaf
from process import ranks as processes
from process.ranks import Peer, Ranks
from support.deadlines import Deadline


def state_of(step: int, rank: int) -> dict[str, Any]:
    return {"shared": torch.full((512,), float(step)), f"own{rank}": torch.full((64,), float(10 * step + rank))}


def test_a_rank_that_cannot_stage_fails_the_step_for_ranks_that_came_before_and_after(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Rank 0 has sealed, rank 1 fails, rank 2 comes later: all three handles end at once, with rank 1's reason, and the next
    step is committed."""

    def train(peer: Peer) -> str:
        with checkpointer.Checkpointer(tmp_path) as opened:
            peer.hear()
            bad = {"closure": lambda: None} if peer.rank == 1 else {}
            handle = opened.save({**state_of(1, peer.rank), **bad}, 1)
            if peer.rank == 0:
                peer.tell()
            error = handle.committed.exception(Deadline.REPLY.s)
            peer.tell()
            peer.hear()
            opened.save(state_of(2, peer.rank), 2).result(Deadline.COMMITTED.s)
            if peer.rank == 1:
                assert isinstance(error, UnsupportedLeaf)
            else:
                assert isinstance(error, StagingError)
                assert list(error.failures) == [1]
            return str(error)

    job = ranks.start(train, num_ranks=3, env={"PILLION_PEER_TIMEOUT_S": "300"})
    job[0].say()
    job[0].hear()
    job[1].say()
    job[1].hear()
    job[0].hear()
    job[2].say()
    job[2].hear()
    job.say()
    assert all("'closure'" in text for text in job.finish())
    assert processes.committed(tmp_path) == [2]


def test_a_skipped_step_is_skipped_on_every_rank_and_counted_once(ranks: Ranks, tmp_path: Path) -> None:
    """With overlap: Skip and storage that takes for ever, every rank's handle of the same step is SaveSkipped."""

    def train(peer: Peer) -> tuple[list[bool], dict[str, Any]]:
        policy = {"staging": {"slots": 2, "overlap": "Skip"}}
        with checkpointer.Checkpointer(tmp_path, policy=policy) as opened:
            if peer.rank == 0:
                peer.tell(processes.executor_of(opened))
            peer.hear()
            handles = [opened.save(state_of(step, peer.rank), step) for step in (1, 2)]
            peer.tell()
            peer.hear()
            handles.append(opened.save(state_of(3, peer.rank), 3))
            peer.tell()
            peer.hear()
            errors = [handle.committed.exception(Deadline.COMMITTED.s) for handle in handles]
            metrics = processes.status(opened)["metrics"]
            opened.save(state_of(4, peer.rank), 4).result(Deadline.COMMITTED.s)
            assert all(error is None or isinstance(error, SaveError) for error in errors)
            return [isinstance(error, SaveSkipped) for error in errors], metrics

    job = ranks.start(train, num_ranks=3)
    executor = job[0].hear()
    processes.stop(executor)
    job.say()
    job.hear()
    job.say()
    job.hear()
    processes.go_on(executor)
    job.say()
    for skipped, metrics in job.finish():
        assert skipped == [False, False, True]
        assert (metrics["saves_skipped"], metrics["saves_failed"]) == (1, 0)
    assert processes.committed(tmp_path) == [1, 2, 4]
