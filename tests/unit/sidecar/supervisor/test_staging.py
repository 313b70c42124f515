"""
The whole of: what claims and reserves tell of the arena's room, and what in a pod they are refused.

Called from: pytest.
Must never: start an executor, or a trainer.
"""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from pillion.errors import ArenaExhausted, UsageError
from pillion.wire import policy
from pillion.wire.events import Notice
from pillion.wire.message import Message
from pillion.wire.save_messages import Claim, Claimed, Destination, NamedWriter, Reserve, Reserved
from pillion_sidecar import settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor.staging import StagingCoordinator
from pillion_sidecar.supervisor.trainers import Trainers
from support.deadlines import Deadline
from support.identities import identity

MIB = 2**20


class Scene:
    """The front half of saves in a pod of one rank, without the back half."""

    def __init__(self, folder: Path, *, embedded: bool = True, **spec: Any) -> None:
        arguments = ["--runtime-dir", str(folder), *(["--embedded"] if embedded else [])]
        self.told: list[Message] = []
        self.sidecar_status = SidecarStatus()
        nobody: Any = None
        tasks = tasks_module.BackgroundTasks()
        trainers = Trainers(nobody, tasks, on_policy=lambda _: None, on_rescue=lambda _: None)
        self.pod = PodArena(str(folder), identity("a" * 32, folder, None), policy.parse(spec, embedded=True))
        trainers.begin_session(self.pod)
        trainer: Any = self
        trainers.clients[0] = trainer
        self.rank = 0
        self.saves = StagingCoordinator(
            settings.from_arguments(arguments, {}), self.sidecar_status, trainers, nobody, tasks
        )

    def send(self, event: Message) -> None:
        self.told.append(event)


def test_an_arena_that_is_too_small_is_told_before_a_save_is_lost(tmp_path: Path) -> None:
    """At the first word of the state's size: in the journal for the controller, and once in the trainer's log; nothing while it fits."""
    scene = Scene(tmp_path, staging={"sizeLimit": "4Mi", "slots": 2})
    assert len(asyncio.run(scene.saves.reserve(0, MIB))) == 2
    assert (scene.sidecar_status.memory_problem, scene.told) == ("", [])
    for _ in range(2):
        with pytest.raises(ArenaExhausted):
            asyncio.run(scene.saves.reserve(0, 3 * MIB))
    assert scene.sidecar_status.memory_problem.startswith(f"the state needs {6 * MIB} bytes of arena")
    assert scene.told == [Notice(text=scene.sidecar_status.memory_problem)]
    scene.pod.close()


@pytest.mark.parametrize("embedded", [True, False], ids=["without a cluster", "in a pod"])
def test_a_claim_in_a_pod_may_not_name_what_runs_in_the_sidecar(tmp_path: Path, embedded: bool) -> None:
    """Without a cluster both are one user's, and the trainer's writer is taken."""
    scene = Scene(tmp_path, embedded=embedded)
    writer = NamedWriter(name="os:system", arguments={"command": "id"})
    claim = Claim(step=1, persist=True, room_bytes=100, destination=Destination(writer=writer))
    answers: list[Any] = []
    client: Any = scene
    scene.answer = lambda _, answer: answers.append(answer)  # type: ignore[attr-defined] # a client answers

    async def claimed() -> None:
        await scene.saves.claim(client, claim)

    if embedded:
        asyncio.run(claimed())
        assert isinstance(answers[0], Claimed)
    else:
        with pytest.raises(UsageError, match="is not the policy's"):
            asyncio.run(claimed())
        assert scene.pod.table.saves == {}
    scene.pod.close()


def test_a_rank_whose_slots_grow_may_save_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing takes a second a GiB and slot; a claim that waited for all of it would hold training up for slots that it does not need."""
    scene = Scene(tmp_path)
    answers: list[type[Message]] = []
    client: Any = scene
    scene.answer = lambda _, answer: answers.append(type(answer))  # type: ignore[attr-defined] # a client answers
    may_grow = threading.Event()
    grow = scene.pod.grow

    def slowly(rank: int, slot: int, room_bytes: int) -> int:
        if room_bytes > MIB:
            assert may_grow.wait(Deadline.REPLY.s)
        return grow(rank, slot, room_bytes)

    monkeypatch.setattr(scene.pod, "grow", slowly)

    async def told() -> None:
        scene.saves.begin_reserve(client, Reserve(room_bytes=2 * MIB))
        await scene.saves.claim(client, Claim(step=1, persist=True, room_bytes=100))
        assert answers == [Claimed]
        may_grow.set()
        async with asyncio.timeout(Deadline.REPLY.s):
            while len(answers) < 2:
                await asyncio.sleep(0.001)

    asyncio.run(told())
    assert answers == [Claimed, Reserved]
    scene.pod.close()
