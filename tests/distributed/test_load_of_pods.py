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
