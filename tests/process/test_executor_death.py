"""
The whole of: an executor that dies or hangs, and the saves and loads that it had in its hands.

Called from: pytest.
Must never: wait for the executor to be in the middle of something by chance; it is stopped first.
"""

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from pillion.errors import SaveError
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from pillion_sidecar import app, channel
from pillion_sidecar.executor import priority
from pillion_sidecar.supervisor import persister
from pillion_sidecar.supervisor.executor_process import ExecutorDied, ExecutorProcess
from process import ranks as processes
from process.ranks import Ranks
from support import deadlines
from support.deadlines import Deadline


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4096,), float(step))}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
def test_an_executor_that_dies_is_replaced_and_its_successor_writes_the_same_snapshot(
    ranks: Ranks, tmp_path: Path, number: signal.Signals
) -> None:
    """The save it was writing is committed with its own values, in the same generation, and the next save works too."""
    opened = ranks.open(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    first = processes.executor_of(opened)
    processes.stop(first)
    handle = opened.save(state_of(2), 2)
    deadlines.eventually(
        lambda: processes.state_of(opened, 2) == "persisting", Deadline.STAGED, "the executor was given step 2"
    )
    os.kill(first, number)
    if number is not signal.SIGKILL:
        processes.go_on(first)  # a stopped process takes no other signal
    assert handle.result(Deadline.COMMITTED.s).step == 2
    opened.save(state_of(3), 3).result(Deadline.COMMITTED.s)
    assert processes.executor_of(opened) != first
    assert processes.status(opened)["metrics"]["executor_restarts"] == 1
    files = [path.name for path in tmp_path.glob("step-*/*.distcp")]
    assert files == ["__0_0.1-1.distcp"] * 3
    state = state_of(0)
    assert opened.load(state, step=2) == 2
    assert torch.equal(state["weight"], state_of(2)["weight"])


def test_an_executor_that_dies_between_saves_is_replaced_before_the_next_one(ranks: Ranks, tmp_path: Path) -> None:
    """An idle executor that is killed has a successor without anybody asking for a save."""
    opened = ranks.open(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    first = processes.executor_of(opened)
    os.kill(first, signal.SIGKILL)
    deadlines.eventually(
        lambda: processes.status(opened)["executor_pid"] not in (None, first),
        Deadline.PROCESS_START,
        "there is another executor",
    )
    opened.save(state_of(2), 2).result(Deadline.COMMITTED.s)
    assert processes.committed(tmp_path) == [1, 2]


def test_an_executor_that_hangs_is_found_by_its_ping_and_replaced(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped executor is killed at the ping's bound; the save that it held is committed by its successor."""
    # Long enough for a healthy executor on a loaded machine: one that was replaced for being late made this fail.
    monkeypatch.setenv("PILLION_PING_TIMEOUT_S", "3")
    opened = ranks.open(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    first = processes.executor_of(opened)
    processes.stop(first)
    opened.save(state_of(2), 2).result(Deadline.COMMITTED.s)
    assert not psutil.pid_exists(first)
    assert processes.status(opened)["metrics"]["executor_restarts"] == 1
    assert processes.committed(tmp_path) == [1, 2]


def test_a_snapshot_that_kills_two_executors_is_given_up_and_the_next_one_is_saved(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handle says that the executor died, on which rank; the step before stays, and the step after is committed."""
    kit = tmp_path / "kit"
    kit.mkdir()
    deadly = faults.fail_at(phase=FaultPoint.WRITE, fault=faults.Kind.SIGKILL, step=2, times=99)
    for name, value in faults.to_environment(kit, [deadly]).items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "root"
    opened = ranks.open(root)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    found = processes.status(opened)
    nice = [psutil.Process(found[name]).nice() for name in ("pid", "executor_pid")]
    lowest, own = 19, os.nice(0)
    expected = [min(own + app.NICE, lowest), min(own + app.NICE + priority.NICE, lowest)]
    assert nice == expected, "both give way to the trainer, the executor most of all"
    error = opened.save(state_of(2), 2).committed.exception(Deadline.COMMITTED.s)
    assert isinstance(error, SaveError)
    assert error.failures[0].type_name == "ExecutorDied"
    assert len({hit.pid for hit in faults.hits(kit)}) == len(faults.hits(kit)) == persister.PERSIST_ATTEMPTS == 2
    assert processes.committed(root) == [1]
    opened.save(state_of(3), 3).result(Deadline.COMMITTED.s)
    assert processes.committed(root) == [1, 3]


def test_a_load_whose_executor_dies_is_repeated_by_its_successor(ranks: Ranks, tmp_path: Path) -> None:
    """SIGKILL of the executor in the middle of a load: the load ends well all the same."""
    import threading

    opened = ranks.open(tmp_path)
    opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
    first = processes.executor_of(opened)
    processes.stop(first)
    state = state_of(0)
    found: list[object] = []

    def load() -> None:
        try:
            found.append(opened.load(state))
        except Exception as err:
            found.append(err)

    loading = threading.Thread(target=load)
    loading.start()
    # The first answer to a status behind the load's request shows that the sidecar has taken it up.
    processes.status(opened)
    os.kill(first, signal.SIGKILL)
    loading.join(Deadline.LOADED.s)
    assert found == [1]
    assert torch.equal(state["weight"], state_of(1)["weight"])


def test_an_executor_whose_death_a_request_finds_first_is_not_asked_again() -> None:
    """A process without torch ends before the supervisor's loop hears of it. A save that is tried again must find a successor, not the same dead one."""

    async def scenario() -> None:
        ends: list[bool] = []
        executor = ExecutorProcess(
            log_level="INFO",
            ping_timeout_s=Deadline.REPLY.s,
            patience_s=Deadline.REPLY.s,
            on_wait=lambda _: None,
            on_event=lambda _: None,
            on_exit=lambda: ends.append(True),
        )
        await executor.start()
        pid = executor.pid
        assert pid is not None
        try:
            os.kill(pid, signal.SIGKILL)
            # A thread reaps it. The loop stands still meanwhile, and hears of nothing.
            deadlines.eventually(lambda: not psutil.pid_exists(pid), Deadline.PROCESS_EXIT, "it is dead and reaped")
            with pytest.raises(ExecutorDied):
                await executor.request(channel.Ping())
            assert executor.pid is None
            assert ends == [True]
        finally:
            await executor.stop()

    asyncio.run(scenario())
