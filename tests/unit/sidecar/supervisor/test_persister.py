"""
The whole of: that every save has an end, whatever the executor's side raises.

Called from: pytest.
Must never: start an executor.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pillion.errors import RemoteFailure, SaveError
from pillion.wire import arena, events, policy
from pillion.wire.message import Message
from pillion_sidecar import settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import Granted, SaveState
from pillion_sidecar.concurrency import tasks as tasks_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.status.metrics import Metrics
from pillion_sidecar.status.status import SidecarStatus
from pillion_sidecar.supervisor import executor_client
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from pillion_sidecar.supervisor.executor_process import ExecutorDied, ExecutorProcess
from pillion_sidecar.supervisor.persister import Persister
from pillion_sidecar.supervisor.trainers import Trainers
from pillion_sidecar.supervisor.uploader import Uploader
from support.deadlines import Deadline
from support.identities import identity


def no_uploader(trainers: Trainers) -> Uploader:
    """One that nothing waits for."""
    client: Any = None
    return Uploader(SidecarStatus(), trainers, client, on_committed=lambda _: None, on_idle=lambda: None)


class Broken:
    """Operations whose every save raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def persist(self, *_: Any, **__: Any) -> dict[str, Any]:
        raise self.error


@pytest.fixture
def pod(tmp_path: Path) -> PodArena:
    """One rank; step 1 is sealed and waits for the executor."""
    made = PodArena(str(tmp_path), identity("a" * 32, tmp_path, None), policy.parse({}, embedded=True))
    granted = made.table.claim(1, 0, persist=True)
    assert isinstance(granted, Granted)
    made.begin_fill(0, granted.save.slot, persist=True)
    made.table.sealed(1, 0)
    return made


@pytest.mark.parametrize("damaged", [False, True], ids=["the executor's side raises", "the slot's header is damaged"])
def test_whatever_is_raised_ends_the_save_and_frees_its_slot(pod: PodArena, damaged: bool) -> None:
    """Its handle fails with the error, a drain does not wait for it, and the next claim finds a slot."""
    told: list[Message] = []

    async def scenario() -> None:
        tasks = tasks_module.BackgroundTasks()
        executor_client: Any = Broken(KeyError("a defect"))
        trainers = Trainers(executor_client, tasks, on_policy=lambda _: None, on_rescue=lambda _: None)
        trainers.begin_session(pod)
        trainers.broadcast = lambda event, **_: told.append(event)  # type: ignore[method-assign] # there is no trainer
        persister = Persister(SidecarStatus(), trainers, executor_client, no_uploader(trainers), lambda: None)
        if damaged:
            with Path(pod.segments[0].path).open("r+b") as file:
                file.seek(pod.segments[0].header.slot_offset(pod.table.saves[1].slot))
                file.write(b"\xff" * arena.PAGE_BYTES)
        persister.start(tasks)
        persister.wake()
        assert await persister.quiet(Deadline.REPLY.s)
        await tasks.stop()

    asyncio.run(scenario())
    assert [type(each) for each in told] == [events.SaveFailed]
    assert pod.table.saves[1].state is SaveState.DONE
    assert isinstance(pod.table.claim(2, 0, persist=True), Granted)
    pod.close()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("SaveSkipped", {"saves_skipped": 1, "saves_failed": 0}), ("OSError", {"saves_skipped": 0, "saves_failed": 1})],
)
def test_a_save_that_another_pod_dropped_counts_as_dropped_and_not_as_failed(
    pod: PodArena, kind: str, expected: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    """With `overlap: Skip` one pod may have no slot: no pod of the job has a failure, an error in its log, or an alert of it."""
    failures = failures_module.documents({1: RemoteFailure(kind, "no slot is free (staging.overlap: Skip)")})
    with pytest.raises(SaveError) as caught:
        failures_module.raise_told({"failures": failures}, 1)
    sidecar_status = SidecarStatus()

    async def scenario() -> None:
        tasks = tasks_module.BackgroundTasks()
        executor_client: Any = Broken(caught.value)
        trainers = Trainers(executor_client, tasks, on_policy=lambda _: None, on_rescue=lambda _: None)
        trainers.begin_session(pod)
        persister = Persister(sidecar_status, trainers, executor_client, no_uploader(trainers), lambda: None)
        persister.start(tasks)
        persister.wake()
        assert await persister.quiet(Deadline.REPLY.s)
        await tasks.stop()

    asyncio.run(scenario())
    pod.close()
    counted = sidecar_status.metrics.to_document()
    assert {name: counted[name] for name in expected} == expected
    assert len(sidecar_status.failures) == expected["saves_failed"]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == expected["saves_failed"]


def test_an_executor_that_cannot_be_started_for_a_while_is_started_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar that has no descriptor left at that moment tries again; and what stays so is the executor's death, which saves know."""
    monkeypatch.setattr(executor_client, "START_PAUSE_S", 0.0)
    shortages = [OSError(24, "Too many open files")] * executor_client.START_ATTEMPTS

    async def start(_: ExecutorProcess) -> None:
        if shortages:
            raise shortages.pop()

    async def scenario() -> None:
        monkeypatch.setattr(ExecutorProcess, "_start", start)
        of = settings.from_arguments(["--runtime-dir", str(tmp_path)], {})
        executor_client = ExecutorClient(of, Metrics(), on_event=lambda _: None)
        with pytest.raises(ExecutorDied, match="Too many open files"):
            await executor_client._running()
        shortages.append(OSError(11, "Resource temporarily unavailable"))
        await executor_client._running()
        assert shortages == []

    asyncio.run(scenario())
