"""
The whole of: a save that some ranks of a pod cannot stage, where the trainers ask which.

Called from: pytest.
"""

import asyncio
from typing import Any, cast

import pytest

from pillion.errors import ErrorDocument, RemoteFailure, SaveError
from pillion.wire.policy import Overlap
from pillion.wire.save_messages import Destination
from pillion_sidecar.arena.slots import Granted, SlotTable
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.supervisor import staging

STEP = 5


class World:
    """A pod of three ranks, and what its trainers and its peers are told."""

    def __init__(self, pods: tuple[tuple[int, ...], ...]) -> None:
        self.told: list[tuple[str, dict[int, RemoteFailure]]] = []
        self.table = SlotTable(2, (0, 1, 2), Overlap.WAIT, alone=len(pods) == 1)
        self.identity = type("Identity", (), {"session": "a" * 32, "pods": pods})()
        self.pod = self
        settings: Any = type("Of", (), {"peer_timeout_s": 60.0})
        sidecar_status: Any = type(
            "Journal", (), {"abandoned": lambda *_: None, "sealed": lambda *_: None, "complete": lambda *_: None}
        )()
        self.of = staging.StagingCoordinator(
            settings, sidecar_status, cast("Any", self), cast("Any", self), tasks.BackgroundTasks()
        )

    def require_pod(self) -> "World":
        return self

    def broadcast(self, event: Any, *, but: int | None = None) -> None:
        self.told.append((event.type, dict(ErrorDocument.from_document(event.error).failures)))

    def withdraw(self, step: int, error: SaveError, *, persist: bool, rescued: bool = False) -> None:
        self.told.append(("withdraw", dict(error.failures)))

    def report_failed(self, save: Any, error: SaveError, *, but: int | None = None, more: bool = False) -> None:
        self.told.append((f"failed, more={more}", dict(error.failures)))

    def claim(self, rank: int) -> None:
        assert isinstance(self.table.claim(STEP, rank, persist=True, destination=Destination()), Granted)

    def seal(self, rank: int) -> None:
        self.of.sealed(cast("Any", type("Client", (), {"rank": rank})()), STEP, 0.0)

    def lose(self, rank: int) -> None:
        client = type("Client", (), {"rank": rank, "said_goodbye": False, "pid": 1})()
        self.of.rank_lost(cast("Any", client))

    def fail(self, rank: int) -> None:
        self.of.fail_rank(STEP, rank, ErrorDocument("StagingError", f"rank {rank}"), persist=True, gathers=True)

    def all_told(self) -> list[tuple[str, list[int]]]:
        return [(what, sorted(failures)) for what, failures in self.told]


@pytest.mark.parametrize("pods", [((0, 1, 2),), ((0, 1, 2), (3,))], ids=["one pod", "two pods"])
def test_all_ranks_that_cannot_stage_are_told_when_every_rank_has_said_its_part(
    pods: tuple[tuple[int, ...], ...],
) -> None:
    """The first is told at once, all of them when the others have sealed, failed or died; other pods then hear of all, once."""

    async def story() -> None:
        of = World(pods)
        of.claim(0)
        of.claim(1)
        of.fail(0)
        assert of.all_told() == [("failed, more=True", [0])]
        of.seal(1)
        of.fail(2)
        last = "save_failures" if len(pods) == 1 else "withdraw"
        assert of.all_told()[1:] == [(last, [0, 2])]
        again = World(pods)
        again.fail(1)
        again.lose(0)
        assert again.all_told() == []
        again.fail(2)
        assert again.all_told() == [(last, [1, 2])]

    asyncio.run(story())


def test_a_rank_that_says_nothing_is_waited_for_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what is known is told; one that fails later is told to this pod alone, as the other pods have ended the save."""
    monkeypatch.setattr(staging, "GATHER_TIMEOUT_S", 0.0)

    async def story() -> None:
        of = World(((0, 1, 2), (3,)))
        of.fail(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert of.all_told() == [("withdraw", [0])]
        of.fail(1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert of.all_told()[1:] == [("save_failures", [0, 1])]

    asyncio.run(story())
