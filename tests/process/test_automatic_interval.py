"""
The whole of: `trigger.auto`, from a policy to the steps at which ranks save, and to what the root knows of it later.

Called from: pytest.
"""

import itertools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist

from pillion import checkpointer
from pillion.wire import names
from pillion_sidecar.checkpoint import trainings
from pillion_sidecar.interval import Costs, History
from pillion_sidecar.storage.local import LocalFolder
from process import ranks as processes
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline

POLICY: Final[dict[str, Any]] = {"trigger": {"auto": {"maxSeconds": 1}}}


def note_of(root: Path) -> trainings.Note:
    return trainings.read(LocalFolder(str(root)))


def train(opened: checkpointer.Checkpointer, steps: Iterator[int], num_floats: int = 64) -> int:
    """Train until a save is due, and wait until it is committed. Return its step."""

    def step() -> int:
        number = next(steps)
        return number if opened.due(number) else 0

    due = deadlines.eventually(step, Deadline.COMMITTED, "a save is due")
    opened.save({"weight": torch.full((num_floats,), float(due))}, due).result(Deadline.COMMITTED.s)
    return due


def steps_of(opened: checkpointer.Checkpointer) -> int:
    """Return the period that the sidecar has chosen, in steps. 0: none yet."""
    found = re.match(r"every (?:(\d+) steps|step) ", processes.status(opened)["interval"])
    return 0 if found is None else int(found[1] or 1)


def test_two_ranks_save_at_the_same_steps_of_a_period_that_nobody_set(ranks: Ranks, tmp_path: Path) -> None:
    """Two saves are measured. Then both ranks save by periods that the sidecar has chosen, each time at the same step."""

    def run(peer: Peer) -> list[int]:
        due, enough = list[int](), torch.zeros(1)
        with checkpointer.Checkpointer(tmp_path, policy=POLICY) as opened:
            for step in itertools.count(1):
                if opened.due(step):
                    due.append(step)
                    opened.save({"weight": torch.full((64,), float(step))}, step).result(Deadline.COMMITTED.s)
                if peer.rank == 0:
                    enough[0] = len(due) >= 5
                dist.all_reduce(enough)
                if enough[0]:
                    break
        return due

    first, second = ranks.start(run, num_ranks=2).finish(Deadline.SCRIPT)
    assert first == second
    assert len(first) == 5
    ranks.alone()
    note = note_of(tmp_path)
    assert (note.open, note.history.failures, note.world_size) == ("", 0, 2)
    assert note.costs is not None
    assert note.steps > 1


def test_the_period_follows_a_stall_that_has_grown(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A state a thousand times as large holds training up for longer, so saves become rarer. The trainer's log has each change and its reason."""
    history = History(observed_s=3600.0, failures=6)
    trainings.write(LocalFolder(str(tmp_path)), trainings.Note(history=history))
    steps = itertools.count(1)
    with caplog.at_level(logging.INFO, logger="pillion"):
        opened = ranks.open(tmp_path, trigger={"auto": {"overheadPercent": 1, "maxSeconds": 30}})
        while not steps_of(opened):
            train(opened, steps)
        small = steps_of(opened)
        assert "a failure each 10 min as seen in this training" in processes.status(opened)["interval"]
        for _ in range(6):
            train(opened, steps, num_floats=25_000_000)
            if steps_of(opened) > 1.25 * small:
                break
        assert steps_of(opened) > 1.25 * small, processes.status(opened)["interval"]
    reasons = [each.getMessage() for each in caplog.records if "automatic interval: every" in each.getMessage()]
    assert len(reasons) >= 2
    assert {each.levelno for each in caplog.records if "automatic interval" in each.getMessage()} == {logging.INFO}


def test_a_crash_counts_as_a_failure_and_the_next_session_has_its_period_at_once(ranks: Ranks, tmp_path: Path) -> None:
    """A session that was killed has failed, and one that was closed has not. The costs of the last one give a period before any save."""

    def run(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy=POLICY)
        steps = itertools.count(1)
        while not steps_of(opened):
            train(opened, steps)
        peer.tell()
        peer.hear()
        opened.close()

    job = ranks.start(run)
    job.hear()
    deadlines.eventually(lambda: note_of(tmp_path).costs is not None, Deadline.SETTLE, "the costs are noted")
    job.kill()
    assert note_of(tmp_path).history.failures == 0

    opened = ranks.open(tmp_path, **POLICY)
    deadlines.eventually(lambda: note_of(tmp_path).history.failures == 1, Deadline.SETTLE, "the crash counts")
    deadlines.eventually(lambda: steps_of(opened), Deadline.SETTLE, "there is a period before the first save")
    opened.close()
    ranks.alone()

    again = ranks.open(tmp_path, **POLICY)
    deadlines.eventually(lambda: steps_of(again), Deadline.SETTLE, "there is a period again")
    assert processes.status(again)["metrics"]["saves_committed"] == 0, "a new sidecar has it without a save"
    assert note_of(tmp_path).history.failures == 1, "a session that was closed is no failure"


def test_a_note_that_is_damaged_costs_the_history_and_nothing_else(ranks: Ranks, tmp_path: Path) -> None:
    """Numbers that are none, or spoil the arithmetic, are on a storage that others write to: the rate of failures is assumed."""
    folder = tmp_path / names.INTERNAL_DIR
    folder.mkdir()
    damaged = {"history": {"observed_s": -1.0, "failures": 1e308}, "open": "", "costs": None}
    (folder / trainings.TRAININGS).write_text(json.dumps(damaged))
    opened, steps = ranks.open(tmp_path, **POLICY), itertools.count(1)
    while not steps_of(opened):
        train(opened, steps)
    assert "assumed while none was seen" in processes.status(opened)["interval"]
    assert note_of(tmp_path).history.failures == 0


def test_a_note_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every field, and an empty note where there is none."""
    root = LocalFolder(str(tmp_path))
    assert trainings.read(root) == trainings.Note()
    note = trainings.Note(
        history=History(observed_s=7.5, failures=2),
        open="a" * 32,
        costs=Costs(stall_s=0.1, persist_s=2.0, step_s=0.25),
        world_size=8,
        steps=40,
    )
    trainings.write(root, note)
    assert trainings.read(root) == note
