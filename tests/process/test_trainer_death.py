"""
The whole of: what is on storage after a trainer was killed at each point of a save.

Called from: pytest.
Must never: kill by chance; the trainer says where it is, and waits there.
"""

import os
import signal
from pathlib import Path

import torch

from pillion import checkpointer, embedded, leaves
from pillion.wire import arena, save_messages
from process import ranks as processes
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline

POLICY = {"staging": {"slots": 3}}


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4096,), float(step))}


def test_a_trainer_killed_in_mid_stage_leaves_a_torn_slot_that_is_never_persisted(ranks: Ranks, tmp_path: Path) -> None:
    """The step before it is loaded, from the arena, and the torn step never gets a directory; its slot is used again."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy=POLICY)
        opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
        collected = leaves.Collector().collect(state_of(2))
        grant = opened._session.claim(save_messages.Claim(step=2, room_bytes=32768, persist=True))
        mapping = opened._session.mapping
        assert mapping is not None
        mapping.copy_in(grant.slot, collected)
        peer.tell((opened._session.runtime_dir, grant.slot))
        peer.hear()

    job = ranks.start(train)
    folder, slot = job[0].hear()
    segment = Path(folder) / "segment-0.arena"
    assert _header(segment, slot).state is arena.SlotState.FILLING
    job.kill()

    def resume(peer: Peer) -> tuple[int | None, str, float]:
        with checkpointer.Checkpointer(tmp_path, policy=POLICY) as opened:
            state = state_of(0)
            step = opened.load(state)
            assert opened.last_load is not None
            seen = (step, opened.last_load.tier, float(state["weight"][7]))
            for again in (2, 3, 4):
                opened.save(state_of(again), again).result(Deadline.COMMITTED.s)
            return seen

    assert ranks.start(resume).finish() == [(1, "arena", 1.0)]
    assert processes.committed(tmp_path) == [1, 2, 3, 4]


def test_a_snapshot_in_memory_is_persisted_when_its_trainer_is_killed(ranks: Ranks, tmp_path: Path) -> None:
    """save(persist=False) writes nothing while the trainer lives; SIGKILL, and the sidecar persists the newest one."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy=POLICY)
        opened.save(state_of(1), 1, persist=True).result(Deadline.COMMITTED.s)
        for step in (2, 3):
            found = opened.save(state_of(step), step, persist=False).result(Deadline.COMMITTED.s)
            assert found.path is None
        peer.tell(processes.committed(tmp_path))
        peer.hear()

    job = ranks.start(train)
    assert job[0].hear() == [1]
    job.kill()
    deadlines.eventually(lambda: processes.committed(tmp_path) == [1, 3], Deadline.DRAINED, "step 3 is on storage")


def test_a_snapshot_that_is_in_the_executors_hands_when_its_trainer_dies_is_persisted_too(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The trainer dies while the sidecar still registers its snapshot: it goes to storage all the same."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy=POLICY)
        opened.save(state_of(1), 1, persist=True).result(Deadline.COMMITTED.s)
        executor = processes.executor_of(opened)
        processes.stop(executor)
        opened.save(state_of(2), 2, persist=False)
        deadlines.eventually(
            lambda: processes.state_of(opened, 2) == "persisting", Deadline.STAGED, "the executor was given step 2"
        )
        peer.tell((executor, processes.status(opened)["pid"], embedded.log_path(opened._session.runtime_dir)))
        peer.hear()

    job = ranks.start(train)
    executor, sidecar, path = job[0].hear()
    job.kill()
    log = Path(path)
    deadlines.eventually(
        lambda: "ended without closing its Checkpointer" in log.read_text(), Deadline.SETTLE, "its death was seen"
    )
    assert processes.committed(tmp_path) == [1]
    processes.go_on(executor)
    deadlines.eventually(lambda: processes.committed(tmp_path) == [1, 2], Deadline.DRAINED, "step 2 is on storage")
    os.kill(sidecar, signal.SIGTERM)
    ranks.alone()


def test_a_snapshot_whose_policy_says_skip_is_not_persisted(ranks: Ranks, tmp_path: Path) -> None:
    """With trigger.onTermination: Skip a snapshot in memory dies with its trainer, and the sidecar ends cleanly."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy={**POLICY, "trigger": {"onTermination": "Skip"}})
        opened.save(state_of(1), 1, persist=False).result(Deadline.COMMITTED.s)
        peer.tell(processes.status(opened)["pid"])
        peer.hear()

    job = ranks.start(train)
    sidecar = job[0].hear()
    job.kill()
    os.kill(sidecar, signal.SIGTERM)
    ranks.alone()
    assert processes.committed(tmp_path) == []


def test_a_save_in_flight_outlives_its_trainer(ranks: Ranks, tmp_path: Path) -> None:
    """A sealed save whose trainer is killed before the commit is committed, and nothing of the arena is left behind."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy=POLICY)
        executor = processes.executor_of(opened)
        processes.stop(executor)
        opened.save(state_of(1), 1)
        peer.tell((executor, opened._session.runtime_dir))
        peer.hear()

    job = ranks.start(train, env={"PILLION_LINGER_S": "0.1"})
    executor, folder = job[0].hear()
    job.kill()
    assert processes.committed(tmp_path) == []
    processes.go_on(executor)
    ranks.alone()
    assert processes.committed(tmp_path) == [1]
    assert not Path(folder).exists()


def _header(segment: Path, slot: int) -> arena.SlotHeader:
    with segment.open("rb") as file:
        header = arena.SegmentHeader.unpack(file.read(arena.PAGE_BYTES))
        file.seek(header.slot_offset(slot))
        return arena.SlotHeader.unpack(file.read(arena.PAGE_BYTES), stride_bytes=header.stride_bytes)
