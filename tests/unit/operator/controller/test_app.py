"""
The whole of: what a controller says of its own health.

Called from: pytest. Its life as a process is in tests/process and tests/cluster.
"""

import asyncio
import dataclasses
import time
from typing import Any

from pillion_operator.cluster import reflector
from pillion_operator.controller import app, endpoint
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
    controller._caches_filled.set()
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
    controller._caches_filled.set()
    assert not any("caches" in each for each in controller.missing())


def test_a_leader_that_cannot_write_its_address_is_not_ready() -> None:
    """No sidecar reaches it then, as where OpenShift refuses the endpoint; without an address or call-home there is none to write."""
    controller = made()
    controller.settings = dataclasses.replace(controller.settings, pod_ip="192.0.2.1")
    assert not any("endpoint" in each for each in controller.missing())
    controller.is_leading = True
    assert any("endpoint" in each for each in controller.missing())
    api: Any = ApiInMemory()
    controller.endpoint = endpoint.Endpoint(api, controller.settings, 8444)
    assert any("endpoint" in each for each in controller.missing())
    controller.endpoint.is_written = True
    assert not any("endpoint" in each for each in controller.missing())
    controller.endpoint = None
    controller.settings = dataclasses.replace(controller.settings, home_enabled=False)
    assert not any("endpoint" in each for each in controller.missing())
