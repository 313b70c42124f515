"""
The whole of: a job of two pods, on one machine: which store their sidecars meet in, what they leave in it, and what becomes of
a save or an executor that one of them loses.

Called from: pytest.
Must never: let the pods share anything but the job's store and the storage.
"""

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from pillion import checkpointer
from pillion.errors import BarrierTimeout, SaveError
from process import ranks as processes
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline

PODS = ["a", "b"]


def state_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    return {"shared": torch.full((512,), float(step)), f"own{rank}": torch.full((64,), float(10 * step + rank))}


def listening(pid: int) -> set[int]:
    """Ports on which a process listens, by the inodes of its descriptors in /proc/net/tcp."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


def ports_of_a_session(opened: checkpointer.Checkpointer) -> set[int]:
    """Every port that this pod's sidecar and executor listen on, after a save."""
    found = processes.status(opened)
    return listening(found["pid"]) | listening(found["executor_pid"])


def test_in_prefix_mode_no_port_is_opened_and_the_jobs_store_does_not_grow(ranks: Ranks, tmp_path: Path) -> None:
    """Two pods save twenty times over a prefix of the job's store: nothing listens, old keys are deleted, all is loaded."""

    def train(peer: Peer) -> set[int]:
        opened = checkpointer.Checkpointer(tmp_path)
        for step in range(1, 21):
            opened.save(state_of(step, peer.rank), step).result(Deadline.COMMITTED.s)
            if step in (5, 20):
                peer.tell()
                peer.hear()
        state = state_of(0, peer.rank)
        assert opened.load(state) == 20
        assert opened.last_load is not None
        assert opened.last_load.tier == "arena"
        assert torch.equal(state[f"own{peer.rank}"], state_of(20, peer.rank)[f"own{peer.rank}"])
        opened.save(state_of(21, peer.rank), 21).result(Deadline.COMMITTED.s)
        ports = ports_of_a_session(opened)
        opened.close()
        return ports

    job = ranks.start(train, num_ranks=2, pods=PODS, env={"DCP_USE_PREFIX_STORE": "1"})
    assert job.store is not None
    counts = []
    for _ in range(2):
        job.hear()
        counts.append(job.store.num_keys())
        job.say()
    assert counts[0] == counts[1]
    assert any(key.startswith("pillion/") for key in job.store.list_keys())
    assert job.finish() == [set(), set()]
    assert len(list(tmp_path.glob("step-21/part-*.json"))) == 2
    assert processes.committed(tmp_path) == list(range(1, 22))


@pytest.mark.parametrize("asked_by", ["variable", "policy"])
def test_with_the_prefix_store_off_the_coordinator_hosts_a_store_on_a_free_port(
    ranks: Ranks, tmp_path: Path, asked_by: str
) -> None:
    """DCP_USE_PREFIX_STORE=0, or `store: Own` in a YAML file that only rank 0 has: one process of the first pod listens, no key of
    ours is in the job's store, saves are committed."""
    file = tmp_path / "policy.yaml"
    file.write_text("store: Own\n")

    def train(peer: Peer) -> set[int]:
        policy = str(file) if asked_by == "policy" and peer.rank == 0 else None
        with checkpointer.Checkpointer(tmp_path, policy=policy) as opened:
            for step in (1, 2):
                opened.save(state_of(step, peer.rank), step).result(Deadline.COMMITTED.s)
            ports = ports_of_a_session(opened)
            state = state_of(0, peer.rank)
            assert opened.load(state) == 2
            peer.tell()
            peer.hear()
            return ports

    job = ranks.start(
        train, num_ranks=2, pods=PODS, env={"DCP_USE_PREFIX_STORE": "0"} if asked_by == "variable" else None
    )
    job.hear()
    assert job.store is not None
    assert not [key for key in job.store.list_keys() if "pillion" in key]
    job.say()
    first, second = job.finish()
    assert (len(first), second) == (1, set())
    assert job.store.port not in first
    assert processes.committed(tmp_path) == [1, 2]


def test_the_group_is_told_from_the_process_group_and_its_pods(ranks: Ranks, tmp_path: Path) -> None:
    """Rank, world size, local rank, address and port are those of the default process group, whatever the environment says of
    ranks; ranks of one pod need not be neighbours."""

    def join(peer: Peer) -> tuple[int, int, int, tuple[int, ...], int]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ[name] = "77"
        with checkpointer.Checkpointer(tmp_path) as opened:
            members = opened._session.group
            assert members.store is not None
            assert members.store.host == "127.0.0.1"
            return members.rank, members.world_size, members.local_rank, members.local_ranks, members.store.port

    job = ranks.start(join, num_ranks=3, pods=["a", "b", "a"])
    assert job.store is not None
    port = job.store.port
    assert job.finish() == [(0, 3, 0, (0, 2), port), (1, 3, 0, (1,), port), (2, 3, 1, (0, 2), port)]


@pytest.mark.parametrize("pods", [None, PODS], ids=["one pod", "two pods"])
def test_a_rank_that_never_saves_is_named_at_the_bound_and_the_next_save_works(
    ranks: Ranks, tmp_path: Path, pods: list[str] | None
) -> None:
    """Rank 1 leaves out a step: rank 0's handle ends at PILLION_PEER_TIMEOUT_S with the phase and the missing rank."""

    def train(peer: Peer) -> tuple[str, tuple[int, ...], bool] | None:
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.save(state_of(1, peer.rank), 1).result(Deadline.COMMITTED.s)
            told = None
            if peer.rank == 0:
                error = opened.save(state_of(2, peer.rank), 2).committed.exception(Deadline.COMMITTED.s)
                assert isinstance(error, BarrierTimeout), error
                told = (error.phase.split("/")[-1], error.missing, 1.9 < error.waited_s < 10)
            peer.tell()
            peer.hear()
            opened.save(state_of(3, peer.rank), 3).result(Deadline.COMMITTED.s)
            return told

    job = ranks.start(train, num_ranks=2, pods=pods, env={"PILLION_PEER_TIMEOUT_S": "2"})
    job.hear()
    assert processes.committed(tmp_path) == [1]
    job.say()
    first, second = job.finish()
    assert first == ("seal" if pods is None else "plan", (1,), True)
    assert second is None
    assert processes.committed(tmp_path) == [1, 3]


@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "other"])
def test_an_executor_of_one_pod_that_dies_after_a_load_is_replaced_and_the_pods_still_meet(
    ranks: Ranks, tmp_path: Path, victim: int
) -> None:
    """SIGKILL of one pod's executor, idle and then in the middle of a save: every save is committed by both pods."""

    def train(peer: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.load(state_of(0, peer.rank))
            opened.save(state_of(1, peer.rank), 1).result(Deadline.COMMITTED.s)
            for step in (2, 3):
                executor = processes.executor_of(opened)
                if peer.rank == victim and step == 2:
                    os.kill(executor, signal.SIGKILL)
                elif peer.rank == victim:
                    processes.stop(executor)
                handle = opened.save(state_of(step, peer.rank), step)
                if peer.rank == victim and step == 3:
                    deadlines.eventually(
                        lambda: processes.state_of(opened, 3) == "persisting", Deadline.STAGED, "step 3 is taken up"
                    )
                    os.kill(executor, signal.SIGKILL)
                handle.result(Deadline.COMMITTED.s)
            assert not psutil.pid_exists(executor) or peer.rank != victim
            state = state_of(0, peer.rank)
            assert opened.load(state) == 3

    ranks.start(train, num_ranks=2, pods=PODS).finish(Deadline.SCRIPT)
    assert processes.committed(tmp_path) == [1, 2, 3]


def test_a_pod_that_cannot_stage_tells_the_other_without_waiting_for_the_bound(ranks: Ranks, tmp_path: Path) -> None:
    """A leaf that rank 1 cannot save ends the step on rank 0 in another pod at once, with rank 1's reason."""

    def train(peer: Peer) -> str:
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.save(state_of(1, peer.rank), 1).result(Deadline.COMMITTED.s)
            bad = {"closure": lambda: None} if peer.rank == 1 else {}
            handle = opened.save({**state_of(2, peer.rank), **bad}, 2)
            error = handle.committed.exception(Deadline.COMMITTED.s)
            opened.save(state_of(3, peer.rank), 3).result(Deadline.COMMITTED.s)
            if peer.rank == 0:
                assert isinstance(error, SaveError)
                assert list(error.failures) == [1]
            return str(error)

    job = ranks.start(train, num_ranks=2, pods=PODS, env={"PILLION_PEER_TIMEOUT_S": "300"})
    assert all("'closure'" in text for text in job.finish())
    assert processes.committed(tmp_path) == [1, 3]


def test_pods_whose_slots_are_all_whole_take_one_for_a_load_from_storage(ranks: Ranks, tmp_path: Path) -> None:
    """Nothing is dropped before they have agreed: then an older step is loaded into a slot, and what is saved then is the newest."""

    def train(peer: Peer) -> list[int | None]:
        opened = checkpointer.Checkpointer(tmp_path)
        opened.save(state_of(1, peer.rank), 1, persist=True).result(Deadline.COMMITTED.s)
        for step in (2, 3):
            opened.save(state_of(step, peer.rank), step, persist=False)
        deadlines.eventually(
            lambda: processes.status(opened)["saves"][-1]["state"] == "done", Deadline.COMMITTED, "both are whole"
        )
        found = []
        for wanted in (3, 1):
            state = state_of(0, peer.rank)
            found.append(opened.load(state, step=wanted))
            assert torch.equal(state[f"own{peer.rank}"], state_of(wanted, peer.rank)[f"own{peer.rank}"])
        assert opened.last_load is not None
        assert opened.last_load.tier == "storage"
        opened.save(state_of(2, peer.rank), 2, persist=True).result(Deadline.COMMITTED.s)
        state = state_of(0, peer.rank)
        found.append(opened.load(state))
        assert torch.equal(state["shared"], state_of(found[-1] or 0, peer.rank)["shared"])
        opened.close()
        return found

    assert ranks.start(train, num_ranks=2, pods=PODS).finish(Deadline.LOADED) == [[3, 1, 2], [3, 1, 2]]
