"""
The whole of: how much of the processor the executor takes beside training, as the kernel says it.

Called from: pytest.
Must never: look by chance; a held save waits for the test.
"""

import os
from pathlib import Path

import psutil
import pytest
import torch

from pillion import checkpointer
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from pillion_sidecar.executor import priority
from process import ranks as processes
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline

pytestmark = pytest.mark.skipif(not priority.AUTOGROUP.exists(), reason="this kernel does not group by session")


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4096,), float(step))}


def group_nice(pid: int) -> int:
    """Nice value of a process' session: the last word of "/autogroup-123 nice 10"."""
    return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])


def test_the_executor_gives_way_while_it_writes_beside_training_and_not_after_the_trainers_death(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a save and after it its session has nice 0, in the middle 10; a trainer that dies meanwhile puts it back to 0 at once."""
    kit, root = tmp_path / "kit", tmp_path / "root"
    kit.mkdir()
    hold = faults.fail_at(phase=FaultPoint.WRITE, fault=faults.Kind.HOLD, step=2)
    for name, value in faults.to_environment(kit, [hold]).items():
        monkeypatch.setenv(name, value)

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(root)
        opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
        found = processes.status(opened)
        peer.tell((found["pid"], found["executor_pid"]))
        peer.hear()
        opened.save(state_of(2), 2)
        peer.hear()

    job = ranks.start(train)
    sidecar, executor = job[0].hear()
    assert os.getsid(executor) == executor != os.getsid(sidecar)
    assert psutil.Process(executor).nice() > psutil.Process(sidecar).nice()
    assert group_nice(executor) == 0
    job.say()
    deadlines.eventually(lambda: faults.hits(kit), Deadline.STAGED, "the executor writes step 2")
    assert group_nice(executor) == priority.GROUP_NICE
    assert group_nice(sidecar) == 0, "the supervisor answers trainers as quickly as ever"
    job.kill()
    deadlines.eventually(lambda: group_nice(executor) == 0, Deadline.SETTLE, "nobody trains beside it any more")
    faults.release(kit)
    deadlines.eventually(lambda: processes.committed(root) == [1, 2], Deadline.DRAINED, "step 2 is on storage")
