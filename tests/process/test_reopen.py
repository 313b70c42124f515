"""
The whole of: one root used by one Checkpointer after another.

Called from: pytest.
Must never: pause between the two.
"""

from pathlib import Path

import torch

from process.ranks import Ranks
from support.deadlines import Deadline


def test_a_root_can_be_opened_again_at_once(ranks: Ranks, tmp_path: Path) -> None:
    """A Checkpointer that is opened the moment another one closed finds a sidecar, and what the other one saved."""
    for step in range(1, 6):
        opened = ranks.open(tmp_path)
        state = {"weight": torch.zeros(100)}
        assert opened.load(state) == (step - 1 or None)
        assert torch.equal(state["weight"], torch.full((100,), float(step - 1)))
        opened.save({"weight": torch.full((100,), float(step))}, step).result(Deadline.COMMITTED.s)
        opened.close()
