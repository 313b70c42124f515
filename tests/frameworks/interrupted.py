"""
The whole of: a training script of this level that is killed, resumes from memory, and resumes from storage. Each part is compared, bit for bit,
with the same script without Pillion that was never interrupted.

Called from: the tests of recipes.
Must never: accept a resume from another step or another place than the one that was asked for.
"""

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from frameworks import losses
from pillion import checkpointer
from process.ranks import Peer, Ranks
from support.deadlines import Deadline

POLICY: Final[dict[str, Any]] = {"trigger": {"periodSteps": 3, "snapshotSteps": 1, "onTermination": "Skip"}}
STEPS: Final = 12
KILLED_STATUS: Final = 7

Script = Callable[..., Any]
"""(peer, folder, root, kill_at) -> the step that it has loaded, and from where. It tells `losses` each loss and its weights."""


def assert_resumes(ranks: Ranks, tmp_path: Path, script: Script, *, num_ranks: int = 1, killed_at: int = 8) -> None:
    """
    Run the script without Pillion; with it, until it is killed; from memory; from storage. Assert that the last two are the first.

    Args:
        script: saves by POLICY and makes STEPS steps.
        killed_at: the step that it makes, and does not save.

    Blocks: up to four times Deadline.SCRIPT.
    """
    root, whole, first = tmp_path / "runs", tmp_path / "whole", tmp_path / "first"
    start = functools.partial(ranks.start, num_ranks=num_ranks)
    start(functools.partial(_run, script, whole, None, -1)).finish(Deadline.SCRIPT)
    killed = start(functools.partial(_run, script, first, root, killed_at))
    assert [killed[rank].wait(Deadline.SCRIPT) for rank in range(num_ranks)] == [KILLED_STATUS] * num_ranks
    for tier, step in (("arena", killed_at - 1), ("storage", (killed_at - 1) // 3 * 3)):
        second = tmp_path / tier
        if tier == "storage":
            ranks.alone()
            for later in range(step + 1, STEPS + 1):
                shutil.rmtree(root / f"step-{later}", ignore_errors=True)
        job = start(functools.partial(_run, script, second, root, -1), attempt=1)
        assert job.finish(Deadline.SCRIPT) == [(step, tier)] * num_ranks
        losses.assert_equal(whole, first, second, ranks=num_ranks, killed_at=killed_at, resumed_from=step)


def _run(script: Script, folder: Path, root: Path | None, kill_at: int, peer: Peer) -> Any:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)  # the same on all ranks, as frameworks do it: each has its own rows
    return script(peer, folder, root, kill_at)


class Told:
    """What a script does at each step beside its training: it tells the loss, dies where it has to, and saves."""

    def __init__(self, peer: Peer, folder: Path, opened: checkpointer.Checkpointer | None, kill_at: int) -> None:
        self._peer, self._folder, self._opened, self._kill_at = peer, folder, opened, kill_at

    def step(self, state: Any, step: int, loss: float) -> None:
        """Tell the loss of this step, and save the state behind it if the policy asks for that."""
        losses.note(self._folder, self._peer.rank, step, loss)
        if step == self._kill_at:
            os._exit(KILLED_STATUS)
        if self._opened is not None and self._opened.due(step):
            self._opened.save(state, step).staged.result(Deadline.STAGED.s)

    def end(self, weights: Mapping[str, torch.Tensor]) -> tuple[int | None, str | None]:
        """Tell the weights, and close. Return the step that was loaded, and from where."""
        losses.note_weights(self._folder, self._peer.rank, weights)
        report = None if self._opened is None else self._opened.last_load
        if self._opened is not None:
            self._opened.close()
        return (None, None) if report is None else (report.step, str(report.tier))
