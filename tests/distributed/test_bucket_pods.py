"""
The whole of: a job of two pods without a shared volume, whose root is a bucket: what becomes of a save in mid-upload when trainers, the job's
store or a whole pod are lost, and who can load it.

Called from: pytest.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Final

import psutil
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distributed.bucket_jobs import FOLDER, ask, check_bucket, finish, save, variables
from distributed.scene import PODS, train
from pillion import checkpointer
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline
from support.object_stores import behind
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation
from support.store_host import StoreHost

NUMEL: Final = 100_001
"""Does not divide by two."""
DATA_OF_STEP_2: Final = Only(operation=Operation.PUT, key=r"/step-2/__\d+_\d+\..*\.distcp$")

pytestmark = pytest.mark.skipif(
    os.environ.get("PILLION_MATRIX") != "all", reason="make matrix runs these: minutes each"
)


def test_what_two_pods_have_saved_one_rank_loads(ranks: Ranks, s3_proxy: FaultProxy) -> None:
    """The bucket is all that the two worlds have in common; the tensors are cut anew."""
    environment = variables(s3_proxy)
    whole = torch.arange(NUMEL, dtype=torch.float32)

    def two(peer: Peer) -> None:
        with checkpointer.Checkpointer(environment["MATRIX_ROOT"]) as opened:
            mesh = init_device_mesh("cpu", (peer.world_size,))
            local = whole.chunk(peer.world_size)[peer.rank].clone()
            weights = DTensor.from_local(local, mesh, [Shard(0)], shape=whole.shape, stride=(1,))
            opened.save({"weights": weights, f"own{peer.rank}": peer.rank}, 1).result(Deadline.COMMITTED.s)

    def one(_: Peer) -> tuple[int | None, bool, object]:
        with checkpointer.Checkpointer(environment["MATRIX_ROOT"]) as opened:
            state = {"weights": torch.zeros(NUMEL), "own1": -1}
            step = opened.load(state)
            return step, torch.equal(torch.as_tensor(state["weights"]), whole), state["own1"]

    ranks.start(two, num_ranks=2, pods=PODS, env=environment).finish()
    ranks.alone()
    assert ranks.start(one, pods="c", env=environment).finish() == [(1, True, 1)]


def test_trainers_and_store_are_killed_in_mid_upload_and_the_sidecars_commit_through_the_bucket(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Nobody is left that hosts a store, so that the pods meet in the bucket; the successors load the step that no trainer saw committed."""
    environment, store = variables(s3_proxy), StoreHost()
    job = ranks.start(train, num_ranks=2, pods=PODS, env=environment, store=store)
    assert save(job, 1) == [1, 1]
    held = s3_proxy.arm(Fault.STALL_UPLOAD, DATA_OF_STEP_2, times=None)
    assert ask(job, "save", 2) == ["trains on"] * 2
    deadlines.eventually(lambda: held.struck, Deadline.COMMITTED, "step 2 is on its way")
    job.kill()
    store.end()
    s3_proxy.disarm()
    s3_proxy.release()
    deadlines.eventually(
        lambda: behind.committed(s3_proxy.place, FOLDER) == [1, 2], Deadline.DRAINED, "the sidecars commit step 2"
    )
    assert s3_proxy.seen(Only(operation=Operation.PUT, key=r"/\.pillion/meetings/")), "they have met in the bucket"
    successor = StoreHost()
    try:
        job = ranks.start(train, num_ranks=2, pods=PODS, env=environment, store=successor, attempt=1)
        assert ask(job, "load") == [2, 2]
        assert save(job, 3) == [3, 3]
        finish(job)
    finally:
        successor.end()
    check_bucket(s3_proxy, tmp_path)


def test_the_coordinators_pod_is_lost_in_mid_upload_and_the_job_goes_on_from_the_step_before(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Its memory is gone, so step 2 is as well; what is left of it in the bucket is in nobody's way when step 2 is saved again."""
    environment = variables(s3_proxy)
    job = ranks.start(train, num_ranks=2, pods=PODS, env=environment)
    assert save(job, 1) == [1, 1]
    supervisor, executor = ask(job, "pids")[0]
    arguments = psutil.Process(supervisor).cmdline()
    held = s3_proxy.arm(Fault.STALL_UPLOAD, DATA_OF_STEP_2, times=None)
    assert ask(job, "save", 2) == ["trains on"] * 2
    deadlines.eventually(lambda: len(held.struck) >= 2, Deadline.COMMITTED, "step 2 is on its way in both pods")
    for pid in (supervisor, executor):
        os.kill(pid, signal.SIGKILL)
    job.kill()
    shutil.rmtree(arguments[arguments.index("--runtime-dir") + 1])
    s3_proxy.disarm()
    s3_proxy.release()
    job = ranks.start(train, num_ranks=2, pods=("c", PODS[1]), env=environment, attempt=1)
    assert ask(job, "load") == [1, 1]
    for step in (2, 3):
        assert save(job, step) == [step, step]
    finish(job)
    assert behind.committed(s3_proxy.place, FOLDER)[-1] == 3
    check_bucket(s3_proxy, tmp_path)
