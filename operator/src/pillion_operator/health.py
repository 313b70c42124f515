"""
The whole of: the port for kubelet and Prometheus: health, readiness, metrics. Plain HTTP, as neither has a client certificate.

    GET /healthz     200 while the event loop runs, or 500 with what is stuck: the kubelet restarts a hanging process
    GET /readyz      200, or 503 with what is missing
    GET /metrics     Prometheus' text format

Called from: webhook and controller, each with its own idea of ready.
Must never: name a pod, a policy or a job, as every client in the cluster may read it. The series of jobs in /metrics are the exception, served
only where the chart's value `monitoring.jobSeries` enables them (docs/decisions).
"""

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from aiohttp import web

from pillion_operator import metrics
from pillion_operator.log import Field

_CLOSE_S: Final = 1.0
"""Timeout for writing the last answer."""

_log = logging.getLogger(__name__)


class Health:
    """
    The server of that port.

    Owns: its listener, while in ``async with``.
    """

    def __init__(
        self,
        address: str,
        port: int,
        missing: Callable[[], Sequence[str]],
        stuck: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """
        Args:
            address: to listen on; empty: every one.
            port: 0: any that is free; see `port`.
            missing: what is not there yet, in words; nothing means ready.
            stuck: what will not mend itself, in words; nothing means alive.
        """
        self.port = port
        self._address = address
        self._missing = missing
        self._stuck = stuck
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=_CLOSE_S)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, self._address or None, self.port).start()
        self.port = self._runner.addresses[0][1]
        _log.info("serving health and metrics", extra={Field.PORT: self.port})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return _verdict(500, self._stuck())

    async def _readyz(self, _: web.Request) -> web.Response:
        return _verdict(503, self._missing())

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})


def _verdict(status: int, wrong: Sequence[str]) -> web.Response:
    if wrong:
        return web.Response(status=status, text="".join(f"{each}\n" for each in wrong))
    return web.Response(text="ok\n")
