"""
One webhook process: its parts, its ports, and the order in which they begin and end.

Called from: `__main__`. The only place where the parts meet.

    SIGTERM, SIGINT     no longer ready; serves requests for `shutdown_grace_s`, so that clients that still know this replica are
                        answered; then ends

    :8443  TLS          /mutate
    :8080               /healthz /readyz /metrics
"""

import asyncio
import dataclasses
import gc
import logging
from collections.abc import Sequence
from typing import Final

from pillion_operator import health, listener, process
from pillion_operator.certificates import serving
from pillion_operator.cluster import client, events
from pillion_operator.log import Field
from pillion_operator.process import Exit
from pillion_operator.settings import Settings
from pillion_operator.webhook import policies, refusals, server

CLOSE_S: Final = 5.0
"""Timeout for requests that are being answered after the grace period; each has a deadline below it."""

_log = logging.getLogger(__name__)


def run(settings: Settings) -> Exit:
    """Serve until SIGTERM. Blocks: for the process's life."""
    return process.run(lambda api, signals: Webhook(api, settings).run(signals.received))


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
        tasks = process.start(
            (
                ("certificate", self.serving.run()),
                ("policies", self.policies.run()),
                ("events", self.events.run()),
                ("refusals", self.refusals.run()),
            )
        )
        stopping = asyncio.create_task(stop.wait(), name="stop")
        tls = listener.Listener(
            self.server.application(),
            address=self.settings.listen_address,
            port=self.port,
            context=self.serving.context,
            keep_alive_s=server.IDLE_S,
            close_s=CLOSE_S,
        )
        try:
            async with self.health, tls:
                self.port = tls.port
                # Imported modules are never freed. Scanning them for garbage takes 20 ms, for which a review would wait.
                gc.collect()
                gc.freeze()
                _log.info("serving admission", extra={Field.PORT: self.port})
                ended, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
                if stopping not in ended:
                    return Exit.INTERNAL
                await self._drain(tasks)
                return Exit.CLEAN
        finally:
            await process.cancel([*tasks, stopping], CLOSE_S)

    def missing(self) -> Sequence[str]:
        """Conditions that keep this replica from being ready."""
        return [
            text
            for text, is_missing in (
                ("the webhook is stopping", self.server.is_ending),
                ("no certificate yet", not self.serving.ready),
                ("the policies are not listed yet", not self.policies.ready),
            )
            if is_missing
        ]

    async def _drain(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        _log.info("stopping; serves requests for %d s more", self.settings.shutdown_grace_s)
        self.server.is_ending = True
        # A task that exits now changes nothing: requests are answered from the caches as they are.
        await asyncio.wait(tasks, timeout=self.settings.shutdown_grace_s, return_when=asyncio.ALL_COMPLETED)
        await self.refusals.flush()
        await self.events.flush()

    def _certificate_changed(self, material: serving.Material) -> None:
        """Give new pods the authority of the current certificate."""
        if material.authority:
            self.server.settings = dataclasses.replace(self.server.settings, home_ca=material.authority)
