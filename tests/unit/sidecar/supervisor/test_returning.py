"""
The whole of: whether trainers whose sidecar was replaced may still come back.

Called from: pytest.
"""

import asyncio
import os
import time

import pytest

from pillion_sidecar.supervisor import returning

OURS = returning.process(os.getpid())


def wait(processes: list[returning.Process], come_after: int) -> tuple[list[int], float]:
    """Who lives and did not come, and how long that took; they come when somebody has looked so often."""
    looks = iter(range(1_000_000))
    begun = time.monotonic()
    return asyncio.run(returning.wait(processes, lambda: next(looks) >= come_after)), time.monotonic() - begun


def test_a_process_is_found_again_and_one_that_has_its_number_is_not_taken_for_it() -> None:
    """By when it started."""
    assert OURS[0] == os.getpid()
    assert returning.living([OURS, (0, 0), (OURS[0], OURS[1] + 1)]) == [os.getpid()]
    assert returning.process(0) == returning.process(2**22 + 1) == (0, 0)


def test_a_child_that_has_ended_and_was_not_waited_for_lives_no_more() -> None:
    """A zombie is no trainer."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert returning.process(pid) == (0, 0)
    os.waitpid(pid, 0)


def test_trainers_that_come_back_are_waited_for_and_the_dead_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lives and does not come is named at the bound; one that cannot be seen gets a shorter one."""
    monkeypatch.setattr(returning, "RETURN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(returning, "RETURN_LIVING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(returning, "POLL_S", 0.001)
    assert wait([OURS], 3)[0] == []
    found, waited_s = wait([OURS, (0, 0)], 1_000_000)
    assert found == [os.getpid()]
    assert waited_s >= 0.2
    found, waited_s = wait([(0, 0)], 1_000_000)
    assert found == []
    assert waited_s >= 0.1
    found, waited_s = wait([(OURS[0], OURS[1] + 1)], 1_000_000)
    assert (found, waited_s < 0.1) == ([], True)
