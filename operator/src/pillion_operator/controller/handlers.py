"""
The whole of: the use of kopf: it follows the CheckpointPolicy objects and hands each on.

Called from: `app`, while this replica holds the Lease. kopf runs embedded and standalone, with one handler, for raw events: it keeps no
state on objects and so writes no annotation and no finalizer, not even on policies. Pods, jobs and Checkpoint objects, of which
there are thousands, are followed by Reflectors: with kopf, 5,000 objects took 85 MiB and 4 s of CPU where a Reflector takes 7 MiB
and 0.1 s, and an object that was deleted while the watch was interrupted stayed in kopf's cache forever.
Must never: register a handler for create, update, resume or delete, a daemon or a timer.
"""

import asyncio
import logging
import random
import ssl
import time
from collections.abc import Callable
from typing import Any, Final

import kopf

from pillion_operator import metrics
from pillion_operator.cluster import client, paths
from pillion_operator.controller import policies

STREAM_S: Final = 300
"""Time after which the API server ends a stream, as for the Reflectors."""
SILENT_S: Final = 90.0
"""Maximum silence of a stream: the API server sends a bookmark each minute."""
CONNECT_S: Final = 5.0
REQUEST_S: Final = 15.0
STOP_S: Final = 5.0
"""Timeout for kopf to end."""
RESTART_S: Final = 5.0
"""Pause before kopf is restarted. It ends on watch errors that it does not know."""
RELIST_S: Final = 300.0
"""Interval between two lists of all policies: kopf does not report policies that were deleted while its watch was interrupted."""

_IDENTITY: Any = "pillion-controller"
"""Any, as kopf's type for it is not public."""
_CHATTY: Final = ("kopf.objects", "kopf.activities", "kopf._core.engines.activities")
"""Loggers that write a line for each event; their warnings stay."""

_log = logging.getLogger(__name__)


class _Login(kopf.ConnectionInfo):
    """Verifies as client-go does: the authorities of many clusters lack what Python is strict about since 3.13."""

    def as_ssl_context(self) -> ssl.SSLContext:
        context = super().as_ssl_context()
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context


class Watcher:
    """kopf, and the policies that it brings."""

    def __init__(self, api: client.Client, store: policies.Policies) -> None:
        """
        Args:
            api: access to the API server, for the list, and for how kopf is to reach it.
            store: where policies are kept.
        """
        self._api = api
        self._store = store

    async def relist(self) -> None:
        """
        List all policies, and drop those that no longer exist.

        Raises:
            ApiError, Unreachable: the store is unchanged.
        """
        listing = await self._api.list(paths.POLICIES.everywhere)
        self._store.replace_all([policies.project(each) for each in listing["items"]])

    async def run(self, restore_signals: Callable[[], None]) -> None:
        """
        Follow the policies. Blocks: until it is cancelled.

        Args:
            restore_signals: called when kopf has put its own handlers of signals in place of the process's.
        """
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        relisting = asyncio.create_task(self._relist(), name="policies relisted")
        try:
            while True:
                await self._kopf(restore_signals)
                metrics.WATCH_RESTARTS.labels("checkpointpolicies", "ended").inc()
                await asyncio.sleep(RESTART_S)
        finally:
            relisting.cancel()
            await asyncio.gather(relisting, return_exceptions=True)

    async def _kopf(self, restore_signals: Callable[[], None]) -> None:
        """kopf from its beginning to its end."""
        # Not kopf.operator(): at its end it cancels all tasks of the loop that are younger than itself, and most of them belong to the controller.
        # The identity is for peering, which is off; left out, kopf looks up the user's name, and a user of an image has none.
        tasks = await kopf.spawn_tasks(
            registry=self._registry(),
            settings=_settings(),
            standalone=True,
            clusterwide=True,
            identity=_IDENTITY,
        )
        restore_signals()
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                error = None if task.cancelled() else task.exception()
                _log.error("kopf stopped because its task %s ended; restarting it: %r", task.get_name(), error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=STOP_S)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        group, version = paths.POLICIES.version.split("/")

        @kopf.on.event(group, version, paths.POLICIES.plural, registry=registry)
        async def on_policy(event: Any, **_: Any) -> None:
            # async, as kopf runs the others in threads.
            document = dict(event["object"])
            changed = policies.project(document)
            if event["type"] == "DELETED":
                self._store.remove(changed.key)
            else:
                self._store.put(changed)

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.ConnectionInfo:
            # Also called when a token has expired. The client knows how to get the next one.
            connection = await self._api.connection()
            return _Login(
                server=connection.server,
                ca_path=connection.authority,
                insecure=not connection.verify,
                certificate_path=connection.certificate,
                private_key_path=connection.key,
                token=connection.token or None,
            )

        return registry

    async def _relist(self) -> None:
        while True:
            await asyncio.sleep(RELIST_S * random.uniform(0.8, 1.2))
            begun_s = time.monotonic()
            try:
                await self.relist()
            except (client.ApiError, client.Unreachable) as err:
                _log.warning("listing the policies failed after %.1f s: %s", time.monotonic() - begun_s, err)


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    # Nothing is discovered, so that no right to list namespaces and CRDs is needed.
    settings.scanning.disabled = True
    # The controller posts Events itself; kopf would post its own log.
    settings.posting.enabled = False
    settings.process.ultimate_exiting_timeout = None
    settings.watching.server_timeout = STREAM_S
    settings.watching.client_timeout = STREAM_S + SILENT_S
    settings.watching.inactivity_timeout = SILENT_S
    settings.watching.connect_timeout = CONNECT_S
    settings.networking.request_timeout = REQUEST_S
    settings.networking.connect_timeout = CONNECT_S
    return settings
