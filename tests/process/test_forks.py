"""
The whole of: forked children of a trainer: data loaders' workers, evaluators, helpers.

Called from: pytest.
Must never: end a child before its parent; what is tested is a child that outlives its trainer.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pillion import checkpointer
from pillion.errors import UsageError
from process.ranks import Peer, Ranks, committed
from support import deadlines
from support.deadlines import Deadline
from support.processes import Processes

IN_CHILD = """
import os, sys
import torch
import pillion
from pillion.errors import UsageError

checkpointer = pillion.Checkpointer(sys.argv[1])
state = {"w": torch.ones(1000)}
checkpointer.save(state, 1).result(60)
pid = os.fork()
if pid == 0:
    for use in (
        lambda: checkpointer.due(2),
        lambda: checkpointer.load(state),
        lambda: checkpointer.latest(),
        lambda: checkpointer.wait(1),
        lambda: checkpointer.save(state, 2).committed.result(0),
    ):
        try:
            use()
        except UsageError as err:
            assert "forked child" in str(err), err
        else:
            os._exit(1)
    checkpointer.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
checkpointer.save(state, 2).result(60)
print("committed")
"""


@contextlib.contextmanager
def _ended(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        # Orphans come to this process where it is the first of its pid namespace.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.mark.parametrize("unknown", [False, True], ids=["by Python", "with its own copy of the socket"])
def test_a_killed_trainer_is_replaced_while_its_child_lives(ranks: Ranks, tmp_path: Path, unknown: bool) -> None:
    """Its death is seen at once: its snapshot goes to storage, and the next trainer opens the root, though a child holds the socket."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path)
        opened.save({"w": torch.ones(100)}, 1, persist=False).staged.result(Deadline.STAGED.s)
        # What a library forks by itself closes nothing.
        held = os.dup(opened._session._connection._sock.fileno()) if unknown else None
        pid = os.fork()
        if pid == 0:
            signal.pause()
        peer.tell((pid, held is not None))
        peer.hear()

    def resume(peer: Peer) -> tuple[int | None, str]:
        with checkpointer.Checkpointer(tmp_path) as opened:
            step = opened.load({"w": torch.zeros(100)})
            assert opened.last_load is not None
            return step, opened.last_load.tier

    job = ranks.start(train)
    child, _ = job[0].hear()
    with _ended(child):
        job.kill()
        deadlines.eventually(lambda: committed(tmp_path) == [1], Deadline.DRAINED, "the snapshot is on storage")
        assert ranks.start(resume).finish() == [(1, "arena")]


def test_a_child_neither_uses_nor_ends_the_session_of_its_parent(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Every call is refused at once; close() and sys.exit() end the child with its own status, and the parent saves on."""
    run = processes.python("-c", IN_CHILD, tmp_path).check(Deadline.SCRIPT)
    assert run.stdout == "committed\n"
    assert committed(tmp_path) == [1, 2]
    ranks.alone()


def test_a_root_opened_twice_by_one_process_is_refused_with_the_remedy(ranks: Ranks, tmp_path: Path) -> None:
    """A notebook's cell that is run again learns that it is this process itself that has the root open."""
    ranks.open(tmp_path)
    with pytest.raises(UsageError, match=rf"pid {os.getpid()}.*close\(\) that one first"):
        checkpointer.Checkpointer(tmp_path)
