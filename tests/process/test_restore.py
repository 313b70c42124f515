"""
The whole of: what a restarted trainer gets back: from the arena, from storage, and from neither when both are damaged.

Called from: pytest.
Must never: trust a value that was not written by a save of the same test.
"""

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import pillion
from pillion import checkpointer, connection
from pillion.errors import CorruptCheckpoint, NoCheckpoint
from pillion.wire import arena, control, layout, names
from pillion.wire.load_messages import Tier
from process import ranks as processes
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline

POLICY = {"staging": {"slots": 3}}


def state_of(step: int, rank: int = 0) -> dict[str, Any]:
    """A state that tells step and rank in every tensor, and in a value that is no tensor."""
    return {
        "weight": torch.full((300, 7), float(step)),
        "moment": {"exp_avg": torch.arange(1000) + step},
        "own": {f"rank{rank}": torch.full((64,), float(1000 * step + rank))},
        "note": [step, "text"],
        "step": step,
    }


def assert_state(found: dict[str, Any], step: int, rank: int = 0) -> None:
    """Every value is of that step and rank, none of another."""
    wanted = state_of(step, rank)
    assert torch.equal(found["weight"], wanted["weight"])
    assert torch.equal(found["moment"]["exp_avg"], wanted["moment"]["exp_avg"])
    assert torch.equal(found["own"][f"rank{rank}"], wanted["own"][f"rank{rank}"])
    assert (found["note"], found["step"]) == (wanted["note"], wanted["step"])


def load(root: Path, peer: Peer) -> tuple[int | None, str, dict[str, str]]:
    """A fresh Checkpointer loads; step, tier and what was refused, after the values were checked."""
    with checkpointer.Checkpointer(root, policy=POLICY) as opened:
        state = state_of(0, peer.rank)
        step = opened.load(state)
        assert opened.last_load is not None
        if step is not None:
            assert_state(state, step, peer.rank)
        return step, opened.last_load.tier, dict(opened.last_load.refused)


def train_two_steps(root: Path, peer: Peer) -> None:
    """Commit steps 1 and 2, say so, and live on until killed."""
    opened = checkpointer.Checkpointer(root, policy=POLICY)
    for step in (1, 2):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    peer.tell()
    peer.hear()


def segment_of(root: Path) -> Path:
    """The arena file of local rank 0."""
    from pillion import embedded

    return Path(embedded.runtime_directory(str(root), {})) / "segment-0.arena"


def snapshots_verified(root: Path) -> int:
    """How many snapshots the root's sidecar has verified while it had no trainer."""
    return int(str(ask_status(segment_of(root).parent)["metrics"]["snapshots_verified"]))


def ask_status(runtime_dir: Path) -> dict[str, Any]:
    """What a sidecar answers to somebody who is no trainer of it."""
    answer = connection.ask(str(runtime_dir / names.CONTROL_SOCKET), control.ReadStatus(), Deadline.REPLY.s)
    assert isinstance(answer, control.Status)
    return answer.to_document()


def test_a_restarted_trainer_loads_the_newest_step_from_the_arena_without_reading_storage(
    ranks: Ranks, tmp_path: Path
) -> None:
    """After SIGKILL of both ranks and with the files of storage gone, both load the newest step that both had sealed."""
    root = tmp_path / "root"

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(root, policy=POLICY)
        for step in (1, 2):
            opened.save(state_of(step, peer.rank), step).result(Deadline.COMMITTED.s)
        if peer.rank == 0:
            # A third step is sealed by rank 0 alone: no rank may load it.
            opened.save(state_of(3, peer.rank), 3)
        peer.tell()
        peer.hear()

    job = ranks.start(train, num_ranks=2)
    job.hear()
    job.kill()
    root.rename(tmp_path / "away")
    answers = ranks.start(lambda peer: load(root, peer), num_ranks=2).finish()
    assert answers == [(2, "arena", {}), (2, "arena", {})]


def test_what_an_earlier_trainer_left_is_mapped_before_the_load(ranks: Ranks, tmp_path: Path) -> None:
    """While a script builds its model, the pages of the newest snapshot are mapped, so that the load meets no page fault for them. Nothing in them changes."""
    mib, root = 2**20, tmp_path / "run"

    def save(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(root, policy=POLICY)
        opened.save({"w": torch.full((8 * mib,), 3, dtype=torch.uint8)}, 1).result(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()

    def resident() -> int:
        """Bytes of the arena that this process has mapped."""
        maps = psutil.Process().memory_maps(grouped=True)
        return sum(each.rss for each in maps if each.path == str(segment_of(root)))

    def load_later(peer: Peer) -> tuple[int, int | None, bool]:
        with checkpointer.Checkpointer(root, policy=POLICY) as opened:
            opened._saver.join(Deadline.SETTLE.s)
            before = resident()
            state = {"w": torch.zeros(8 * mib, dtype=torch.uint8)}
            step = opened.load(state)
            return before, step, bool((state["w"] == 3).all())

    first = ranks.start(save)
    first.hear()
    first.trainers[0].kill()
    [(before, step, same)] = ranks.start(load_later, attempt=1).finish()
    assert (step, same) == (1, True)
    assert before >= 8 * mib


def test_a_bit_flipped_in_the_arena_is_found_and_the_files_are_loaded(ranks: Ranks, tmp_path: Path) -> None:
    """A tensor that changed in the arena since its seal is refused by name, and the same step comes from storage."""

    job = ranks.start(lambda peer: train_two_steps(tmp_path, peer))
    job.hear()
    path = segment_of(tmp_path)
    with path.open("rb") as file:
        header = arena.SegmentHeader.unpack(file.read(arena.PAGE_BYTES))
        file.seek(header.slot_offset(1))
        assert arena.SlotHeader.unpack(file.read(arena.PAGE_BYTES), stride_bytes=header.stride_bytes).step == 2
    payload = header.slot_offset(1) + arena.PAGE_BYTES + layout.HEAD_BYTES
    # While the trainer lives, which has the arena mapped: after its death the sidecar verifies the snapshot, and then nobody writes to it.
    processes.flip(path, payload + 100)
    job.kill()
    [(step, tier, refused)] = ranks.start(lambda peer: load(tmp_path, peer)).finish()
    assert (step, tier) == (2, "storage")
    assert list(refused) == ["arena:2"]
    assert "'weight'" in refused["arena:2"]


def test_the_newest_snapshot_is_verified_while_no_trainer_lives(ranks: Ranks, tmp_path: Path) -> None:
    """The sidecar compares it with its digests at the death of the trainers, and a bit that flips only after that is for the next restart to find."""

    def load_and_tell(peer: Peer) -> tuple[object, ...]:
        with checkpointer.Checkpointer(tmp_path, policy=POLICY) as opened:
            verified = processes.status(opened)["metrics"]["snapshots_verified"]
            state = state_of(0)
            # Not `load` of this file: the flipped value is loaded as it is.
            step = opened.load(state)
            assert opened.last_load is not None
            peer.tell((verified, step, opened.last_load.tier, torch.equal(state["weight"], state_of(2)["weight"])))
            again = opened.load(state)
            assert opened.last_load is not None
            return (again, opened.last_load.tier, list(opened.last_load.refused))

    job = ranks.start(lambda peer: train_two_steps(tmp_path, peer))
    job.hear()
    job.kill()
    deadlines.eventually(lambda: snapshots_verified(tmp_path) == 1, Deadline.SETTLE, "the snapshot to be verified")
    path = segment_of(tmp_path)
    with path.open("rb") as file:
        header = arena.SegmentHeader.unpack(file.read(arena.PAGE_BYTES))
    processes.flip(path, header.slot_offset(1) + arena.PAGE_BYTES + layout.HEAD_BYTES + 100)
    successor = ranks.start(load_and_tell)
    assert successor.hear() == [(1, 2, "arena", False)]
    assert successor.finish() == [(2, "storage", ["arena:2"])]


@pytest.mark.parametrize("where", ["layout", "trailer", "header"])
def test_a_damaged_description_of_a_slot_is_refused_like_damaged_data(ranks: Ranks, tmp_path: Path, where: str) -> None:
    """A bit flipped in a slot's header, layout or trailer keeps the slot from being used; the step comes from storage."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy=POLICY)
        opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()

    job = ranks.start(train)
    job.hear()
    job.kill()
    path = segment_of(tmp_path)
    with path.open("rb") as file:
        header = arena.SegmentHeader.unpack(file.read(arena.PAGE_BYTES))
        file.seek(header.slot_offset(0))
        slot = arena.SlotHeader.unpack(file.read(arena.PAGE_BYTES), stride_bytes=header.stride_bytes)
    # Of the header the step, which becomes 3: nothing else would tell that the data is of step 1.
    offset = {"layout": slot.layout_offset + 20, "trailer": slot.trailer_offset + 12, "header": 24}[where]
    processes.flip(path, header.slot_offset(0) + offset, bit=1)
    [(step, tier, refused)] = ranks.start(lambda peer: load(tmp_path, peer)).finish()
    assert (step, tier) == (1, "storage")
    assert list(refused) == ["arena:3" if where == "header" else "arena:1"]


def test_a_bit_flipped_in_any_stored_file_is_found_and_the_older_checkpoint_is_loaded(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Whichever file of the newest checkpoint is damaged, a load either repairs it from the others or takes the one before,
    and says which and why."""
    opened = ranks.open(tmp_path, **POLICY)
    for step in (1, 2):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    newest = tmp_path / "step-2"
    files = sorted(path.name for path in newest.iterdir())
    assert [name.split(".")[-1] for name in files] == ["metadata", "distcp", "json", "json"]
    for name in files:
        damaged = newest / name
        intact = damaged.read_bytes()
        processes.flip(damaged, len(intact) // 2, bit=3)
        opened = ranks.open(tmp_path, **POLICY)
        state = state_of(0)
        found = opened.load(state)
        report = opened.last_load
        opened.close()
        ranks.alone()
        assert report is not None
        assert found is not None
        assert_state(state, found)
        if name == ".metadata":
            # Everything in it is in the parts too: it is written anew, the same bytes.
            assert (found, damaged.read_bytes()) == (2, intact)
        else:
            assert found == 1, name
            assert list(report.refused) == ["storage:2"]
            assert name in report.refused["storage:2"]
        damaged.write_bytes(intact)


class Spy:
    """A Stateful that writes down what it is asked for."""

    def __init__(self, value: float) -> None:
        self.value = torch.full((5,), value)
        self.calls: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return {"value": self.value.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")
        self.value = state["value"]


def test_a_load_that_falls_back_begins_again_from_what_was_asked(ranks: Ranks, tmp_path: Path) -> None:
    """The newest checkpoint is of another dtype, and damaged; the one before is copied in its own dtype. Each Stateful is asked once
    for its state and given the loaded one once, at a fresh start asked once: a data loader makes its iterator when it is asked."""
    opened = ranks.open(tmp_path, **POLICY)
    spy = Spy(3.0)
    state: dict[str, Any] = {"a": torch.arange(4096.0), "b": torch.arange(4096.0) * 3, "spy": spy}
    assert opened.load(state) is None
    assert spy.calls == ["state_dict"]
    opened.save(state, 1).result(Deadline.COMMITTED.s)
    narrow = {"a": state["a"].bfloat16(), "b": state["b"].bfloat16(), "spy": {"value": spy.value}}
    opened.save(narrow, 2).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    [data] = (tmp_path / "step-2").glob("*.distcp")
    processes.flip(data, data.stat().st_size // 2)
    opened = ranks.open(tmp_path, **POLICY)
    spy = Spy(0.0)
    found: dict[str, Any] = {"a": torch.zeros(4096), "b": torch.zeros(4096), "spy": spy}
    assert opened.load(found) == 1
    assert torch.equal(found["a"], state["a"])
    assert torch.equal(found["b"], state["b"])
    assert spy.calls == ["state_dict", "load_state_dict"]
    assert torch.equal(spy.value, torch.full((5,), 3.0))


def test_checkpoints_that_are_all_corrupt_are_an_error_and_never_a_fresh_start(ranks: Ranks, tmp_path: Path) -> None:
    """With every checkpoint damaged, load raises CorruptCheckpoint with a reason for each, and leaves the state alone."""
    opened = ranks.open(tmp_path, **POLICY)
    for step in (1, 2):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    for data in tmp_path.glob("step-*/*.distcp"):
        processes.flip(data, 3000)
    opened = ranks.open(tmp_path, **POLICY)
    state = state_of(0)
    with pytest.raises(CorruptCheckpoint) as caught:
        opened.load(state)
    assert set(caught.value.reasons) == {"storage:1", "storage:2"}
    assert state["step"] == 0


def test_one_rank_whose_file_is_damaged_takes_all_ranks_to_the_older_step(ranks: Ranks, tmp_path: Path) -> None:
    """A damaged file of rank 1 alone makes both ranks load the step before."""

    def train(peer: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path, policy=POLICY) as opened:
            for step in (1, 2):
                opened.save(state_of(step, peer.rank), step).result(Deadline.COMMITTED.s)

    ranks.start(train, num_ranks=2).finish()
    ranks.alone()
    [data] = (tmp_path / "step-2").glob("__1_*.distcp")
    processes.flip(data, data.stat().st_size - 5000)
    for pods in (None, ["a", "b"]):
        answers = ranks.start(lambda peer: load(tmp_path, peer), num_ranks=2, pods=pods).finish()
        assert [(step, tier) for step, tier, _ in answers] == [(1, "storage"), (1, "storage")]
        assert all(data.name in refused["storage:2"] for _, _, refused in answers)


def test_a_load_of_a_named_step_takes_that_step_or_nothing(ranks: Ranks, tmp_path: Path) -> None:
    """load(step=...) goes back to a committed step, from which saving goes on; a step that is not there is an error."""
    opened = ranks.open(tmp_path, **POLICY)
    for step in (1, 2, 3):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    state = state_of(0)
    assert opened.load(state, step=1) == 1
    assert_state(state, 1)
    with pytest.raises(NoCheckpoint, match="step 7"):
        opened.load(state, step=7)
    again = {**state_of(2), "note": ["second", "time"]}
    opened.save(again, 2).result(Deadline.COMMITTED.s)
    assert opened.load(state, step=2) == 2
    assert state["note"] == ["second", "time"]
    newest = opened.latest()
    assert newest is not None
    assert newest.step == 2, "the one that was committed last; step 3 was left behind"


def test_where_no_checkpoint_ever_was_the_policy_decides(ranks: Ranks, tmp_path: Path) -> None:
    """An empty root is a fresh start by default, and NoCheckpoint with restore.onMissing: Fail, for who looks before it loads too."""
    opened = ranks.open(tmp_path / "fresh")
    assert opened.load(state_of(0)) is None
    assert isinstance(opened.last_load, pillion.LoadReport)
    assert opened.last_load.tier == "fresh"
    strict = ranks.open(tmp_path / "strict", restore={"onMissing": "Fail"})
    for ask in (lambda: strict.load(state_of(0)), strict.find):
        with pytest.raises(NoCheckpoint):
            ask()
    assert strict.find(7) is None


def ahead(opened: checkpointer.Checkpointer) -> list[int]:
    """The steps that the last load set aside."""
    assert opened.last_load is not None
    return list(opened.last_load.set_aside)


def test_a_rollback_lasts(ranks: Ranks, tmp_path: Path) -> None:
    """After a load of an older step the newest is what is saved then: from memory and from storage, in the next run too. What was ahead
    is set aside, said so, and loaded by its number."""
    opened = ranks.open(tmp_path, **POLICY)
    for step in (1, 2, 3, 4, 5):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    state = state_of(0)
    assert opened.load(state, step=2) == 2
    assert ahead(opened) == [3, 4, 5]
    again = {**state_of(3), "note": ["the other", "branch"]}
    opened.save(again, 3).result(Deadline.COMMITTED.s)
    newest = opened.latest()
    assert newest is not None
    assert newest.step == 3
    assert opened.find() == pillion.Found(step=3, tier=Tier.ARENA, path=None)
    assert opened.load(state) == 3
    assert ahead(opened) == [4, 5]
    assert state["note"] == ["the other", "branch"]
    opened.close()
    ranks.alone()
    opened = ranks.open(tmp_path, **POLICY)
    assert opened.load(state) == 3
    assert opened.last_load is not None
    assert (opened.last_load.tier, ahead(opened)) == ("storage", [4, 5])
    assert state["note"] == ["the other", "branch"]
    assert opened.load(state, step=5) == 5
    assert_state(state, 5)


def test_the_policy_says_where_a_restart_begins(ranks: Ranks, tmp_path: Path) -> None:
    """restore.mode Step takes that step, None starts from nothing; a call that names a step is served in spite of it. The newest commit,
    lost from storage, is refused with the reason, and not replaced by an older one in silence."""
    opened = ranks.open(tmp_path, **POLICY)
    for step in (1, 2, 3):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    state = state_of(0)
    for restore, expected in (({"mode": "Step", "step": 2}, 2), ({"mode": "None"}, None)):
        opened = ranks.open(tmp_path, restore=restore)
        found = opened.find()
        assert (found and found.step) == expected
        assert opened.load(state) == expected
        assert opened.load(state, step=1) == 1
        opened.close()
        ranks.alone()
    shutil.rmtree(tmp_path / "step-3")
    opened = ranks.open(tmp_path, **POLICY)
    assert opened.load(state) == 2
    assert opened.last_load is not None
    assert list(opened.last_load.refused) == ["storage:3"]
    assert "is not there any more" in opened.last_load.refused["storage:3"]
