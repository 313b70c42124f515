"""
The whole of: two pods of one rank each, with a bucket, and a disk of the node in each: what they hold there when the bucket does not answer, what
comes back when trainers, pods or a node are lost, and what a disk costs that cannot be used.

Called from: pytest.
Must never: let a sidecar of an earlier job serve a later one, where the disks are to serve it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from distributed.bucket_jobs import FOLDER, check_bucket, variables
from distributed.scene import NUMEL, PODS, check_state, state_of
from pillion import checkpointer
from pillion.errors import LoadError, PillionError
from pillion.wire import names
from process.ranks import Job, Peer, Ranks
from support import deadlines, file_systems
from support.deadlines import Deadline
from support.file_systems import Kind as FileSystem
from support.object_stores import behind
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation

DATA: Final = Only(operation=Operation.PUT, key=r"/__\d+_\d+\..*\.distcp$")
POLICY: Final[dict[str, Any]] = {"trigger": {"periodSteps": 10, "localSteps": 2}}
RESCUES: Final = "TEST_RESCUES"
"""Whether a dead trainer's newest snapshot goes to storage, as the policy says it: Save or Skip."""
DISKS: Final = "TEST_DISKS"
LEAST: Final = "loop,data=writeback,noauto_da_alloc"
"""The least that ext4 promises, as in test_power_loss.py: neither data before names, nor a flush at a rename that replaces."""
IMAGE_MIB: Final = 64


def train(peer: Peer) -> None:
    """A trainer that does what the test says, and says what came of it. Steps that are multiples of 10 are persisted, even ones are held."""
    disk = Path(os.environ[DISKS]) / PODS[peer.rank]
    trigger = POLICY["trigger"] | {"onTermination": os.environ.get(RESCUES, "Save")}
    policy = {"trigger": trigger, "storage": {"local": {"path": str(disk)}}}
    with checkpointer.Checkpointer(os.environ["MATRIX_ROOT"], policy=policy) as opened:
        handles = {}
        while (told := peer.hear()) is not None:
            command, step = told
            if command == "save":
                handles[step] = opened.save(state_of(step, peer.rank), step)
                peer.tell(_outcome(handles[step].held.result))
            elif command == "result":
                peer.tell(_outcome(lambda timeout_s, of=handles[step]: of.result(timeout_s).path))
            elif command == "load":
                peer.tell(_load(opened, peer.rank))


def _outcome(wait: Any) -> Any:
    try:
        return wait(Deadline.COMMITTED.s)
    except PillionError as err:
        return f"{type(err).__name__}: {err}"


def _load(opened: checkpointer.Checkpointer, rank: int) -> Any:
    state = state_of(0, rank, named=-1)
    try:
        step = opened.load(state)
    except LoadError as err:
        return f"{type(err).__name__}: {err}"
    assert opened.last_load is not None
    if step is not None:
        check_state(state, step, rank)
    return step, str(opened.last_load.tier)


def ask(job: Job, command: str, step: int = 0) -> list[Any]:
    for trainer in job.trainers:
        trainer.say((command, step))
    return job.hear()


def finish(job: Job) -> None:
    for trainer in job.trainers:
        trainer.say(None)
    job.finish(Deadline.DRAINED)


def lose_pods(ranks: Ranks, job: Job) -> None:
    """Trainers, sidecars and their memory go; the disks of the nodes stay."""
    # The trainers first: a living one starts another sidecar.
    job.kill()
    sidecars = ranks._named("pillion_sidecar")
    folders = [Path(line[line.index("--runtime-dir") + 1]) for line in (each.cmdline() for each in sidecars)]
    processes = [*sidecars, *ranks._named("pillion_sidecar.executor.worker")]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=Deadline.PROCESS_EXIT.s)
    for folder in folders:
        shutil.rmtree(folder)
    ranks.alone()


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    for pod in PODS:
        (tmp_path / "disks" / pod).mkdir(parents=True)
    return tmp_path / "disks"


@pytest.fixture
def environment(s3_proxy: FaultProxy, disks: Path) -> dict[str, str]:
    return variables(s3_proxy) | {
        DISKS: str(disks),
        "PILLION_OWNER_SILENT_S": "0.5",
        # Nothing here is about an executor that hangs, and one that starts on a busy machine answers late.
        "PILLION_PING_TIMEOUT_S": "20",
    }


def num_bytes_read(proxy: FaultProxy, *, rank: int) -> int:
    """Bytes of a rank's files that the bucket has sent."""
    files = Only(operation=Operation.GET, key=rf"/__{rank}_\d+\..*\.distcp$")
    return sum(each.num_bytes_down for each in proxy.seen(files))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A file system of 1 MiB, and how it gets larger."""

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"this machine does not let us mount a tmpfs: {done.stderr.strip()}")

    mount("size=1m")
    try:
        yield lambda: mount("remount,size=1g")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def copies(disks: Path, pod: str) -> list[str]:
    return sorted(path.stem for path in (disks / pod).glob("*/rank-*/*.head"))


def test_what_only_the_nodes_have_is_loaded_by_new_pods_on_them_and_then_uploaded(
    ranks: Ranks, s3_proxy: FaultProxy, environment: dict[str, str], disks: Path, tmp_path: Path
) -> None:
    """Step 10 is in the bucket, steps 20 and 22 are on the disks: 20 on its way to a bucket that hangs, 22 for the disks alone."""
    job = ranks.start(train, num_ranks=2, pods=PODS, env=environment)
    assert ask(job, "save", 10) == [None, None]
    assert ask(job, "result", 10) == [f"{environment['MATRIX_ROOT']}/step-10"] * 2
    s3_proxy.arm(Fault.HANG, DATA, times=None)
    assert ask(job, "save", 20) == [None, None]
    assert ask(job, "save", 22) == [None, None]
    assert ask(job, "result", 22) == [None, None]
    lose_pods(ranks, job)
    s3_proxy.disarm()
    s3_proxy.release()
    assert behind.committed(s3_proxy.place, FOLDER) == [10]
    job = ranks.start(train, num_ranks=2, pods=PODS, env=environment)
    assert ask(job, "load") == [(22, "local")] * 2
    deadlines.eventually(
        lambda: behind.committed(s3_proxy.place, FOLDER) == [10, 22], Deadline.COMMITTED, "step 22 is in the bucket"
    )
    assert ask(job, "save", 30) == [None, None]
    assert ask(job, "result", 30) == [f"{environment['MATRIX_ROOT']}/step-30"] * 2
    finish(job)
    check_bucket(s3_proxy, tmp_path / "bucket")
    assert all(len(copies(disks, pod)) == 2 for pod in PODS)


def test_a_lost_node_reads_the_bucket_and_the_other_one_its_disk(
    ranks: Ranks, s3_proxy: FaultProxy, environment: dict[str, str], disks: Path
) -> None:
    """Step 22 is on one disk only, so that nobody can use it; of step 20, which is committed, one pod asks the bucket for its data."""
    environment |= {RESCUES: "Skip"}
    job = ranks.start(train, num_ranks=2, pods=PODS, env=environment)
    assert ask(job, "save", 20) == [None, None]
    assert ask(job, "result", 20) == [f"{environment['MATRIX_ROOT']}/step-20"] * 2
    assert ask(job, "save", 22) == [None, None]
    lose_pods(ranks, job)
    shutil.rmtree(disks / "b")
    (disks / "b").mkdir()
    s3_proxy.forget()
    job = ranks.start(train, num_ranks=2, pods=PODS, env=environment)
    assert ask(job, "load") == [(20, "storage")] * 2
    assert num_bytes_read(s3_proxy, rank=1) > NUMEL * 4
    assert num_bytes_read(s3_proxy, rank=0) < 10_000, (
        "the number of the step, which both ranks have, and rank 0 has written"
    )
    assert ask(job, "save", 30) == [None, None]
    finish(job)


@pytest.mark.parametrize("victim", ["executor", "sidecar"])
def test_who_is_killed_in_mid_upload_has_a_successor_that_uploads_the_same_step(
    ranks: Ranks, s3_proxy: FaultProxy, environment: dict[str, str], tmp_path: Path, victim: str
) -> None:
    """Of the coordinator's pod, while the other pod waits. The trainers' saves go on meanwhile."""
    job = ranks.start(train, num_ranks=2, pods=PODS, env=environment)
    assert ask(job, "save", 10) == [None, None]
    assert ask(job, "result", 10) == [f"{environment['MATRIX_ROOT']}/step-10"] * 2
    struck = s3_proxy.arm(Fault.STALL_UPLOAD, DATA, times=None)
    assert ask(job, "save", 20) == [None, None]
    deadlines.eventually(lambda: len(struck.struck) >= 2, Deadline.COMMITTED, "both pods upload")
    module = "pillion_sidecar.executor.worker" if victim == "executor" else "pillion_sidecar"
    process = next(each for each in ranks._named(module) if each.environ().get(names.ENV_POD) == PODS[0])
    os.kill(process.pid, signal.SIGKILL)
    s3_proxy.disarm()
    s3_proxy.release()
    if victim == "executor":
        assert ask(job, "result", 20) == [f"{environment['MATRIX_ROOT']}/step-20"] * 2
    deadlines.eventually(
        lambda: behind.committed(s3_proxy.place, FOLDER) == [10, 20], Deadline.COMMITTED, "step 20 is in the bucket"
    )
    assert ask(job, "save", 30) == [None, None]
    assert ask(job, "result", 30) == [f"{environment['MATRIX_ROOT']}/step-30"] * 2
    finish(job)
    check_bucket(s3_proxy, tmp_path / "bucket")


def test_a_disk_that_is_full_is_left_out_and_the_save_goes_to_the_bucket(
    ranks: Ranks, s3_proxy: FaultProxy, environment: dict[str, str], disks: Path, tmp_path: Path
) -> None:
    """Of one pod only: the other one's copy is removed again. When there is room again, the disks are used again."""
    with small_disk(disks / "b") as enlarge:
        job = ranks.start(train, num_ranks=2, pods=PODS, env=environment)
        assert ask(job, "save", 10) == [None, None]
        assert ask(job, "result", 10) == [f"{environment['MATRIX_ROOT']}/step-10"] * 2
        assert behind.committed(s3_proxy.place, FOLDER) == [10]
        assert copies(disks, "a") == copies(disks, "b") == []
        enlarge()
        assert ask(job, "save", 20) == [None, None]
        assert ask(job, "result", 20) == [f"{environment['MATRIX_ROOT']}/step-20"] * 2
        assert len(copies(disks, "a")) == len(copies(disks, "b")) == 1
        finish(job)
    check_bucket(s3_proxy, tmp_path / "bucket")


def test_what_was_held_is_on_the_disks_after_a_power_cut(
    ranks: Ranks, s3_proxy: FaultProxy, environment: dict[str, str], tmp_path: Path
) -> None:
    """The nodes lose power right after a save was said to be held, while the bucket hangs: new pods load it from the disks, and upload it."""
    if absence := file_systems.absent(FileSystem.EXT4):
        pytest.skip(absence.reason)
    image, copy = file_systems.make_image(FileSystem.EXT4, tmp_path / "disk.img", IMAGE_MIB), tmp_path / "copy.img"
    with file_systems.mounted_image(FileSystem.EXT4, image, tmp_path / "before", options=LEAST) as before:
        job = ranks.start(train, num_ranks=2, pods=PODS, env=environment | {DISKS: str(before)})
        assert ask(job, "save", 10) == [None, None]
        assert ask(job, "result", 10) == [f"{environment['MATRIX_ROOT']}/step-10"] * 2
        s3_proxy.arm(Fault.HANG, DATA, times=None)
        assert ask(job, "save", 20) == [None, None]
        assert ask(job, "save", 22) == [None, None]
        # What the device has now, and nothing of what the file system still has in memory.
        shutil.copyfile(image, copy)
        lose_pods(ranks, job)
    s3_proxy.disarm()
    s3_proxy.release()
    assert behind.committed(s3_proxy.place, FOLDER) == [10]
    with file_systems.mounted_image(FileSystem.EXT4, copy, tmp_path / "after", options=LEAST) as after:
        job = ranks.start(train, num_ranks=2, pods=PODS, env=environment | {DISKS: str(after)})
        assert ask(job, "load") == [(22, "local")] * 2
        deadlines.eventually(
            lambda: behind.committed(s3_proxy.place, FOLDER) == [10, 22], Deadline.COMMITTED, "step 22 is in the bucket"
        )
        finish(job)
    check_bucket(s3_proxy, tmp_path / "bucket")
