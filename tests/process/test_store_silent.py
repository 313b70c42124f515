"""
The whole of: an executor whose job's store does not answer any more, and its successor.

Called from: pytest.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from pillion.wire import policy
from pillion_sidecar import settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.status.metrics import Metrics
from pillion_sidecar.supervisor import signals
from pillion_sidecar.supervisor.executor_client import ExecutorClient
from support.deadlines import Deadline, soon
from support.identities import identity
from support.store_host import StoreHost

STORE_TIMEOUT_S = 1.0
SESSION = "a" * 32


@pytest.fixture
def store() -> Iterator[StoreHost]:
    made = StoreHost()
    yield made
    made.end()


def with_an_open_session(
    folder: Path, store: StoreHost, scenario: Callable[[ExecutorClient, PodArena], Coroutine[Any, Any, None]]
) -> None:
    """The coordinator's pod of two; it has opened its session in `store`."""

    async def run() -> None:
        arguments = ["--runtime-dir", str(folder)]
        of = settings.from_arguments(arguments, {"PILLION_STORE_TIMEOUT_S": str(STORE_TIMEOUT_S)})
        executor_client = ExecutorClient(of, Metrics(), on_event=lambda _: None)
        pod = PodArena(
            str(folder), identity(SESSION, folder, (store.host, store.port)), policy.parse({}, embedded=True)
        )
        try:
            executor_client.session(pod)
            await soon(lambda: executor_client.opened == SESSION, Deadline.TORCH_START, "the session is open")
            await scenario(executor_client, pod)
        finally:
            await executor_client.stop()
            pod.close()

    asyncio.run(run())


async def reopened(executor_client: ExecutorClient, first: int | None) -> None:
    await soon(lambda: executor_client.executor_pid not in (None, first), Deadline.PROCESS_START, "it has a successor")
    await soon(lambda: executor_client.opened == SESSION, Deadline.PROCESS_START, "that has opened the session")


def test_a_message_to_all_pods_that_a_silent_store_swallows_moves_the_pod_to_storage(
    store: StoreHost, tmp_path: Path
) -> None:
    """The executor still answers its pings, so that what hangs is known, and its successor does not ask that store again."""

    async def scenario(executor_client: ExecutorClient, pod: PodArena) -> None:
        first = executor_client.executor_pid
        store.stop()
        assert not await asyncio.wait_for(executor_client.signal(pod, signals.RescueCalled(id="x")), Deadline.REPLY.s)
        assert executor_client.store_lost
        await reopened(executor_client, first)

    with_an_open_session(tmp_path, store, scenario)


@pytest.mark.parametrize("end", [StoreHost.stop, StoreHost.end], ids=["silent", "gone"])
def test_the_successor_of_an_executor_that_died_does_not_wait_for_a_store_that_is_lost(
    store: StoreHost, tmp_path: Path, end: Callable[[StoreHost], None]
) -> None:
    """Its predecessor was connected, so that nobody is on his way there; the others have noticed, and meet on storage."""

    async def scenario(executor_client: ExecutorClient, pod: PodArena) -> None:
        first = executor_client.executor_pid
        assert first is not None
        end(store)
        os.kill(first, signal.SIGKILL)
        await reopened(executor_client, first)
        assert executor_client.store_lost

    with_an_open_session(tmp_path, store, scenario)
