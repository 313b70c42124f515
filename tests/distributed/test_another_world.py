"""
The whole of: a job whose trainers are killed comes back as another world: its pods in another order, fewer of them, more of them.

Called from: pytest.
Must never: save to storage what the next world has to find there; the sidecars of the dead brought it.
"""

import functools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pillion import checkpointer
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from process import ranks as processes
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline

NUMEL = 100_001
"""Does not divide by the worlds here."""
NEWEST = 7
POLICY = {"trigger": {"periodSteps": 100_000, "snapshotSteps": 1}}


def shard(step: int, peer: Peer) -> torch.Tensor:
    """A rank's part of the state after a step."""
    return (torch.arange(NUMEL, dtype=torch.float32) + step * 3).chunk(peer.world_size)[peer.rank]


def distributed(local: torch.Tensor, peer: Peer) -> torch.Tensor:
    """The state, of which a rank has a part; in a world of one it is that part."""
    if peer.world_size == 1:
        return local
    mesh = init_device_mesh("cpu", (peer.world_size,))
    return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([NUMEL]), stride=(1,))


def loaded(peer: Peer, root: Path, policy: dict[str, Any], expected: int) -> tuple[int | None, str, bool]:
    """What a rank of the next world loads: the step, from where, and whether its part is that of the expected step."""
    with checkpointer.Checkpointer(root, policy=policy) as opened:
        local = torch.zeros_like(shard(0, peer))
        step = opened.load({"weights": distributed(local, peer), "step": 0})
        report = opened.last_load
        return step, str(report.tier if report is not None else None), torch.equal(local, shard(expected, peer))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("a", "b"), ("b", "a")),
        (("a", "b"), ("a",)),
        (("a", "b"), ("b",)),
        (("a",), ("a", "b")),
        (("a", "b"), ("b", "c", "a")),
    ],
)
def test_the_newest_snapshot_reaches_another_world(
    ranks: Ranks, tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    """It was in memory only, and every rank of the next world loads its part of it, bit for bit."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"PILLION_LINGER_S": "60"}

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy=POLICY)
        local = shard(0, peer).clone()
        state = {"weights": distributed(local, peer), "step": 0}
        for step in range(1, NEWEST + 1):
            local.copy_(shard(step, peer))
            state["step"] = step
            opened.save(state, step).result(Deadline.STAGED.s)
        peer.tell(step)
        peer.hear()

    first = ranks.start(train, num_ranks=len(before), pods=before, env=env, store=store)
    first.hear(Deadline.COMMITTED)
    first.kill()
    resume = functools.partial(loaded, root=tmp_path, policy=POLICY, expected=NEWEST)
    second = ranks.start(resume, num_ranks=len(after), pods=after, env=env, store=store, attempt=1)
    found = second.finish(Deadline.LOADED)
    assert {(step, equal) for step, _, equal in found} == {(NEWEST, True)}, found


def test_a_pod_lost_in_the_middle_of_a_write_holds_the_next_world_up_no_longer_than_the_drain(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Its part of that save will never come: who waits for it gives it the drain time that a pod has, and then goes on without."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder, root = tmp_path / "faults", tmp_path / "runs"
    folder.mkdir()
    policy = {"trigger": {"periodSteps": 1}, "drain": {"timeoutSeconds": 4}}
    held = faults.fail_at(rank=1, phase=FaultPoint.WRITE, fault=faults.Kind.HOLD, step=2)
    env = {"PILLION_LINGER_S": "60"} | faults.to_environment(folder, [held])

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(root, policy=policy)
        local = shard(1, peer).clone()
        state = {"weights": distributed(local, peer), "step": 1}
        opened.save(state, 1).result(Deadline.COMMITTED.s)
        local.copy_(shard(2, peer))
        opened.save(state | {"step": 2}, 2)
        status = processes.status(opened)
        peer.tell((status["pid"], status["executor_pid"], opened._session.runtime_dir))
        peer.hear()

    first = ranks.start(train, num_ranks=2, pods=("a", "b"), env=env, store=store)
    (_, lost) = first.hear(Deadline.COMMITTED)
    deadlines.eventually(lambda: faults.hits(folder), Deadline.COMMITTED, "the second pod writes step 2")
    first.kill()
    for pid in lost[:2]:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(lost[2])
    resume = functools.partial(loaded, root=root, policy=policy, expected=1)
    second = ranks.start(resume, num_ranks=2, pods=("a", "c"), env=env, store=store, attempt=1)
    found = second.finish(Deadline.LOADED)
    assert {(step, equal) for step, _, equal in found} == {(1, True)}, found
    ranks.alone()
    log = (root / ".pillion" / "sidecar-0.log").read_text()
    assert "step 2 belongs to the previous session" in log
    assert "internal error" not in log
