"""
The whole of: that the harness says where it is.

Called from: pytest.
"""

import pytest

from cluster.harness import progress
from support.deadlines import Deadline, eventually


def test_a_step_that_takes_long_says_again_and_again_what_it_is_and_since_when() -> None:
    """Between its first and its last line a step says what is made, since when, and for how long."""
    lines: list[str] = []
    with progress.step("building kubelet (6 of 10)", every_s=0.001, tell=lines.append):
        eventually(lambda: len(lines) > 3, Deadline.REPLY, "lines of the step")
    assert all(line.startswith("building kubelet (6 of 10)") for line in lines)
    assert all("still at it since" in line for line in lines[1:-1])
    assert "done after" in lines[-1]


def test_a_step_that_fails_says_so_and_falls_silent() -> None:
    """The last line of a step that an exception ended says that it was not done, and nothing comes after it."""
    lines: list[str] = []
    with pytest.raises(OSError), progress.step("building etcd (7 of 10)", every_s=0.001, tell=lines.append):
        raise OSError
    assert "ended early" in lines[-1]


def test_people_wait_for_a_line_no_longer_than_they_think_that_it_hangs() -> None:
    """A line comes at least every 20 s."""
    assert progress.EVERY_S <= 20
