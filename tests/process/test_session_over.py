"""
The whole of: what an executor still does for trainers that are gone, when the next ones come.

Called from: pytest.
Must never: take less than the store's own bounds as proof; what is tested is that nobody waits for them.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillion.errors import PillionError
from pillion.wire import policy
from pillion_sidecar import settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import Save
from pillion_sidecar.executor.exchange import tcpstore
from pillion_sidecar.status.metrics import Metrics
from pillion_sidecar.supervisor.executor_client import ExecutorClient, SessionOver
from support.deadlines import Deadline, soon
from support.identities import identity
from support.store_host import StoreHost


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A port that takes connections and never says anything: the store of a rank 0 that hangs at its end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.mark.parametrize("stopped", [False, True], ids=["it leaves", "it is stopped"])
def test_the_next_session_does_not_wait_for_the_store_of_the_one_before(
    silent: socket.socket, tmp_path: Path, stopped: bool
) -> None:
    """
    An executor that waits for a store which never answers leaves that wait as soon as the next session opens, well within the store's bound; one
    that cannot leave is replaced. What is asked for the session before afterwards is refused.
    """

    async def scenario() -> None:
        executor_client = ExecutorClient(
            settings.from_arguments(["--runtime-dir", str(tmp_path)], {}), Metrics(), on_event=lambda _: None
        )
        over = PodArena(
            str(tmp_path), identity("a" * 32, tmp_path, silent.getsockname()), policy.parse({}, embedded=True)
        )
        lasting = PodArena(str(tmp_path), identity("b" * 32, tmp_path, None), policy.parse({}, embedded=True))
        try:
            executor_client.session(over)
            accepted, _ = await asyncio.wait_for(
                asyncio.get_running_loop().run_in_executor(None, silent.accept), Deadline.TORCH_START.s
            )
            with contextlib.closing(accepted):
                first = executor_client.executor_pid
                assert first is not None
                if stopped:
                    os.kill(first, signal.SIGSTOP)
                begun = time.monotonic()
                executor_client.session(lasting)
                await soon(
                    lambda: executor_client.opened == "b" * 32, Deadline.PROCESS_START, "the next session is open"
                )
                assert time.monotonic() - begun < tcpstore.CONNECT_TIMEOUT_S / 2
                assert (executor_client.executor_pid != first) == stopped
            with pytest.raises(SessionOver):
                await executor_client.open(over)
        finally:
            await executor_client.stop()
            over.close()
            lasting.close()

    asyncio.run(scenario())


def test_an_executor_leaves_the_pods_that_it_waits_for_and_serves_the_next_session(tmp_path: Path) -> None:
    """Trainers that come back while the pods agree on a rescue do not pay for a fresh process, which has torch to import."""

    async def scenario() -> None:
        executor_client = ExecutorClient(
            settings.from_arguments(["--runtime-dir", str(tmp_path)], {}), Metrics(), on_event=lambda _: None
        )
        store = StoreHost()
        over, lasting = (
            PodArena(
                str(tmp_path),
                identity(letter * 32, tmp_path, (store.host, store.port)),
                policy.parse({}, embedded=True),
            )
            for letter in "ab"
        )
        try:
            executor_client.session(over)
            await soon(lambda: executor_client.opened == "a" * 32, Deadline.TORCH_START, "the first session is open")
            first = executor_client.executor_pid
            rescue = asyncio.create_task(
                executor_client.rescue(
                    over, [Save(5, 0, 1, persist=True, destination=None)], ["call"], owed=lambda _: False
                )
            )
            await soon(
                lambda: executor_client._working_for == "a" * 32, Deadline.REPLY, "the executor waits for the other pod"
            )
            executor_client.session(lasting)
            await soon(lambda: executor_client.opened == "b" * 32, Deadline.REPLY, "the next session is open")
            with pytest.raises(PillionError, match="nobody waits for"):
                await rescue
            assert executor_client.executor_pid == first
        finally:
            await executor_client.stop()
            over.close()
            lasting.close()
            store.end()

    asyncio.run(scenario())


def test_an_executor_that_is_still_starting_goes_on_for_the_next_session(silent: socket.socket, tmp_path: Path) -> None:
    """
    Trainers that die again and again, faster than torch is imported beside them, do not have it begun anew each time: the pod
    would never be there for its peers.
    """

    async def scenario() -> None:
        executor_client = ExecutorClient(
            settings.from_arguments(["--runtime-dir", str(tmp_path)], {}), Metrics(), on_event=lambda _: None
        )
        store = StoreHost()
        address = (store.host, store.port)
        stores_of = [silent.getsockname(), silent.getsockname(), address]
        pods = [
            PodArena(str(tmp_path), identity(letter * 32, tmp_path, of), policy.parse({}, embedded=True))
            for letter, of in zip("abc", stores_of, strict=True)
        ]
        try:
            await executor_client.prestart()
            first = executor_client.executor_pid
            for pod in pods:
                executor_client.session(pod)
                await asyncio.sleep(0)  # as far as it goes at once: it asks the executor to start
                await soon(executor_client._lock.locked, Deadline.REPLY, "the executor is asked")
            await soon(lambda: executor_client.opened == "c" * 32, Deadline.TORCH_START, "the last session is open")
            assert executor_client.executor_pid == first
        finally:
            await executor_client.stop()
            for pod in pods:
                pod.close()
            store.end()

    asyncio.run(scenario())
