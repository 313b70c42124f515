"""
Tests of the bandwidth limit of uploads.

Called from: pytest.
"""

import threading
from typing import Final

import pytest

from pillion_sidecar.storage import object_transfer

MIB: Final = 1 << 20


class Asked(threading.Event):
    """An event that nobody waits for: it notes for how long somebody would."""

    def __init__(self) -> None:
        super().__init__()
        self.waits_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits_s.append(timeout)
        return False


def test_an_object_waits_for_the_time_of_the_one_before() -> None:
    """The first begins at once, and each other one when the bytes before it have had their time."""
    pace, stopped = object_transfer.Pace(MIB), Asked()
    for _ in range(3):
        pace.take(MIB // 2, stopped)
    assert stopped.waits_s == pytest.approx([0.5, 0.5], abs=0.1)


def test_a_low_limit_is_kept_however_large_the_objects_are() -> None:
    """The least limit and the default size of an object: two minutes for each."""
    pace, stopped = object_transfer.Pace(MIB), Asked()
    for _ in range(2):
        pace.take(128 * MIB, stopped)
    assert stopped.waits_s == pytest.approx([128.0], abs=0.1)


def test_without_a_limit_nobody_waits() -> None:
    """None is no limit."""
    pace, stopped = object_transfer.Pace(None), Asked()
    for _ in range(2):
        pace.take(MIB, stopped)
    assert stopped.waits_s == []
