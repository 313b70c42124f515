"""
The whole of: what a file system holds when the power goes, at every phase of a save and after it was told: real ext4 on a block device.

Called from: pytest. Needs root, loop devices and mkfs.ext4; skipped elsewhere, with what is missing.

A copy of the device's image, taken while the save is held, has what the file system had written out by then and nothing of what it still
had in memory: what a disk holds after a power cut, but for writes that the disk itself reorders. Mounting the copy replays its journal.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.distributed import checkpoint as stock

from distributed.scene import BOUNDS, NUMEL, PODS, train, values
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from pillion.testing.faults import Kind
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.storage.local import LocalFolder
from process import ranks as processes
from process.ranks import Ranks
from support import deadlines, file_systems
from support.deadlines import Deadline
from support.file_systems import Kind as FileSystem
from support.store_host import StoreHost

SIZE_MIB: Final = 64
OPTIONS: Final = "loop,data=writeback,noauto_da_alloc"
"""The least that ext4 promises: neither data before names, nor a flush at a rename that replaces."""


@dataclass(frozen=True, slots=True)
class Disk:
    """An ext4 of its own."""

    image: Path
    mounted: Path

    def copied(self, to: Path) -> Path:
        """The power is lost: what is on the device now. Nothing is flushed for it."""
        shutil.copyfile(self.image, to)
        return to


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if absence := file_systems.absent(FileSystem.EXT4):
        pytest.skip(absence.reason)
    image = file_systems.make_image(FileSystem.EXT4, tmp_path / "disk.img", SIZE_MIB)
    with file_systems.mounted_image(FileSystem.EXT4, image, tmp_path / "disk", options=OPTIONS) as folder:
        yield Disk(image, folder)


@pytest.mark.parametrize(
    ("phase", "committed"),
    [
        (FaultPoint.WRITE, False),
        (FaultPoint.FSYNC, False),
        (FaultPoint.REPORT, False),
        (FaultPoint.COMMIT, False),
        (FaultPoint.PUBLISH, False),
        (FaultPoint.RETAIN, True),
        (None, True),
    ],
    ids=["write", "fsync", "report", "commit", "publish", "retain", "told"],
)
def test_a_power_cut_leaves_the_newest_commit_or_the_one_before(
    disk: Disk, ranks: Ranks, tmp_path: Path, phase: FaultPoint | None, *, committed: bool
) -> None:
    """Whatever is named as committed loads bit for bit, what was told is there, and what every part of lies there is finished."""
    root, folder = disk.mounted / "runs", tmp_path / "faults"
    folder.mkdir()
    plan = [] if phase is None else [faults.fail_at(rank=0, phase=phase, fault=Kind.HOLD, step=2)]
    env = {"MATRIX_ROOT": str(root), **BOUNDS, **faults.to_environment(folder, plan)}
    store = StoreHost()
    try:
        job = ranks.start(train, num_ranks=len(PODS), pods=PODS, env=env, store=store)
        for command, step in (("save", 1), ("result", 1), ("save", 2)):
            job.say((command, step))
            job.hear()
        if phase is None:
            job.say(("result", 2))
            assert job.hear() == [2, 2]
            copy = disk.copied(tmp_path / "copy.img")
        else:
            deadlines.eventually(lambda: faults.hits(folder), Deadline.COMMITTED, f"the save is held at {phase}")
            copy = disk.copied(tmp_path / "copy.img")
            faults.release(folder)
            job.say(("result", 2))
            assert job.hear() == [2, 2]
        job.say(("end", 0))
        job.finish(Deadline.DRAINED)
    finally:
        faults.release(folder)
        store.end()
    with file_systems.mounted_image(FileSystem.EXT4, copy, tmp_path / "after", options=OPTIONS) as after:
        found = after / "runs"
        named = processes.committed(found)
        assert named == ([1, 2] if committed else [1])
        catalog.finish_interrupted(LocalFolder(str(found)))
        finished = processes.committed(found)
        if committed or phase in (FaultPoint.COMMIT, FaultPoint.PUBLISH):
            assert finished == [1, 2], "every part of step 2 was durable"
        else:
            # At the report it is the other pod's part that may be there or not.
            assert finished in (named, [1, 2])
        for step in finished:
            state: dict[str, Any] = {f"weights{rank}": torch.zeros(NUMEL) for rank in (0, 1)}
            stock.load(state, checkpoint_id=found / f"step-{step}", no_dist=True)
            for rank in (0, 1):
                assert torch.equal(state[f"weights{rank}"], values(step, rank)), f"step {step} of rank {rank}"
