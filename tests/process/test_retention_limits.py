"""
The whole of: the age and the quota of a root's checkpoints, as trainings without a cluster have them.

Called from: pytest.
"""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

from pillion.wire import names
from pillion_sidecar.checkpoint import pins
from pillion_sidecar.storage.local import LocalFolder
from process.ranks import Ranks, committed
from support import deadlines
from support.deadlines import Deadline

STATE_BYTES = 2**20


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((STATE_BYTES // 4,), float(step))}


def test_checkpoints_together_have_at_most_the_quota_and_pins_stay(ranks: Ranks, tmp_path: Path) -> None:
    """Three checkpoints fit. The oldest goes with each further save, and the pinned one stays and counts."""
    opened = ranks.open(tmp_path, retention={"maxBytes": 3 * STATE_BYTES + 2**18}, trigger={"onTermination": "Skip"})
    for step in (1, 2):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    assert pins.pin(LocalFolder(str(tmp_path)), 1)
    for step in (3, 4, 5):
        opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
    deadlines.eventually(lambda: committed(tmp_path) == [1, 4, 5], Deadline.SETTLE, "the oldest that may go went")
    assert opened.load(state_of(0), step=4) == 4


def test_a_quota_below_the_newest_is_told_and_fails_no_save(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each save replaces the one before; the trainer's log names what must stay, and why."""
    opened = ranks.open(tmp_path, retention={"keepLast": 5, "maxBytes": "512Ki"}, trigger={"onTermination": "Skip"})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
        deadlines.eventually(lambda: committed(tmp_path) == [3], Deadline.SETTLE, "the newest alone stays")
        told = "retention.maxBytes is 512Ki, and the checkpoints that must stay have "
        deadlines.eventually(lambda: told in caplog.text, Deadline.SETTLE, "the trainer is told")
    assert caplog.text.count(told) == 1
    assert ", the newest)" in caplog.text


def test_a_checkpoint_goes_when_it_is_too_old(ranks: Ranks, tmp_path: Path) -> None:
    """Without keepLast: all that are younger than a second stay, and step 1 goes with the first save that comes later."""
    opened = ranks.open(tmp_path, retention={"maxAge": "1s"}, trigger={"onTermination": "Skip"})
    steps = itertools.count(1)
    created_ns: dict[int, int] = {}

    def first_is_gone() -> bool:
        step = next(steps)
        opened.save({"w": torch.ones(3)}, step).result(Deadline.COMMITTED.s)
        created_ns[step] = json.loads((tmp_path / f"step-{step}" / names.MANIFEST).read_text())["created_ns"]
        return 1 not in committed(tmp_path)

    deadlines.eventually(first_is_gone, Deadline.SETTLE, "step 1 is removed")
    newest = max(created_ns)
    deadlines.eventually(
        lambda: all(created_ns[newest] - created_ns[each] <= 1e9 for each in committed(tmp_path)),
        Deadline.SETTLE,
        "all that stay are young",
    )
    young = {each for each, at in created_ns.items() if created_ns[newest] - at <= 1e9}
    assert set(committed(tmp_path)) == young
