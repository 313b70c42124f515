"""
The whole of: what webhook and controller have in common as processes.

Called from: pytest. Their lives as processes are in tests/process.
"""

import asyncio
import logging
import os
import signal
import ssl
from asyncio import sslproto
from typing import Any

import pytest

from pillion_operator import listener, process
from pillion_operator.cluster import paths


def test_a_tls_connection_gets_the_small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size that the operator sets is the one that asyncio of this Python reads."""
    monkeypatch.setattr(sslproto.SSLProtocol, "max_size", 256 * 1024)
    listener.limit_tls_memory()

    async def buffer_bytes() -> int:
        context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        loop = asyncio.get_running_loop()
        protocol: Any = sslproto.SSLProtocol(loop, asyncio.Protocol(), context, loop.create_future(), server_side=True)
        num_bytes = len(protocol.get_buffer(-1))
        protocol._get_app_transport().close()
        return num_bytes

    assert asyncio.run(buffer_bytes()) == listener.TLS_BUFFER_BYTES


def test_a_signal_stops_the_process_also_after_a_library_took_it_over() -> None:
    """kopf puts its own handlers in place of the process's; `install` puts them back."""

    async def is_received() -> bool:
        signals = process.StopSignals()
        signals.install()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            return await signals.received.wait()

    assert asyncio.run(is_received())


def test_a_task_that_exits_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """One that is cancelled at the end of the process is no error."""

    async def exits() -> None:
        raise RuntimeError("no more")

    async def runs() -> None:
        await asyncio.Event().wait()

    async def within() -> None:
        first, second = process.start((("writer", exits()), ("pods", runs())))
        await asyncio.wait([first])
        await process.cancel([second], 5)

    with caplog.at_level(logging.ERROR):
        asyncio.run(within())
    assert [each.getMessage() for each in caplog.records] == ["task writer exited unexpectedly"]


def test_paths_are_spelled_as_kubernetes_does() -> None:
    """The oldest group has no name, and some kinds have no namespaces."""
    assert paths.PODS.everywhere == "/api/v1/pods"
    assert paths.SECRETS.within("team-a") == "/api/v1/namespaces/team-a/secrets"
    assert paths.POLICIES.one("team-a", "llm") == "/apis/pillion.dev/v1alpha1/namespaces/team-a/checkpointpolicies/llm"
    configurations = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
    assert paths.WEBHOOK_CONFIGURATIONS.one("", "pillion") == f"{configurations}/pillion"
