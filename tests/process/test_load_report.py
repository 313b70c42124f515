"""
The whole of: a load restores what was asked, or says what it did not.

Called from: pytest.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pillion
from pillion import checkpointer
from pillion.wire.load_messages import Tier
from process.ranks import Peer, Ranks
from support import logs
from support.deadlines import Deadline

POLICY: dict[str, Any] = {"staging": {"slots": 3}, "trigger": {"periodSteps": 100, "onTermination": "Skip"}}


def state_of(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((300,), float(step)), "b": torch.full((7,), 70000 + step)},
        "optimizer": {"state": {"w": {"exp_avg": torch.full((300,), step + 0.5)}}, "groups": [1, 2]},
        "step": step,
    }


def reported(opened: checkpointer.Checkpointer) -> pillion.LoadReport:
    assert opened.last_load is not None
    return opened.last_load


def test_a_snapshot_that_holds_more_than_is_asked_serves_the_load(ranks: Ranks, tmp_path: Path) -> None:
    """Some of its leaves, in another order and in other types; what nothing asked for, what was narrowed and what is missing is
    reported. A name that only an older checkpoint has is loaded from there, and the snapshot named. Looking changes nothing."""
    opened = ranks.open(tmp_path, **POLICY)
    opened.save({**state_of(10), "old": torch.ones(3)}, 10).result(Deadline.COMMITTED.s)
    opened.save(state_of(15), 15, persist=False).result(Deadline.COMMITTED.s)

    some: dict[str, Any] = {"step": 0, "model": {"b": torch.zeros(7, dtype=torch.int16), "w": torch.zeros(300)}}
    targets = some["model"]["b"], some["model"]["w"]
    assert opened.find() == pillion.Found(step=15, tier=Tier.ARENA, path=None)
    assert opened.load(some) == 15
    assert some["step"] == 15
    assert torch.equal(targets[1], torch.full((300,), 15.0))
    assert torch.equal(targets[0], torch.full((7,), 70015).short())
    report = reported(opened)
    assert (report.tier, report.unexpected, report.missing) == ("arena", ("optimizer",), ())
    assert report.narrowed == {"model.b": "int64 -> int16"}
    assert opened.load({}) == 15
    assert reported(opened).unexpected == ("model", "optimizer", "step")

    lazy = {**state_of(0), "optimizer": {"state": {}, "groups": [0, 0]}}
    assert opened.load(lazy) == 15
    assert reported(opened).unexpected == ("optimizer.state",)

    renamed: dict[str, Any] = {"model": {"w": torch.zeros(300), "bias": torch.full((7,), 3)}, "step": 0}
    with pytest.raises(pillion.IncompatibleCheckpoint, match=r"'model\.bias' is not in it.*'model\.b'"):
        opened.load(renamed)
    assert opened.load(renamed, strict=False) == 15
    assert reported(opened).missing == ("model.bias",)
    assert torch.equal(renamed["model"]["bias"], torch.full((7,), 3))
    assert torch.equal(renamed["model"]["w"], torch.full((300,), 15.0))

    older = {"old": torch.zeros(3), "step": 0}
    assert opened.load(older) == 10
    assert older["step"] == 10
    assert list(reported(opened).passed_over) == ["arena:15"]
    assert "'old'" in reported(opened).passed_over["arena:15"]
    assert opened.find(7) is None
    assert opened.find(10) == pillion.Found(step=10, tier=Tier.ARENA, path=None)


def test_what_shares_memory_or_keeps_a_state_below_the_top_level_is_restored_or_named(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Two names of one tensor with two values are named; an optimizer in a list is given its state."""
    opened = ranks.open(tmp_path, **POLICY)
    weight = torch.nn.Parameter(torch.ones(2))
    saved = {"a": torch.ones(3), "b": torch.zeros(3), "opts": [torch.optim.SGD([weight], lr=0.5)]}
    opened.save(saved, 1).result(Deadline.COMMITTED.s)
    own = torch.optim.SGD([weight], lr=0.1)
    tied = torch.full((3,), 7.0)
    assert opened.load({"a": tied, "b": tied, "opts": [own]}) == 1
    assert reported(opened).conflicting == ("a", "b")
    assert reported(opened).replaced == ()
    assert own.param_groups[0]["lr"] == 0.5
    assert torch.equal(tied, torch.zeros(3))


def test_a_snapshot_that_does_not_fit_is_never_a_fresh_start(ranks: Ranks, tmp_path: Path) -> None:
    """With nothing on storage, a state dict that asks for what the snapshot does not have is an error with the names; so is one of
    another world size, as often as the trainers come back."""
    opened = ranks.open(tmp_path, **POLICY)
    assert opened.find() is None
    opened.save(state_of(5), 5, persist=False).result(Deadline.COMMITTED.s)
    with pytest.raises(pillion.IncompatibleCheckpoint, match=r"step 5.*'other' is not in it.*'model'"):
        opened.load({"other": torch.zeros(3)})
    state = state_of(0)
    assert opened.load(state) == 5
    assert state["step"] == 5


def test_values_that_differ_from_rank_to_rank_are_named_at_the_save_and_at_the_load(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Under one name storage keeps the lowest rank's: rank 0's log says so once, and the load that gives it to all ranks names it."""
    root = tmp_path / "root"

    def states(peer: Peer) -> dict[str, Any]:
        return {"rng": torch.full((9,), peer.rank), "loader": f"rank {peer.rank}", "lr": 0.1, "w": torch.ones(50)}

    def train(peer: Peer) -> list[str]:
        with checkpointer.Checkpointer(root, policy=POLICY) as opened, logs.heard() as warnings:
            for step in (1, 2):
                opened.save(states(peer), step).result(Deadline.COMMITTED.s)
        return warnings

    def load(peer: Peer) -> tuple[Any, ...]:
        with checkpointer.Checkpointer(root, policy=POLICY) as opened, logs.heard() as warnings:
            state = states(peer)
            opened.load(state)
            assert opened.last_load is not None
            return (
                state["loader"],
                int(state["rng"][0]),
                opened.last_load.tier,
                opened.last_load.differing,
                len(warnings),
            )

    first, second = ranks.start(train, num_ranks=2).finish()
    assert [("loader, rng" in text) for text in first] == [True]
    assert second == []
    ranks.alone()
    loaded = ("rank 0", 0, "storage", ("loader", "rng"))
    # Rank 0 also says what the run resumed from.
    assert ranks.start(load, num_ranks=2).finish() == [(*loaded, 2), (*loaded, 0)]


def test_the_first_rank_says_in_one_line_what_a_run_resumed_from(ranks: Ranks, tmp_path: Path) -> None:
    """
    From memory, from storage, and from where the script named a path. A fresh start says nothing. Behind the first load neither does a read,
    nor a load of what the script names; a load that lets Pillion choose says it again.
    """

    def train(peer: Peer) -> list[list[str]]:
        said = []
        with checkpointer.Checkpointer(tmp_path / "root", policy=POLICY) as opened:
            with logs.heard() as fresh:
                opened.load(state_of(0))
            said.append(fresh)
            for step in (1, 2):
                opened.save(state_of(step), step, persist=step == 1).result(Deadline.COMMITTED.s)
            with logs.heard() as chosen:
                opened.load(state_of(0))
            said.append(chosen)
            with logs.heard() as named:
                opened.read()
                opened.load(state_of(0), path=tmp_path / "root" / "step-1")
            said.append(named)
        return said

    def resume(peer: Peer) -> list[list[str]]:
        with logs.heard() as lines, checkpointer.Checkpointer(tmp_path / "root", policy=POLICY) as opened:
            opened.load(state_of(0))
        with logs.heard() as elsewhere, checkpointer.Checkpointer(tmp_path / "new", policy=POLICY) as opened:
            opened.load(state_of(0), path=tmp_path / "root")
        return [lines, elsewhere]

    first, second = ranks.start(train, num_ranks=2).finish()
    ranks.alone()
    from_storage, on_rank_1 = ranks.start(resume, num_ranks=2).finish()
    assert [first[0], first[2], *second, *on_rank_1] == [[]] * 7
    lines = [*first[1], *from_storage[0], *from_storage[1]]
    assert [re.sub(r"\d+\.\d\d s", "TIME", each) for each in lines] == [
        "pillion: resumed from step 2 (memory, TIME)",
        "pillion: resumed from step 1 (storage, TIME)",
        f"pillion: resumed from step 1 in {tmp_path}/root/step-1 (storage, TIME)",
    ]
