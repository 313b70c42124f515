"""
The whole of: how a handle ends, when the thread that stages and the one that listens to the sidecar both end it.

Called from: pytest.
"""

import logging
from concurrent.futures import Future
from typing import Any

import pytest

from pillion.errors import PillionError, SaveSkipped, SidecarUnavailable, StagingError
from pillion.handle import Checkpoint, SaveHandle, log_lost

CHECKPOINT = Checkpoint(step=1, path="runs/step-1", size_bytes=1, persist_s=0.0, commit_s=0.0)


class EndedMeanwhile(Future[Any]):
    """The other thread ends it as soon as this one has looked whether it has ended."""

    def done(self) -> bool:
        was = super().done()
        if not was:
            self.set_result(None)
        return was


@pytest.mark.parametrize("which", ["staged", "committed"])
@pytest.mark.parametrize(
    "end",
    [lambda handle: handle.fail(SidecarUnavailable("gone")), lambda handle: handle.resolve(CHECKPOINT)],
    ids=["fails", "is committed"],
)
def test_a_handle_that_two_threads_end_at_once_raises_in_neither_of_them(which: str, end: Any) -> None:
    """Else the listening thread dies of it, before it has begun to look for the sidecar's successor: nothing is saved any more."""
    handle = SaveHandle(1)
    setattr(handle, which, EndedMeanwhile())
    end(handle)
    assert handle.staged.done()
    assert handle.committed.done()


def test_what_ended_a_handle_first_stays() -> None:
    """A reported commit never becomes a failure, and a failure never becomes a commit."""
    committed, failed = SaveHandle(1), SaveHandle(1)
    committed.resolve(CHECKPOINT)
    committed.fail(SidecarUnavailable("gone"))
    failed.fail(SidecarUnavailable("gone"))
    failed.resolve(CHECKPOINT)
    assert committed.result(0) is CHECKPOINT
    with pytest.raises(SidecarUnavailable):
        failed.result(0)


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (SaveSkipped("replaced by step 3 (staging.overlap: Latest)", step=1), logging.INFO),
        (StagingError("full", step=1), logging.ERROR),
    ],
    ids=["dropped as the policy says", "failed"],
)
def test_what_the_policy_declares_is_no_error_in_the_log(
    error: PillionError, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A save that `overlap` drops is logged at level INFO, and a failed save at level ERROR; each once."""
    with caplog.at_level(logging.INFO, logger="pillion"):
        log_lost(1, error)
    assert [record.levelno for record in caplog.records] == [level]
