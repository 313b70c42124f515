"""
The whole of: saves of one pod that are on a disk of the node before they are on storage: what outlives whom, what is uploaded, and what a disk
that is full or gone costs.

Called from: pytest.
"""

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pillion import checkpointer
from pillion.errors import SaveError, SaveSkipped
from process import ranks as processes_of
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline
from support.object_stores import behind
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation

FOLDER = "team/run-1"
SIZE = 300_000
"""Elements of a tensor."""


def policy(local: Path, proxy: FaultProxy | None = None, **more: Any) -> dict[str, Any]:
    storage: dict[str, Any] = {"local": {"path": str(local)}}
    if proxy is not None:
        storage["objectStore"] = {"endpoint": proxy.place.endpoint, "objectSize": "8Mi"}
    return {"storage": storage, **more}


def state_of(step: int) -> dict[str, Any]:
    return {
        "weight": torch.arange(SIZE, dtype=torch.float32) * (step + 1),
        "half": torch.full((77,), step, dtype=torch.bfloat16),
        "note": ["text", step],
        "step": step,
    }


def holds(state: dict[str, Any], step: int) -> bool:
    wanted = state_of(step)
    return all(torch.equal(state[name], wanted[name]) for name in ("weight", "half")) and state["note"] == [
        "text",
        step,
    ]


def environment(proxy: FaultProxy) -> dict[str, str]:
    """The bucket's, and a root that is soon free again after the loss of its owner."""
    return {**proxy.place.environment, "PILLION_OWNER_SILENT_S": "0.5"}


def copies(local: Path) -> dict[str, set[str]]:
    """Stem of each copy -> the endings of its files."""
    found: dict[str, set[str]] = {}
    for path in local.glob("*/rank-0/step-*"):
        found.setdefault(path.stem, set()).add(path.suffix)
    return found


def lose_pod(ranks: Ranks, trainer: int) -> None:
    """Kill the sidecar, its executor and the trainer, and remove their memory, as a lost pod does."""
    runtime_dirs = {path for pid in (ranks.sidecar(),) for path in psutil.Process(pid).cmdline() if "/dev/shm/" in path}
    for pid in (ranks.sidecar(), ranks.executor(), trainer):
        # An executor ends by itself when its sidecar is gone, and may be faster.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ranks.alone()
    for path in runtime_dirs:
        shutil.rmtree(path)


def test_a_save_is_held_by_the_disk_while_the_bucket_does_not_answer_and_the_newest_is_uploaded(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Saves go on at the disk's rate; of those that wait, the newest goes to the bucket, the others are passed over and say so."""
    url = f"{s3_proxy.place.url}/{FOLDER}"

    def train(peer: Peer) -> list[str]:
        with checkpointer.Checkpointer(url, policy=policy(tmp_path, s3_proxy)) as opened:
            opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
            peer.tell("committed")
            peer.hear()
            handles = {}
            for step in range(2, 7):
                handles[step] = opened.save(state_of(step), step)
                handles[step].held.result(Deadline.COMMITTED.s)
            peer.tell([step for step in handles if handles[step].committed.done()])
            told = []
            for step, handle in handles.items():
                try:
                    told.append(f"{step} {handle.result(Deadline.COMMITTED.s).path}")
                except SaveSkipped as err:
                    told.append(f"{step} skipped: {'passed over' in str(err)}")
            return told

    [trainer] = ranks.start(train, env=environment(s3_proxy)).trainers
    assert trainer.hear() == "committed"
    s3_proxy.arm(Fault.HANG, Only(operation=Operation.PUT, key="step-"), times=None)
    trainer.say("go")
    early = trainer.hear()
    assert set(early) <= {3, 4}, "only what was passed over can have an outcome"
    s3_proxy.disarm()
    s3_proxy.release()
    assert trainer.hear() == [
        f"2 {url}/step-2",
        "3 skipped: True",
        "4 skipped: True",
        "5 skipped: True",
        f"6 {url}/step-6",
    ]
    trainer.wait()
    ranks.alone()
    assert behind.committed(s3_proxy.place, FOLDER) == [1, 2, 6]
    assert behind.unended_uploads(s3_proxy.place) == []
    assert len(copies(tmp_path)) == 2, "the newest two stay"


def held_and_lost(ranks: Ranks, proxy: FaultProxy, disk: Path) -> str:
    """Step 1 is in the bucket, step 2 on the disk alone, and the pod is lost. Gives the root."""
    url = f"{proxy.place.url}/{FOLDER}"

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(url, policy=policy(disk, proxy))
        opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
        peer.tell("committed")
        peer.hear()
        opened.save(state_of(2), 2).held.result(Deadline.COMMITTED.s)
        peer.tell("held")
        peer.hear()

    [trainer] = ranks.start(train, env=environment(proxy)).trainers
    assert trainer.hear() == "committed"
    proxy.arm(Fault.HANG, Only(operation=Operation.PUT, key="step-"), times=None)
    trainer.say("go")
    assert trainer.hear() == "held"
    lose_pod(ranks, trainer.pid)
    proxy.disarm()
    proxy.release()
    return url


def test_what_only_the_disk_has_is_loaded_after_the_loss_of_the_pod_and_then_uploaded(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Trainer, sidecar and arena are killed; the bucket has step 1, the disk step 2."""
    url = held_and_lost(ranks, s3_proxy, tmp_path)

    def resume(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer(url, policy=policy(tmp_path, s3_proxy)) as opened:
            state = state_of(0)
            found = opened.find()
            step = opened.load(state)
            assert opened.last_load is not None
            assert found is not None
            return [found.step, str(found.tier), step, str(opened.last_load.tier), holds(state, 2)]

    assert behind.committed(s3_proxy.place, FOLDER) == [1]
    assert ranks.start(resume, env=environment(s3_proxy)).finish() == [[2, "local", 2, "local", True]]
    ranks.alone()
    deadlines.eventually(
        lambda: behind.committed(s3_proxy.place, FOLDER) == [1, 2], Deadline.COMMITTED, "step 2 is in the bucket"
    )


def test_a_copy_whose_bytes_have_changed_is_refused_and_the_one_before_is_loaded(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """One bit on the disk: the load says which step it refused. The one before is on the disk as well, and nothing is uploaded anew."""
    url = held_and_lost(ranks, s3_proxy, tmp_path)
    [image] = tmp_path.glob("*/rank-0/step-2-*.image")
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)

    def resume(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer(url, policy=policy(tmp_path, s3_proxy)) as opened:
            state = state_of(0)
            step = opened.load(state)
            assert opened.last_load is not None
            report = opened.last_load
            return [step, str(report.tier), report.path, holds(state, 1), sorted(report.refused)]

    s3_proxy.forget()
    assert ranks.start(resume, env=environment(s3_proxy)).finish() == [[1, "local", f"{url}/step-1", True, ["local:2"]]]
    ranks.alone()
    assert behind.committed(s3_proxy.place, FOLDER) == [1]
    assert not s3_proxy.seen(Only(operation=Operation.PUT, key=r"\.distcp$"))


def test_a_copy_that_was_damaged_before_its_upload_fails_its_save_by_name_and_the_next_one_is_uploaded(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Step 2 is on its way when a bit of step 3 changes on the disk: nothing of step 3 becomes visible, and the handle says why."""
    url = f"{s3_proxy.place.url}/{FOLDER}"

    def train(peer: Peer) -> list[str | None]:
        with checkpointer.Checkpointer(url, policy=policy(tmp_path, s3_proxy)) as opened:
            opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
            peer.tell("committed")
            peer.hear()
            handles = [opened.save(state_of(2), 2), opened.save(state_of(3), 3)]
            for handle in handles:
                handle.held.result(Deadline.COMMITTED.s)
            peer.tell("held")
            peer.hear()
            told = [handles[0].result(Deadline.COMMITTED.s).path]
            with pytest.raises(SaveError) as caught:
                handles[1].result(Deadline.COMMITTED.s)
            told += [failure.type_name for failure in caught.value.failures.values()]
            return [*told, opened.save(state_of(4), 4).result(Deadline.COMMITTED.s).path]

    [trainer] = ranks.start(train, env=environment(s3_proxy)).trainers
    assert trainer.hear() == "committed"
    struck = s3_proxy.arm(Fault.HANG, Only(operation=Operation.PUT, key="step-2/__"), times=None)
    trainer.say("go")
    assert trainer.hear() == "held"
    deadlines.eventually(lambda: struck.struck, Deadline.COMMITTED, "step 2 is on its way")
    [image] = tmp_path.glob("*/rank-0/step-3-*.image")
    with image.open("r+b") as file:
        file.seek(SIZE)
        file.write(b"\xff\xee")
    trainer.say("go")
    s3_proxy.disarm()
    s3_proxy.release()
    assert trainer.hear() == [f"{url}/step-2", "LocalCopyLost", f"{url}/step-4"]
    trainer.wait()
    ranks.alone()
    assert behind.committed(s3_proxy.place, FOLDER) == [1, 2, 4]


def test_the_copies_of_a_root_that_was_emptied_are_never_loaded(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Somebody removes the run to begin anew; the node's disk still has its last step."""
    url = held_and_lost(ranks, s3_proxy, tmp_path)
    client = s3_proxy.place.client()
    client.delete([each["path"] for each in client.list(FOLDER).collect()])

    def begin(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer(url, policy=policy(tmp_path, s3_proxy)) as opened:
            state = state_of(0)
            found = opened.load(state)
            opened.save(state_of(5), 5).result(Deadline.COMMITTED.s)
            return [found, holds(state, 0)]

    assert ranks.start(begin, env=environment(s3_proxy)).finish() == [[None, True]]
    ranks.alone()
    assert {stem.split("-")[1] for stem in copies(tmp_path)} == {"5"}


def test_steps_for_the_disk_alone_are_on_it_and_on_no_storage_until_they_are_the_last(
    ranks: Ranks, tmp_path: Path
) -> None:
    """A root in a directory: 5 is persisted, even steps are held, the others in memory; at the end the newest of all is on storage."""
    root, disk = tmp_path / "root", tmp_path / "disk"
    trigger = {"periodSteps": 5, "localSteps": 2, "snapshotSteps": 1}

    def train(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer(root, policy=policy(disk, trigger=trigger)) as opened:
            told = []
            for step in range(1, 9):
                assert opened.due(step)
                told.append(opened.save(state_of(step), step).result(Deadline.COMMITTED.s).path)
            return told

    assert ranks.start(train).finish() == [[*[None] * 4, f"{root}/step-5", *[None] * 3]]
    ranks.alone()
    assert {stem.split("-")[1] for stem in copies(disk)} >= {"8"}
    assert processes_of.committed(root) == [5, 8], "a script that ends leaves nothing in memory or on a disk alone"


def test_a_session_without_the_disk_in_between_costs_no_copy(ranks: Ranks, tmp_path: Path) -> None:
    """A lost pod's only saves are on the disk; somebody looks for a checkpoint by another policy, and the job's next start loads them all the same."""
    root, disk = tmp_path / "root", tmp_path / "disk"
    trigger = {"periodSteps": 1000, "localSteps": 2}
    silent = {"PILLION_OWNER_SILENT_S": "0.5"}

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(root, policy=policy(disk, trigger=trigger))
        for step in (2, 4):
            assert opened.due(step)
            opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()

    def look(_: Peer) -> object:
        with checkpointer.Checkpointer(root) as opened:
            return opened.find()

    def begin_again(_: Peer) -> list[object]:
        with checkpointer.Checkpointer(root, policy=policy(disk, trigger=trigger)) as opened:
            state = state_of(0)
            return [opened.load(state), holds(state, 4)]

    [trainer] = ranks.start(train, env=silent).trainers
    trainer.hear()
    lose_pod(ranks, trainer.pid)
    trainer.wait()
    assert processes_of.committed(root) == []
    assert ranks.start(look, env=silent).finish() == [None]
    ranks.alone()
    assert ranks.start(begin_again, env=silent).finish() == [[4, True]]
