"""
The whole of: pods whose ranks hold different leaves say together what a load did not restore, and which leaves differ from pod to pod.

Called from: pytest.
"""

from pathlib import Path
from typing import Any

import torch

from pillion import checkpointer
from process.ranks import Peer, Ranks
from support.deadlines import Deadline

PODS = ("a", "b")


def stage(peer: Peer) -> dict[str, Any]:
    """What a stage of a pipeline saves: its own layers, and what every rank has."""
    return {
        "layers": {str(peer.rank): {"w": torch.full((500,), float(peer.rank))}},
        "optimizer": {"state": {str(peer.rank): torch.ones(500)}},
        "rng": torch.full((16,), peer.rank),
        "lr": 0.5,
    }


def test_pods_say_together_what_no_rank_asked_for_and_what_differs(ranks: Ranks, tmp_path: Path) -> None:
    """Layers of the other stage are somebody's; the optimizer of both is nobody's. To look is no load."""

    def train(peer: Peer) -> tuple[Any, ...]:
        opened = checkpointer.Checkpointer(tmp_path)
        for step in (1, 2, 3):  # one more than there are slots: the first is on storage alone
            opened.save(stage(peer), step).result(Deadline.COMMITTED.s)
        found = opened.find()
        state = stage(peer)
        assert opened.load(state, step=1) == 1
        whole = opened.last_load
        weights = {"layers": state["layers"], "new": torch.ones(peer.rank + 1)}
        assert opened.load(weights, step=1, strict=False) == 1
        part = opened.last_load
        opened.close()
        assert found is not None
        assert whole is not None
        assert part is not None
        assert torch.equal(state["layers"][str(peer.rank)]["w"], torch.full((500,), float(peer.rank)))
        assert (whole.tier, int(state["rng"][0])) == ("storage", 0)
        return (found.step, found.tier), whole.unexpected, whole.differing, part.unexpected, part.missing

    report = ((3, "arena"), (), ("rng",), ("lr", "optimizer", "rng"), ("new",))
    assert ranks.start(train, num_ranks=2, pods=PODS).finish(Deadline.LOADED) == [report, report]


def test_pods_read_from_memory_what_each_of_them_has_whole_and_the_rest_from_storage(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Each pod's memory has its own layers only. What all have alike is read from the newest snapshot; all of it from storage, and the
    snapshot that was passed over is named. The next load is what it would have been."""

    def train(peer: Peer) -> list[Any]:
        opened = checkpointer.Checkpointer(tmp_path)
        opened.save(stage(peer), 1).result(Deadline.COMMITTED.s)
        opened.save(stage(peer) | {"lr": 0.25}, 2, persist=False).result(Deadline.COMMITTED.s)
        told = [opened.read(prefix="lr")["lr"]]
        whole = opened.read()
        told += [whole["lr"], sorted(whole["layers"]), [float(whole["layers"][str(rank)]["w"][0]) for rank in (0, 1)]]
        state = stage(peer)
        told += [opened.load(state), state["lr"]]
        told += [opened.load(state, path=tmp_path / "step-1"), state["lr"]]
        opened.close()
        return told

    told = [0.25, 0.5, ["0", "1"], [0.0, 1.0], 2, 0.25, 1, 0.5]
    assert ranks.start(train, num_ranks=2, pods=PODS).finish(Deadline.LOADED) == [told, told]
