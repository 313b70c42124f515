"""
The whole of: small messages to all pods of a job: to all of them or to none, in one order, also across an executor's successor.

Called from: pytest.
Must never: use a store that is no TCPStore.
"""

from collections.abc import Iterator

import pytest

from pillion.errors import SidecarError
from pillion_sidecar.executor.exchange import broadcast, tcpstore
from support import deadlines
from support.deadlines import Deadline

PODS = [0, 2]


class Ends:
    """The ends of several pods, over clients of one store."""

    def __init__(self) -> None:
        self._keep, _ = tcpstore.host("127.0.0.1", "pillion/test")
        self._open: list[broadcast.Signals] = []

    def open(self, first_rank: int, heard: list[tuple[int, object]], seen: int | None = None) -> broadcast.Signals:
        view = tcpstore.connect("127.0.0.1", self._keep.port, "pillion/test")
        end = broadcast.Signals(
            view,
            lambda number, message: heard.append((number, message["n"])),
            pods=PODS,
            first_rank=first_rank,
            seen=seen,
        )
        self._open.append(end)
        return end

    def close(self) -> None:
        for end in self._open:
            end.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    opened = Ends()
    yield opened
    opened.close()


def test_nothing_is_sent_before_every_pod_listens(ends: Ends) -> None:
    """A pod whose executor still starts would miss it for good: whoever sends is told, and sends again."""
    first: list[tuple[int, object]] = []
    second: list[tuple[int, object]] = []
    sender = ends.open(0, first)
    with pytest.raises(SidecarError, match="not every pod"):
        sender.send({"n": "lost"})
    other = ends.open(2, second)
    for number in (1, 2):
        sender.send({"n": number})
    other.send({"n": 3})
    deadlines.eventually(lambda: len(first) == len(second) == 3, Deadline.REPLY, "both have heard all")
    assert first == second == [(1, 1), (2, 2), (3, 3)]


def test_a_successor_goes_on_where_the_executor_before_it_ended(ends: Ends) -> None:
    """What was sent meanwhile is heard by it, what was passed on is not heard twice; one that knows nothing hears what is new."""
    before: list[tuple[int, object]] = []
    other = ends.open(2, [])
    died = ends.open(0, before)
    other.send({"n": "a"})
    deadlines.eventually(lambda: before == [(1, "a")], Deadline.REPLY, "the first has heard it")
    died.close()
    other.send({"n": "b"})
    after: list[tuple[int, object]] = []
    fresh: list[tuple[int, object]] = []
    assert ends.open(0, after, seen=1).begun == 1
    assert ends.open(0, fresh).begun == 2
    other.send({"n": "c"})
    deadlines.eventually(lambda: after == [(2, "b"), (3, "c")], Deadline.REPLY, "the successor has heard the rest")
    deadlines.eventually(lambda: fresh == [(3, "c")], Deadline.REPLY, "the other one what is new")


def test_a_pod_that_still_listens_leaves_no_key_of_a_session_that_is_over(ends: Ends) -> None:
    """It may listen for as long as it lingers, in a store that outlives many sessions; it notices, and stops."""
    coordinator, other = ends.open(0, []), ends.open(2, [])
    coordinator.send({"n": 1})
    coordinator.close()
    coordinator.forget()
    deadlines.eventually(lambda: not other._thread.is_alive(), Deadline.REPLY, "the other one has stopped to listen")
    assert not any("signals" in key or "listening" in key for key in ends._keep.list_keys())
