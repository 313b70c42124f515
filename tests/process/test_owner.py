"""
The whole of: two trainings that mean one root, as real processes in pods of their own.

Called from: pytest.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import pillion
from pillion import checkpointer
from process import ranks as processes
from process.ranks import Peer, Ranks, Trainer
from support import deadlines
from support.deadlines import Deadline

SNAPSHOTS = {"trigger": {"periodSteps": 100_000, "snapshotSteps": 1}}


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((4096,), float(step)), "step": step}


def train(peer: Peer, root: Path) -> None:
    """Saves each step that the test says, to storage or to memory as the policy has it."""
    with checkpointer.Checkpointer(root, policy=SNAPSHOTS) as opened:
        peer.tell(opened.load(state_of(0)))
        while (command := peer.hear()) is not None:
            step, persist = command
            peer.tell(opened.save(state_of(step), step, persist=persist).result(Deadline.COMMITTED.s).step)


def first_training(ranks: Ranks, root: Path) -> Trainer:
    """A training in a pod of its own that has begun from nothing and committed step 1."""
    first = ranks.start(lambda peer: train(peer, root), num_ranks=1, pods="a")[0]
    assert first.hear() is None
    first.say((1, True))
    assert first.hear() == 1
    return first


def test_a_second_training_on_a_root_is_refused_by_its_constructor_and_the_first_goes_on(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The error has both names. When the first has ended, the second is let in at once, and finds its checkpoints."""
    first = first_training(ranks, tmp_path)

    def come(peer: Peer) -> tuple[str, int | None]:
        try:
            with checkpointer.Checkpointer(tmp_path, policy=SNAPSHOTS) as opened:
                return "", opened.load(state_of(0))
        except pillion.UsageError as err:
            return str(err), None

    [(said, _)] = ranks.start(come, num_ranks=1, pods="b").finish()
    assert "which lives" in said
    assert said.count("sidecar's pid") == 2
    first.say((2, True))
    assert first.hear() == 2
    first.say(None)
    first.wait()
    begun = time.monotonic()
    assert ranks.start(come, num_ranks=1, pods="b").finish() == [("", 2)]
    assert time.monotonic() - begun < 10.0, "nobody waits for an owner that has said goodbye"


def test_a_training_whose_trainer_was_killed_is_succeeded_in_another_pod_when_its_snapshot_is_on_storage(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Nobody says goodbye, and the sidecar of the dead lives on: the newest snapshot is neither fenced off nor waited for in vain."""
    first = first_training(ranks, tmp_path)
    first.say((2, False))
    assert first.hear() == 2
    os.kill(first.pid, signal.SIGKILL)
    successor = ranks.start(lambda peer: train(peer, tmp_path), num_ranks=1, pods="b")[0]
    assert successor.hear(Deadline.LOADED) == 2
    successor.say((3, True))
    assert successor.hear() == 3
    successor.say(None)
    successor.wait()
    first.wait()


def test_an_owner_that_vanished_with_its_sidecar_is_succeeded_at_the_bound(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a node that is lost: nothing says that it is dead but its silence."""
    monkeypatch.setenv("PILLION_OWNER_SILENT_S", "1")
    first = first_training(ranks, tmp_path)
    sidecar = ranks.sidecar()
    arguments = psutil.Process(sidecar).cmdline()
    os.kill(sidecar, signal.SIGSTOP)
    os.kill(ranks.executor(), signal.SIGKILL)
    os.kill(first.pid, signal.SIGKILL)
    os.kill(sidecar, signal.SIGKILL)
    first.wait()
    shutil.rmtree(arguments[arguments.index("--runtime-dir") + 1])
    successor = ranks.start(lambda peer: train(peer, tmp_path), num_ranks=1, pods="b")[0]
    assert successor.hear(Deadline.LOADED) == 1
    successor.say(None)
    successor.wait()
    deadlines.eventually(lambda: processes.committed(tmp_path) == [1], Deadline.SETTLE, "the checkpoint is there")


def test_a_training_whose_sidecar_was_killed_keeps_its_root(ranks: Ranks, tmp_path: Path) -> None:
    """Another one that comes in the moment before the sidecar's successor has its trainer again is refused, and the first saves on."""

    def stubborn(peer: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path, policy=SNAPSHOTS) as opened:
            while (step := peer.hear()) is not None:
                error = opened.save(state_of(step), step, persist=True).committed.exception(Deadline.COMMITTED.s)
                peer.tell(error is None)

    first = ranks.start(stubborn, num_ranks=1, pods="a")[0]
    first.say(1)
    assert first.hear()
    os.kill(first.pid, signal.SIGSTOP)
    os.kill(ranks.sidecar(), signal.SIGKILL)

    def come(peer: Peer) -> str:
        peer.tell("comes")
        try:
            checkpointer.Checkpointer(tmp_path, policy=SNAPSHOTS).close()
        except pillion.UsageError as err:
            return str(err)
        return "was let in"

    second = ranks.start(come, num_ranks=1, pods="a")[0]
    assert second.hear() == "comes"
    processes.go_on(first.pid)
    assert "root" in second.hear()
    steps = iter(range(2, 100))

    def saved() -> bool:
        first.say(next(steps))
        return bool(first.hear())

    deadlines.eventually(saved, Deadline.COMMITTED, "the first one saves on")
    first.say(None)
    first.wait()
    second.wait()
    assert processes.committed(tmp_path)[0] == 1
    assert len(processes.committed(tmp_path)) == 2
