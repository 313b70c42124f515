"""
The whole of: which ends of an interpreter are clean, and which lost saves they tell of.

Called from: pytest.
Must never: end this interpreter; `tests/process/test_exit.py` ends real ones.
"""

import sys

import pytest

from pillion import exit_drain
from pillion.errors import SidecarUnavailable
from pillion.handle import Checkpoint, SaveHandle


class Closed:
    """Somebody who has closed."""

    def close(self) -> None:
        raise AssertionError("it is closed")


def test_saves_that_are_lost_and_that_nobody_asked_about_are_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that failed before the drain; not one that was committed, or whose error the caller has seen."""
    monkeypatch.setattr(exit_drain, "_lost", [])
    lost, seen, committed = SaveHandle(1), SaveHandle(2), SaveHandle(3)
    lost.fail(SidecarUnavailable("gone"))
    seen.fail(SidecarUnavailable("gone"))
    committed.resolve(Checkpoint(step=3, path="runs/step-3"))
    exit_drain.closed(Closed(), [lost, seen, committed, lost])
    seen.committed.exception(0)
    assert exit_drain.lost_saves() == ["step 1: gone"]


@pytest.mark.parametrize(("status", "clean"), [(0, True), (None, True), (1, False), ("an error", False), (False, True)])
def test_an_exit_with_a_status_is_no_clean_end(
    monkeypatch: pytest.MonkeyPatch, status: str | int | None, clean: bool
) -> None:
    """A script that ends by sys.exit(1) is started again, and then looks for its arena."""
    monkeypatch.setattr(exit_drain, "_status", None)
    with pytest.raises(SystemExit) as caught:
        exit_drain._noting_exit(sys.exit)(status)
    assert caught.value.code == status
    assert exit_drain.by_exception() is not clean
