"""
The whole of: loads of one pod, from the ranks that ask to the answer.

Called from: pytest.
"""

import asyncio
import contextlib
import types
from typing import Any, cast

import pytest

from pillion.errors import ErrorDocument
from pillion.wire.load_messages import Load
from pillion_sidecar.status import status
from pillion_sidecar.supervisor import loader
from pillion_sidecar.supervisor.server import TrainerConnection
from support.deadlines import Deadline, soon


class Asking:
    """A rank's connection, as far as a load needs it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.refused: list[str] = []

    def refuse(self, _message: object, error: object) -> None:
        self.refused.append(str(error))


def test_each_load_has_all_of_its_bound(monkeypatch: Any) -> None:
    """A load that ended with its trainers leaves no timer that refuses the next one early."""

    async def story() -> None:
        table = types.SimpleNamespace(unpin=lambda _: None, give_back=lambda _: None)
        pod = types.SimpleNamespace(segments={0: None, 1: None}, table=table)
        settings = types.SimpleNamespace(peer_timeout_s=Deadline.REPLY.s)
        trainers = types.SimpleNamespace(pod=pod)
        of = loader.Loader(*cast("Any", (settings, trainers, None, None, None, None)))
        await of.ask(cast("TrainerConnection", Asking(0)), Load(layout="{}"))
        first = of._timer
        of.rank_lost(0)
        settings.peer_timeout_s = 0.01
        again = Asking(0)
        await of.ask(cast("TrainerConnection", again), Load(layout="{}"))
        assert first is not None
        assert first.cancelled()
        await soon(lambda: again.refused, Deadline.SETTLE, "the second load is refused at its own bound")
        assert "ranks [1] did not ask to load" in again.refused[0]

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(story())


@pytest.mark.parametrize(
    ("here", "kind", "failed"),
    [(True, "CorruptCheckpoint", True), (True, "SessionOver", False), (False, "LoadError", False)],
    ids=["trainers that wait", "a session that is over", "trainers that are gone"],
)
def test_a_load_whose_trainers_have_ended_is_no_failure(here: bool, kind: str, failed: bool) -> None:
    """A restart in the middle of a load is part of a restart: no condition and no Warning of it; who waits is answered in any case."""
    asking, sidecar_status = Asking(0), status.SidecarStatus()
    trainers = types.SimpleNamespace(pod=None, clients={0: asking if here else Asking(0)})
    of = loader.Loader(*cast("Any", (None, trainers, None, None, None, sidecar_status)))
    of._fail({0: (cast("TrainerConnection", asking), Load(layout="{}"))}, ErrorDocument(kind, "why"))
    assert [each.reason for each in sidecar_status.failures] == (["LoadFailed"] if failed else [])
    assert len(asking.refused) == 1
