"""
The whole of: whom the end of a pod ends, and when.

Called from: pytest.
Must never: start an executor, or wait for the bounds of a real pod.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pillion.wire import policy
from pillion.wire.message import Message
from pillion_sidecar import channel
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import pod_end
from pillion_sidecar.supervisor.trainers import Trainers
from support.deadlines import Deadline, soon
from support.identities import identity


class Quiet:
    """The sidecar's work on saves: none, or more than there is time for."""

    def __init__(self, *, drained: bool) -> None:
        self.drained = drained
        self.rescues = 0

    def rescue(self) -> None:
        self.rescues += 1

    async def quiet(self, _: float) -> bool:
        return self.drained


class Scene:
    """A pod with one trainer, and what the trainer is told."""

    def __init__(self, folder: Path, *, drained: bool = True, in_pod: bool = True, **spec: Any) -> None:
        self.pod = PodArena(str(folder), identity("a" * 32, folder, None), policy.parse(spec, embedded=True))
        self.told: list[str] = []
        self.tasks = tasks.BackgroundTasks()
        self.persister = Quiet(drained=drained)
        work: Any = self.persister
        nobody: Any = None
        self.trainers = Trainers(nobody, self.tasks, on_policy=lambda _: None, on_rescue=lambda _: None)
        self.trainers.begin_session(self.pod)
        trainer: Any = self
        self.trainers.clients[0] = trainer
        self.sidecar_status = SidecarStatus()
        self.end = pod_end.PodEnd(self.sidecar_status, self.trainers, work, self.tasks, in_pod=in_pod)

    def send(self, event: Message) -> None:
        self.told.append(event.type)

    def save(self, step: int, *, persist: bool = True) -> None:
        """A save of the trainer, to storage, where it is committed, or to memory."""
        self.sidecar_status.began(step, persist=persist)
        if persist:
            self.commit(step)

    def commit(self, step: int) -> None:
        self.sidecar_status.committed(step, channel.Persisted(persist_s=0.1, commit_s=0.1))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of a fraction of a second, in the same order."""
    for name, seconds in (
        ("LAST_SAVE_TIMEOUT_S", 0.1),
        ("UNTIL_END_S", 0.3),
        ("SIGNAL_FOLLOWS_S", 0.05),
        ("POLL_S", 0.01),
    ):
        monkeypatch.setattr(pod_end, name, seconds)


async def settled(scene: Scene) -> list[str]:
    """What was said until nothing more is to come."""
    await soon(lambda: not scene.tasks._running, Deadline.REPLY, "the pod's end is done")
    scene.pod.close()
    return scene.told


def test_trainers_are_ended_after_their_last_save_and_not_before(tmp_path: Path) -> None:
    """What was on storage before the pod was to end is no last save; a snapshot in memory is none either."""

    async def scenario() -> None:
        scene = Scene(tmp_path)
        scene.sidecar_status.began(1, persist=True)
        assert scene.end.begin(signalled=False)
        scene.save(2, persist=False)
        scene.commit(1)
        assert not scene.sidecar_status.last_save_committed
        scene.save(3)
        assert scene.sidecar_status.last_save_committed
        assert await settled(scene) == ["save_now", "end"]
        assert scene.end.ends_trainers

    asyncio.run(scenario())


def test_trainers_that_make_no_last_save_are_ended_all_the_same(tmp_path: Path) -> None:
    """They hang, or never ask `due`: what they had is persisted, and the pod waits no longer than a pod without Pillion."""

    async def scenario() -> None:
        scene = Scene(tmp_path)
        scene.save(1, persist=False)
        scene.end.begin(signalled=False)
        assert await settled(scene) == ["save_now", "end"]
        assert scene.persister.rescues

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drain": {"endTrainer": False}}, ["save_now"]),
        ({"trigger": {"onTermination": "Skip"}}, ["end"]),
        ({"drained": False}, ["save_now"]),
        ({"in_pod": False}, ["save_now"]),
    ],
    ids=["the policy says no", "nothing is to be saved", "the drain takes too long", "there is no pod"],
)
def test_who_is_ended_is_what_the_policy_and_the_drain_say(
    tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    """With `endTrainer: false` nobody is; without a last save to wait for at once; never while something is not on storage."""

    async def scenario() -> None:
        scene = Scene(tmp_path, **changes)
        scene.end.begin(signalled=False)
        assert await settled(scene) == said

    asyncio.run(scenario())


def test_a_sidecar_that_is_restarted_alone_ends_no_trainer(tmp_path: Path) -> None:
    """A failed liveness probe brings preStop, and at once SIGTERM, which a pod's sidecar gets when its trainers are gone."""

    async def scenario() -> None:
        scene = Scene(tmp_path)
        scene.end.begin(signalled=False)
        scene.save(2)
        assert not scene.end.begin(signalled=True)
        assert await settled(scene) == ["save_now"]
        assert not scene.end.ends_trainers

    asyncio.run(scenario())


@pytest.mark.parametrize("asked", [True, False])
def test_a_trainer_that_comes_into_a_pod_that_ends_is_ended(tmp_path: Path, asked: bool) -> None:
    """It was still starting when the pod was deleted, and ignores SIGTERM like one that trains; with `endTrainer: false` it stays."""

    async def scenario() -> None:
        scene = Scene(tmp_path, drain={"endTrainer": asked})
        trainer = scene.trainers.clients.pop(0)
        assert not scene.end.begin(signalled=False)
        scene.end.joined(trainer)
        assert await settled(scene) == []
        scene.end.joined(trainer)
        assert scene.told == (["end"] if asked else [])

    asyncio.run(scenario())
