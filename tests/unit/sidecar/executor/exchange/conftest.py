"""
What the tests of the exchange share: store clients that are closed.

Called from: pytest.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from pillion_sidecar.executor.exchange import store_client, tcpstore


@pytest.fixture(autouse=True)
def _clients_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every client that the test has opened is closed after it."""
    opened: list[store_client.Store] = []
    connect = tcpstore.connect

    def noted(*arguments: Any, **more: Any) -> store_client.Store:
        opened.append(connect(*arguments, **more))
        return opened[-1]

    monkeypatch.setattr(tcpstore, "connect", noted)
    yield
    for each in opened:
        each.close()
