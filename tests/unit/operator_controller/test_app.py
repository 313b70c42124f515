"""
The whole of: what a controller says of its own health.

Called from: pytest. Its life as a process is in tests/process and tests/cluster.
"""

import asyncio
import time
from asyncio import sslproto
from typing import Any

import pytest

from pillion_operator.cluster import reflector
from pillion_operator.controller import app
from pillion_operator.settings import Settings
from support.api_in_memory import ApiInMemory


def made() -> app.Controller:
    api: Any = ApiInMemory()

    async def within() -> app.Controller:
        return app.Controller(api, Settings(namespace="pillion-system", pod_name="c-0"))

    return asyncio.run(within())


def test_a_replica_that_waits_is_never_stuck() -> None:
    """It has no caches and writes nothing."""
    controller = made()
    controller.reconciler.last_turn_s = controller.pods.last_event_s = time.monotonic() - 10_000
    assert controller.stuck() == []


def test_a_leader_whose_writer_or_watch_hangs_says_which() -> None:
    """The kubelet starts it anew, and the log of the probe says why."""
    controller = made()
    controller.is_leading = True
    controller._known.set()
    assert controller.stuck() == []
    controller.reconciler.last_turn_s = time.monotonic() - app.STUCK_S - 1
    assert ["writer" in each for each in controller.stuck()] == [True]
    controller.checkpoints.last_event_s = time.monotonic() - reflector.STALE_S - 1
    assert any("checkpoints" in each for each in controller.stuck())


def test_a_leader_is_not_ready_before_it_knows_what_there_is() -> None:
    """And says what is missing."""
    controller = made()
    controller.is_leading = True
    assert any("caches" in each for each in controller.missing())
    controller._known.set()
    assert not any("caches" in each for each in controller.missing())


def test_a_tls_connection_costs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asyncio sets aside for each connection is bounded before the first is opened."""
    monkeypatch.setattr(sslproto.SSLProtocol, "max_size", 256 * 1024)
    app.bound_tls_memory()
    protocol = sslproto.SSLProtocol
    assert protocol.max_size == app.TLS_BUFFER_BYTES
