"""
The whole of: a read without a state dict gives what was saved, whole, from memory and from storage, and changes nothing in the run.

Called from: pytest.
"""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pillion
from pillion import checkpointer, reading
from pillion.wire.load_messages import Tier
from process.ranks import Peer, Ranks
from support.deadlines import Deadline

POLICY: dict[str, Any] = {"staging": {"slots": 3}, "trigger": {"periodSteps": 100, "onTermination": "Skip"}}


def state_of(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((300, 7), float(step)), "b": torch.arange(5) + step, "scale": torch.tensor(step)},
        "optimizer": {
            "state": {0: {"m": torch.full((3,), step, dtype=torch.bfloat16)}},
            "groups": [{"lr": 0.1 * step}],
        },
        "layers": [torch.ones(2) * step, torch.zeros(0, 4)],
        "note": {"epoch": step, "name": "text"},
    }


def same(one: Any, other: Any) -> bool:
    """Equal, in values, types and nesting; keys of dicts as text."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        texts = {str(key): value for key, value in other.items()}
        return sorted(map(str, one)) == sorted(texts) and all(
            same(value, texts[str(key)]) for key, value in one.items()
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def test_the_whole_state_or_a_part_of_it_comes_from_memory_and_from_storage_and_nothing_changes(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The next load takes what it would have taken; the next save may have the step that it could have had."""
    opened = ranks.open(tmp_path, **POLICY)
    with pytest.raises(pillion.NoCheckpoint, match="there is no checkpoint to read"):
        opened.read()
    for step in (1, 2, 3, 4):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    opened.save(state_of(5), 5, persist=False).result(Deadline.COMMITTED.s)
    found = opened.find()
    assert found == pillion.Found(step=5, tier=Tier.ARENA, path=None)
    assert same(opened.read(), state_of(5))
    assert opened.find(1) == pillion.Found(step=1, tier=Tier.STORAGE, path=f"{tmp_path}/step-1")
    assert same(opened.read(1), state_of(1))
    assert same(
        opened.read(prefix=["note", "model.b"]), {"model": {"b": torch.arange(5) + 5}, "note": state_of(5)["note"]}
    )
    assert same(opened.read(2, prefix="layers.1"), {"layers": {1: torch.zeros(0, 4)}})
    with pytest.raises(pillion.NoCheckpoint, match="step 9"):
        opened.read(9)
    with pytest.raises(pillion.IncompatibleCheckpoint, match=r"nothing below 'modle'.*'layers', 'model', 'note'"):
        opened.read(prefix=["modle", "note"])
    assert opened.find() == found
    opened.save(state_of(6), 6, persist=False).result(Deadline.COMMITTED.s)
    state = state_of(0)
    assert opened.load(state) == 6
    assert same(state, state_of(6))


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_is_read(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is asked for by its number is an error. The damage is in a tensor, which only the second half of the read looks at."""
    with checkpointer.Checkpointer(tmp_path, policy=POLICY) as first:
        for step in (1, 2):
            first.save(state_of(step), step).result(Deadline.COMMITTED.s)
    ranks.alone()
    (data,) = (tmp_path / "step-2").glob("__0_*")
    content = bytearray(data.read_bytes())
    content[content.index(state_of(2)["model"]["w"].numpy().tobytes()) + 100] ^= 1
    data.write_bytes(content)
    opened = ranks.open(tmp_path, **POLICY)
    with caplog.at_level(logging.WARNING):
        assert same(opened.read(), state_of(1))
    assert "step-2" in caplog.text
    with pytest.raises(pillion.CorruptCheckpoint, match=r"model\.w"):
        opened.read(2)
    assert same(opened.read(2, prefix="note"), {"note": state_of(2)["note"]}), "what is not damaged is read"


def test_a_large_state_is_read_in_parts_and_the_arena_holds_one_part(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 MiB in 12 tensors, with a part of 4 MiB: the segment of the run that reads them stays below 6 MiB."""
    state = {f"w{number}": torch.full((512, 1024), float(number)) for number in range(12)} | {"step": 7}
    with checkpointer.Checkpointer(tmp_path / "one", policy=POLICY) as first:
        first.save(state, 7).result(Deadline.COMMITTED.s)
    ranks.alone()
    monkeypatch.setattr(reading, "PART_BYTES", 4 * 1024**2)
    opened = ranks.open(tmp_path / "other", **POLICY)
    assert same(opened.read(path=tmp_path / "one"), state)
    segment = Path(opened._session.runtime_dir) / "segment-0.arena"
    assert os.stat(segment).st_blocks * 512 < 6 * 1024**2


def sharded(peer: Peer) -> dict[str, Any]:
    """Two ranks' state: shards of rows and of columns, a replica, a name of each rank, and one that differs."""
    mesh = init_device_mesh("cpu", (peer.world_size,))
    rows, columns = torch.arange(70.0).view(7, 10), torch.arange(30).view(5, 6)
    return {
        "rows": distribute_tensor(rows, mesh, [Shard(0)]),
        "columns": distribute_tensor(columns, mesh, [Shard(1)]),
        "replica": DTensor.from_local(torch.ones(4), mesh, [Replicate()], run_check=False),
        "own": {str(peer.rank): peer.rank, "tensor": {str(peer.rank): torch.full((3,), peer.rank)}},
        "differs": f"rank {peer.rank}",
    }


WHOLE = {
    "rows": torch.arange(70.0).view(7, 10),
    "columns": torch.arange(30).view(5, 6),
    "replica": torch.ones(4),
    "own": {"0": 0, "1": 1, "tensor": {"0": torch.full((3,), 0), "1": torch.full((3,), 1)}},
    "differs": "rank 0",
}


def test_shards_of_two_ranks_are_read_whole_by_both_from_memory_and_from_storage(ranks: Ranks, tmp_path: Path) -> None:
    """And by one rank of another run, from storage."""

    def train(peer: Peer) -> list[bool]:
        with checkpointer.Checkpointer(tmp_path / "root", policy=POLICY) as opened:
            state = sharded(peer)
            for step in (1, 2, 3, 4):
                opened.save(state, step).result(Deadline.COMMITTED.s)
            opened.save(state, 5, persist=False).result(Deadline.COMMITTED.s)
            told = [same(opened.read(), WHOLE), same(opened.read(1), WHOLE)]
            told += [same(opened.read(prefix="rows"), {"rows": WHOLE["rows"]})]
            assert opened.load(state) == 5, "its own parts"
            return [*told, state["differs"] == f"rank {peer.rank}"]

    assert ranks.start(train, num_ranks=2).finish(Deadline.LOADED) == [[True] * 4] * 2
    ranks.alone()
    assert same(ranks.open(tmp_path / "other", **POLICY).read(path=tmp_path / "root"), WHOLE)


def test_ranks_that_read_different_things_are_told_so(ranks: Ranks, tmp_path: Path) -> None:
    """All ranks make the same call."""

    def train(peer: Peer) -> str:
        with checkpointer.Checkpointer(tmp_path, policy=POLICY) as opened:
            opened.save({"a": 1, "b": 2}, 1).result(Deadline.COMMITTED.s)
            try:
                return str(opened.read(prefix="ab"[peer.rank]))
            except (pillion.UsageError, pillion.LoadError) as err:
                return str(err)

    told = ranks.start(train, num_ranks=2, env={"PILLION_PEER_TIMEOUT_S": "3"}).finish(Deadline.LOADED)
    assert any("read(step=None, prefix=['a'])" in text and "prefix=['b']" in text for text in told)
