"""
One webhook process: its parts, its ports, and the order in which they begin and end.

Called from: `__main__`. The only place where the parts meet.

    SIGTERM, SIGINT     not ready any more; goes on serving for `shutdown_grace_s`, so that whoever still knows this replica is
                        answered; then ends

    :8443  TLS          /mutate
    :8080               /healthz /readyz /metrics
"""

import asyncio
import dataclasses
import gc
import logging
import signal
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from pillion_operator import health, listener
from pillion_operator.certificates import serving
from pillion_operator.cluster import client, events
from pillion_operator.log import Field
from pillion_operator.settings import Settings
from pillion_operator.webhook import policies, refusals, server

CLOSE_S: Final = 5.0
"""For requests that are being answered when the grace is over: each has a deadline below it."""

_log = logging.getLogger(__name__)


class Exit(IntEnum):
    """Exit statuses of the webhook."""

    CLEAN = 0
    """It was told to end, and has."""
    INTERNAL = 70
    """A part ended that never should; see the log."""
    UNAVAILABLE = 69
    """No API server is configured, or a port cannot be opened."""


def run(settings: Settings) -> Exit:
    """Serve until SIGTERM. Blocks: for the process's life."""
    return asyncio.run(_run(settings))


async def _run(settings: Settings) -> Exit:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener.bound_tls_memory()
    try:
        async with await client.Client.connect() as api:
            return await Webhook(api, settings).run(stop)
    except (client.Unreachable, OSError) as err:
        _log.error("cannot begin: %s", err)
        return Exit.UNAVAILABLE


class Webhook:
    """The parts of one webhook."""

    def __init__(self, api: client.Client, settings: Settings) -> None:
        self.settings = settings
        self.events = events.Events(api, settings.pod_name)
        self.policies = policies.Policies(api)
        self.refusals = refusals.Refusals(api, self.events)
        self.server = server.Server(self.policies, self.refusals, settings)
        self.serving = serving.Serving(
            api,
            settings.namespace,
            settings.secret_name,
            client_authority=settings.webhook_client_ca,
            on_change=self._certificate_changed,
        )
        self.health = health.Health(settings.listen_address, settings.health_port, self.missing)
        self.port = settings.webhook_port

    async def run(self, stop: asyncio.Event) -> Exit:
        """Serve until `stop` is set."""
        parts = [
            asyncio.create_task(each, name=name)
            for name, each in (
                ("certificate", self.serving.run()),
                ("policies", self.policies.run()),
                ("events", self.events.run()),
                ("refusals", self.refusals.run()),
            )
        ]
        stopping = asyncio.create_task(stop.wait(), name="stop")
        door = listener.Listener(
            self.server.application(),
            address=self.settings.listen_address,
            port=self.port,
            context=self.serving.context,
            keep_alive_s=server.IDLE_S,
            close_s=CLOSE_S,
        )
        try:
            async with self.health, door:
                self.port = door.port
                # What was imported never goes away. Looking through it for garbage takes 20 ms, which some pod would wait for.
                gc.collect()
                gc.freeze()
                _log.info("serves admission", extra={Field.PORT: self.port})
                _log.info("serves health and metrics", extra={Field.PORT: self.health.port})
                ended, _ = await asyncio.wait([*parts, stopping], return_when=asyncio.FIRST_COMPLETED)
                if stopping in ended:
                    await self._drain(parts)
                    return Exit.CLEAN
                for part in ended:
                    _log.error("the part %s ended", part.get_name(), exc_info=part.exception())
                return Exit.INTERNAL
        finally:
            for task in (*parts, stopping):
                task.cancel()
            await asyncio.gather(*parts, stopping, return_exceptions=True)

    def missing(self) -> Sequence[str]:
        """What keeps this replica from being ready."""
        return [
            text
            for text, is_missing in (
                ("told to end", self.server.is_ending),
                ("no certificate yet", not self.serving.ready),
                ("the policies are not listed yet", not self.policies.ready),
            )
            if is_missing
        ]

    async def _drain(self, parts: Sequence[asyncio.Task[None]]) -> None:
        _log.info("told to end; serves for %d s more", self.settings.shutdown_grace_s)
        self.server.is_ending = True
        # A part that ends now changes nothing for those who are served from what is known.
        await asyncio.wait(parts, timeout=self.settings.shutdown_grace_s, return_when=asyncio.ALL_COMPLETED)
        await self.refusals.flush()
        await self.events.flush()

    def _certificate_changed(self, found: serving.Material) -> None:
        """Pods that are injected from now on trust whom the certificate is of."""
        if found.authority:
            self.server.settings = dataclasses.replace(self.server.settings, home_ca=found.authority)
