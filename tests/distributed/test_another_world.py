"""
The whole of: a job whose trainers are killed comes back as another world: its pods in another order, fewer of them, more of them.

Called from: pytest.
Must never: save to storage before the crash; what the next world finds there was brought there by the sidecars of the dead.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pillion import checkpointer
from process.ranks import Peer, Ranks
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

    def resume(peer: Peer) -> tuple[int | None, str, bool]:
        with checkpointer.Checkpointer(tmp_path, policy=POLICY) as opened:
            local = torch.zeros_like(shard(0, peer))
            state = {"weights": distributed(local, peer), "step": 0}
            loaded = opened.load(state)
            report = opened.last_load
            return loaded, str(report.tier if report is not None else None), torch.equal(local, shard(NEWEST, peer))

    first = ranks.start(train, num_ranks=len(before), pods=before, env=env, store=store)
    first.hear(Deadline.COMMITTED)
    first.kill()
    second = ranks.start(resume, num_ranks=len(after), pods=after, env=env, store=store, attempt=1)
    found = second.finish(Deadline.LOADED)
    assert {(loaded, equal) for loaded, _, equal in found} == {(NEWEST, True)}, found
