"""
The whole of: what the coordinator's sidecar asks its trainer for, and which period it announces, under `trigger.auto`.

Called from: pytest.
Must never: start an executor or a trainer.
"""

import asyncio
from pathlib import Path
from typing import Any, Final

import pytest

from pillion.wire import events, policy
from pillion.wire.message import Message
from pillion_sidecar import channel, settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.checkpoint import trainings
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.interval import Costs, History
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.supervisor import pacing
from pillion_sidecar.supervisor.root_access import RootAccess
from pillion_sidecar.supervisor.session_policy import SessionPolicy
from pillion_sidecar.supervisor.trainers import Trainers
from support.deadlines import Deadline, soon
from support.identities import identity

AUTO: Final[dict[str, Any]] = {"auto": {"overheadPercent": 1, "maxSeconds": 100}}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """A sidecar of one rank, as far as the interval needs it."""

    def __init__(self, folder: Path, *, session: str = "a", **trigger: Any) -> None:
        self.runtime = folder / f"arena-{session}"
        self.runtime.mkdir(exist_ok=True)
        self.root = folder / "runs"
        self.root.mkdir(exist_ok=True)
        spec = {"trigger": trigger or AUTO}
        self.pod = PodArena(str(self.runtime), identity(session * 32, folder, None), policy.parse(spec, embedded=True))
        self.told: list[Message] = []
        self.tasks, self.clock = tasks.BackgroundTasks(), Clock()
        nobody: Any = None
        self.trainers = Trainers(nobody, self.tasks, on_policy=lambda _: None, on_rescue=lambda _: None)
        self.trainers.begin_session(self.pod)
        trainer: Any = self
        self.trainers.clients[0] = trainer
        self.status = SidecarStatus(self.clock, self.clock)
        self.policy = SessionPolicy(
            settings.from_arguments(["--runtime-dir", str(self.runtime)], {}), RootAccess(""), self.trainers
        )
        self.spec: dict[str, Any] = spec
        self.pacing = pacing.Pacing(self.status, self.trainers, self.policy, storage_ca="")

    def send(self, event: Message) -> None:
        self.told.append(event)

    async def begin(self) -> None:
        await self.policy.begin(self.spec)
        self.pacing.start(self.tasks)
        self.pacing.joined(0)

    def save(self, step: int, *, at_s: float, stall_s: float, waited_s: float = 0.0, persist_s: float = 1.0) -> None:
        """A save of `step` that begins at `at_s`, with a wait for its slot before."""
        self.clock.now_s = 1000.0 + at_s
        self.status.began(step, persist=True)
        self.clock.now_s += stall_s
        self.status.sealed(step, stall_s + waited_s)
        self.status.complete(step)
        self.status.committed(step, channel.Persisted(persist_s=persist_s, commit_s=0.0))

    def asked(self) -> int:
        return sum(isinstance(each, events.SaveNow) for each in self.told)

    def periods(self) -> list[int]:
        changes = [each.policy["trigger"] for each in self.told if isinstance(each, events.PolicyChanged)]
        return [each["periodSteps"] for each in changes]

    def note(self) -> trainings.Note:
        return trainings.read(LocalFolder(str(self.root)))

    async def end(self) -> None:
        self.pacing.close()
        await self.tasks.stop()
        self.pod.close()


def test_two_saves_are_asked_for_then_a_period_is_announced(tmp_path: Path) -> None:
    """One at the start, one when the first is committed. The stall of the second, 0.5 s, with a budget of 1 % makes 50 s, 25 steps."""

    async def check() -> None:
        scene = Scene(tmp_path)
        await scene.begin()
        await soon(lambda: scene.asked() == 1, Deadline.REPLY, "the first save is asked for")
        scene.save(3, at_s=6, stall_s=4.0)
        await soon(lambda: scene.asked() == 2, Deadline.REPLY, "the second save is asked for")
        assert scene.periods() == []
        scene.save(13, at_s=30, stall_s=0.5)
        await soon(lambda: bool(scene.periods()), Deadline.REPLY, "a period is announced")
        assert scene.periods() == [50], (
            "the assumed rate of failures of one rank leads to the maximum, 100 s of 2 s each"
        )
        assert scene.status.interval is not None
        assert scene.status.interval.costs == Costs(stall_s=0.5, persist_s=1.0, step_s=2.0)
        notices = [each for each in scene.told if isinstance(each, events.Notice)]
        assert [each.routine for each in notices] == [True]
        assert "maxSeconds" in notices[0].text
        assert scene.asked() == 2
        await scene.end()

    asyncio.run(check())


def test_a_later_session_begins_with_the_last_costs_and_counts_the_failure_before(tmp_path: Path) -> None:
    """A session that did not end in order is a failure, and one that did is none. No save is asked for to be measured."""

    async def check() -> None:
        costs = Costs(stall_s=0.5, persist_s=1.0, step_s=2.0)
        note = trainings.Note(
            history=History(observed_s=7200, failures=1), open="b" * 32, costs=costs, world_size=1, steps=1
        )
        (tmp_path / "runs").mkdir()
        trainings.write(LocalFolder(str(tmp_path / "runs")), note)
        scene = Scene(tmp_path, auto={"overheadPercent": 50, "maxSeconds": 600})
        await scene.begin()
        await soon(lambda: bool(scene.periods()), Deadline.REPLY, "a period is announced")
        assert scene.periods() == [30], "7200 s with two failures: sqrt(2 * 0.5 * 3600) = 60 s"
        assert scene.asked() == 0
        await soon(lambda: scene.note().open == "a" * 32, Deadline.REPLY, "the session is noted")
        assert scene.note().history.failures == 2
        await scene.pacing.left(clean=True)
        assert scene.note().open == ""
        await scene.end()

        again = Scene(tmp_path, session="c")
        await again.begin()
        await soon(lambda: again.note().open == "c" * 32, Deadline.REPLY, "the next session is noted")
        assert again.note().history.failures == 2
        await again.pacing.left(clean=False)
        assert again.note().open == "c" * 32
        await again.end()

    asyncio.run(check())


def test_costs_of_another_number_of_ranks_are_measured_anew(tmp_path: Path) -> None:
    """Eight ranks have other states and another pace than one."""

    async def check() -> None:
        costs = Costs(stall_s=0.5, persist_s=1.0, step_s=2.0)
        (tmp_path / "runs").mkdir()
        trainings.write(LocalFolder(str(tmp_path / "runs")), trainings.Note(costs=costs, world_size=8, steps=9))
        scene = Scene(tmp_path)
        await scene.begin()
        await soon(lambda: scene.asked() == 1, Deadline.REPLY, "a save is asked for")
        assert scene.periods() == []
        await scene.end()

    asyncio.run(check())


def test_a_wait_for_a_slot_is_no_stall_that_a_longer_period_would_shorten(tmp_path: Path) -> None:
    """A persist of 30 s, and a save that waited 29 s for it: the period is 1.25 persists, and not a hundred waits."""

    async def check() -> None:
        scene = Scene(tmp_path, auto={"overheadPercent": 1, "maxSeconds": 36_000})
        await scene.begin()
        await soon(lambda: scene.asked() == 1, Deadline.REPLY, "the first save is asked for")
        scene.save(1, at_s=2, stall_s=0.01, persist_s=30)
        scene.save(3, at_s=36, stall_s=0.01, waited_s=29, persist_s=30)
        await soon(lambda: scene.status.interval is not None, Deadline.REPLY, "there is a period")
        assert scene.status.interval is not None
        assert scene.status.interval.costs.stall_s == pytest.approx(0.01)
        await scene.end()

    asyncio.run(check())


def test_a_policy_with_a_fixed_period_or_suspended_is_asked_nothing(tmp_path: Path) -> None:
    """No save is requested, nothing is noted on the root, and no interval is in the status."""

    async def check() -> None:
        scene = Scene(tmp_path, periodSteps=7)
        await scene.begin()
        scene.save(7, at_s=1, stall_s=0.1)
        scene.save(14, at_s=2, stall_s=0.1)
        await soon(lambda: not scene.pacing._wake.is_set(), Deadline.REPLY, "it has looked")
        assert (scene.told, scene.status.interval) == ([], None)
        assert list(scene.root.iterdir()) == []
        await scene.end()
        paused = Scene(tmp_path, session="d")
        paused.spec = {"trigger": AUTO, "suspend": True}
        await paused.begin()
        await soon(lambda: paused.note().open != "", Deadline.REPLY, "it has looked")
        assert paused.asked() == 0
        await paused.end()

    asyncio.run(check())
