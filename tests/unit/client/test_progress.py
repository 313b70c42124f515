"""
The whole of: what the log says of a long load or save, and how often.

Called from: pytest.
"""

import threading

import pytest

from pillion import progress
from pillion.handle import Checkpoint, SaveHandle
from support import deadlines
from support.deadlines import Deadline

GIB = progress.GIB


@pytest.mark.parametrize(
    ("done", "elapsed_s", "still_s", "said"),
    [
        (12 * GIB, 10.0, 0.0, "12.0 of 40.0 GiB (30 %), 1.20 GiB/s, some 23 s left"),
        (0, 40.0, 40.0, "0.0 of 40.0 GiB (0 %) after 40 s"),
        (20 * GIB, 40.0, 31.0, "20.0 of 40.0 GiB (50 %), 0.50 GiB/s, and nothing for 31 s"),
        (40 * GIB, 40.0, 0.0, "40.0 of 40.0 GiB (100 %), 1.00 GiB/s, some 0 s left"),
    ],
)
def test_a_line_has_the_share_the_rate_and_what_is_left(done: int, elapsed_s: float, still_s: float, said: str) -> None:
    """Whoever reads it sees whether it goes on, and how long it will; before the first byte there is no rate to tell."""
    assert progress.text(done, 40 * GIB, elapsed_s, still_s) == said


def test_a_state_without_a_tensor_has_no_share() -> None:
    """Its bytes are not known, and nothing is divided by zero."""
    assert progress.text(0, 0, 12.0) == "0.0 of 0.0 GiB after 12 s"


def test_what_is_short_has_no_line_and_what_is_long_one_at_a_time() -> None:
    """The first line comes after FIRST_S, the next AGAIN_S after it, however often somebody asks."""
    rhythm = progress.Rhythm(100.0)
    asked = [100.0 + second for second in range(76)]
    due = [now - 100.0 for now in asked if rhythm.due(now)]
    assert due == [progress.FIRST_S, progress.FIRST_S + progress.AGAIN_S, progress.FIRST_S + 2 * progress.AGAIN_S]


def test_a_load_tells_from_where_and_forgets_a_corrupt_checkpoint() -> None:
    """The second round reads everything again, so that its bytes and its time count from its own begin."""
    now = [0.0]
    meter = progress.Meter(lambda: now[0])
    now[0] = 12.0
    assert meter.line().startswith("a load waits for its first part since 12 s")
    meter.begin("storage", 4 * GIB)
    meter.move(3 * GIB)
    now[0] = 20.0
    meter.begin("storage", 4 * GIB)
    now[0] = 22.0
    meter.move(2 * GIB)
    assert meter.line() == "loading from storage: 2.0 of 4.0 GiB (50 %), 1.00 GiB/s, some 2 s left"


def test_a_speaker_speaks_again_until_the_end_and_not_after() -> None:
    """Its thread has ended when the block has, so that a load leaves none."""
    spoken: list[int] = []
    twice = threading.Event()

    def say() -> None:
        spoken.append(1)
        if len(spoken) == 2:
            twice.set()

    with progress.Speaker(say, first_s=0.001, again_s=0.001):
        assert twice.wait(Deadline.REPLY.s)
    said = len(spoken)
    assert not any(thread.name == "pillion-progress" for thread in threading.enumerate())
    assert len(spoken) == said


def test_a_short_block_says_nothing() -> None:
    """A load of a second has no line."""
    spoken: list[int] = []
    with progress.Speaker(lambda: spoken.append(1)):
        pass
    assert spoken == []


def test_a_handle_knows_whether_somebody_waits_for_it() -> None:
    """Only then does the trainer's log have the save's progress: else the sidecar's has it."""
    handle = SaveHandle(1)
    assert not handle.awaited
    with pytest.raises(TimeoutError):
        handle.result(0.0)
    assert not handle.awaited
    asked = threading.Thread(target=lambda: handle.result(Deadline.REPLY.s))
    asked.start()
    deadlines.eventually(lambda: handle.awaited, Deadline.REPLY, "a thread waits")
    handle.claiming = True
    handle.resolve(Checkpoint(step=1, path=None, size_bytes=0))
    asked.join(Deadline.REPLY.s)
    assert handle.awaited
    handle.claiming = False
    assert not handle.awaited
