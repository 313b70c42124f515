"""
The whole of: the report of a run that was really killed and resumed.

Called from: pytest.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from pillion import checkpointer
from pillion_sidecar.cli import main
from pillion_sidecar.cli.exits import Exit
from process.ranks import Peer, Ranks
from support.deadlines import Deadline


def test_a_run_that_was_killed_and_resumed_says_so(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two attempts, one restart from the last commit, what it lost, and every second of the time in one kind."""
    root = tmp_path / "run"

    def train(peer: Peer) -> None:
        with checkpointer.Checkpointer(root) as opened:
            state: dict[str, Any] = {"w": torch.zeros(9), "step": 0}
            opened.load(state)
            peer.tell(state["step"])
            while peer.hear() is not None:
                state["step"] += 1
                if state["step"] % 2 == 0:
                    opened.save(state, state["step"]).result(Deadline.COMMITTED.s)
                peer.tell(state["step"])

    [first] = (job := ranks.start(train)).trainers
    assert first.hear() == 0
    for step in range(1, 6):
        first.say(step)
        assert first.hear() == step
    first.kill(signal.SIGKILL)
    job = ranks.start(train)
    [second] = job.trainers
    assert second.hear() == 4
    for step in (5, 6):
        second.say(step)
        assert second.hear() == step
    second.say(None)
    job.finish()
    ranks.alone()

    assert main.main(["report", str(root), "-o", str(tmp_path / "page.json")]) == Exit.WELL
    report = json.loads((tmp_path / "page.json").read_text())
    assert report["missing"] == []
    assert report["attempts"] == 2
    first_attempt, second_attempt = report["journal"]["attempts"]
    assert (first_attempt["saves"], second_attempt["saves"]) == (2, 1)
    assert first_attempt["ended"] == "died"
    [restart] = report["restarts"]
    assert restart["step"] == 4
    assert 0 < restart["lostSeconds"] <= report["retrainedSeconds"] + report["stalledSeconds"] + report["waitedSeconds"]
    assert [each["step"] for each in report["saves"]] == [2, 4, 6]
    assert all(each["lagSeconds"] > 0 and each["sizeBytes"] > 0 for each in report["saves"])
    kinds = ("trained", "retrained", "stalled", "waited", "restoring", "down")
    assert sum(report[f"{kind}Seconds"] for kind in kinds) == pytest.approx(report["wallSeconds"], abs=0.01)
    assert 0 < report["goodput"] < 1

    assert main.main(["report", str(root), "-o", str(tmp_path / "page.html")]) == Exit.WELL
    capsys.readouterr()
    page = (tmp_path / "page.html").read_text()
    assert "step 4 from" in page
    assert ">died<" in page
