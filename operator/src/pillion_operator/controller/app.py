"""
One controller process: its parts, its ports, and the order in which they begin and end.

Called from: `__main__`. The only place where the parts meet.

    without the Lease   serves health and metrics, and waits
    with the Lease      certificates, caches, kopf, the report endpoint, and the writer; then its address for the sidecars
    SIGTERM, SIGINT     removes its address, stops, releases the Lease
    Lease lost          exits at once with a status other than 0, and is restarted: another replica may be active

    :8444  TLS          /v1/report
    :8080               /healthz /readyz /metrics
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from pillion_operator import health, listener, metrics, process
from pillion_operator.certificates import rotation, serving
from pillion_operator.cluster import client, events, lease, paths, reflector
from pillion_operator.controller import arrivals, checkpoints, endpoint, handlers, pod_index
from pillion_operator.controller.reconcile import Reconciler
from pillion_operator.controller.report_handler import ReportHandler
from pillion_operator.home import authenticate, injected, server
from pillion_operator.home.registry import Registry
from pillion_operator.log import Field
from pillion_operator.process import Exit
from pillion_operator.settings import CertificateMode, Settings

STUCK_S: Final = 120.0
"""
Maximum time between two turns of the writer before the kubelet restarts the process. A turn is at most ten writes with a timeout
of 15 s each; against a healthy API server it takes a second.
"""
STOP_S: Final = 8.0
"""Timeout for all tasks to end after SIGTERM. Together with the Lease's release it is below the 30 s that a pod has."""
CLOSE_S: Final = 2.0
"""Timeout for reports that are being answered."""
SWEEP_S: Final = 60.0
"""Interval between two looks for annotation requests that no job answers."""
RETRY_S: Final = 2.0

_log = logging.getLogger(__name__)


def run(settings: Settings) -> Exit:
    """Run until SIGTERM. Blocks: for the process's life."""
    return process.run(
        lambda api, signals: Controller(api, settings, restore_signals=signals.install).run(signals.received)
    )


class Controller:
    """The parts of one controller."""

    def __init__(
        self,
        api: client.Client,
        settings: Settings,
        *,
        restore_signals: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            api: access to the API server.
            settings: see there.
            restore_signals: called when kopf has put its own handlers of signals in place of the process's.
        """
        self.settings = settings
        self.home_port = settings.home_port
        self.is_leading = False
        self.jobs = Registry()
        self.events = events.Events(api, settings.pod_name)
        self.pod_index = pod_index.PodIndex(self._policy_changed, self._job_changed)
        self.reconciler = Reconciler(api, self.jobs, self.pod_index.num_pods, self.events.post)
        self.pods = reflector.Reflector(
            api,
            paths.PODS.everywhere,
            injected.project,
            label_selector=injected.LABEL_SELECTOR,
            field_selector=injected.FIELD_SELECTOR,
            metadata_only=True,
            on_change=self._pod_changed,
        )
        self.job_objects = reflector.Reflector(
            api,
            paths.JOBS.everywhere,
            pod_index.project_job,
            metadata_only=True,
            on_change=self.pod_index.job_changed,
        )
        self.checkpoints = reflector.Reflector(
            api, paths.CHECKPOINTS.everywhere, checkpoints.project, on_change=self.reconciler.checkpoints.changed
        )
        self.watcher = handlers.Watcher(api, self.reconciler.policies)
        self.report_handler = ReportHandler(self.jobs, self.pod_index, self.reconciler, self.pods, self.events.post)
        self.serving = serving.Serving(api, settings.namespace, settings.secret_name)
        self.health = health.Health(settings.listen_address, settings.health_port, self.missing, self.stuck)
        self.endpoint: endpoint.Endpoint | None = None
        """The published address for sidecars, once the report endpoint is open."""
        self._api = api
        self._restore_signals = restore_signals
        self._lease = lease.Lease(api, settings.namespace, settings.lease_name, settings.pod_name)
        self._caches_filled = asyncio.Event()
        """Set once every cache has been filled."""
        self._trusted = asyncio.Event()
        """Set once the API server trusts the webhook."""

    async def run(self, stop: asyncio.Event) -> Exit:
        """Wait for the Lease, then lead, until `stop` is set or the Lease is lost."""
        stopping = asyncio.create_task(stop.wait(), name="stop")
        acquiring = asyncio.create_task(self._lease.acquire(), name="lease")
        trusting = asyncio.create_task(self._until_trusted(), name="trust")
        try:
            async with self.health:
                await asyncio.wait([stopping, acquiring], return_when=asyncio.FIRST_COMPLETED)
                if stopping.done():
                    return Exit.CLEAN
                acquiring.result()
                return await self._lead(stopping)
        finally:
            await process.cancel([stopping, acquiring, trusting], STOP_S)
            # Also if it was acquired at the moment of the signal. A lost Lease is not released.
            await self._lease.release()

    def missing(self) -> Sequence[str]:
        """Conditions that keep this replica from being ready. One that waits for the Lease is ready to take over."""
        parts = [("the API server does not trust the webhook's certificate yet", not self._trusted.is_set())]
        if self.is_leading:
            parts += [
                ("the caches are not filled yet", not self._caches_filled.is_set()),
                ("no certificate yet", self.settings.home_enabled and not self.serving.ready),
                ("the endpoint for sidecars is not written yet", self._is_unreachable()),
            ]
        return [text for text, is_missing in parts if is_missing]

    def _is_unreachable(self) -> bool:
        """Whether the leader's address is not published yet, though it can be."""
        if not (self.settings.home_enabled and self.settings.pod_ip):
            return False
        return self.endpoint is None or not self.endpoint.is_written

    async def _until_trusted(self) -> None:
        """Wait until the webhook is trusted. No replica is ready before: users create pods right after an install that is complete."""
        path = rotation.configuration_path(self.settings)
        while self.settings.certificate_mode is CertificateMode.SELF:
            try:
                if rotation.trusted_now(await self._api.get(path)):
                    break
            except client.NotFound:
                # Nothing calls the webhook, so nothing is to trust it.
                break
            except (client.ApiError, client.Unreachable) as err:
                _log.warning("cannot read the webhook configuration: %s", err)
            await asyncio.sleep(RETRY_S)
        self._trusted.set()

    def stuck(self) -> Sequence[str]:
        """Reasons for the kubelet to restart this process."""
        if not self.is_leading:
            return []
        problems = []
        if self._caches_filled.is_set() and time.monotonic() - self.reconciler.last_turn_s > STUCK_S:
            problems.append(f"the writer has made no progress for {STUCK_S:.0f} s")
        for name, each in (("pods", self.pods), ("jobs", self.job_objects), ("checkpoints", self.checkpoints)):
            if each.age_s() > reflector.STALE_S:
                problems.append(f"the watch of {name} has been silent for {each.age_s():.0f} s")
        return problems

    async def _lead(self, stopping: asyncio.Task[Any]) -> Exit:
        self.is_leading = True
        tasks = process.start(self._coroutines())
        lost = asyncio.create_task(self._lease.lost.wait(), name="lease lost")
        renewing = asyncio.create_task(self._lease.renew(), name="lease renewed")
        try:
            ended, _ = await asyncio.wait([stopping, lost, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if lost in ended:
                return Exit.LEASE_LOST
            _log.info("stopping on a signal" if stopping in ended else "stopping because a task exited")
            await self._stop(tasks)
            return Exit.CLEAN if stopping in ended else Exit.INTERNAL
        finally:
            self.is_leading = False
            await process.cancel([lost, renewing, *tasks], CLOSE_S)
            metrics.FLEET.jobs = metrics.FLEET.pods = tuple

    def _coroutines(self) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        metrics.FLEET.jobs, metrics.FLEET.pods = self.report_handler.rows, self.pod_index.counts
        metrics.FLEET.is_named = self.settings.job_series
        coroutines: list[tuple[str, Coroutine[Any, Any, None]]] = [
            ("events", self.events.run()),
            ("pods", self.pods.run()),
            ("jobs", self.job_objects.run()),
            ("checkpoints", self.checkpoints.run()),
            ("policies", self._follow_policies()),
            ("writer", self._after_caches(self.reconciler.run)),
            ("sweep", self._after_caches(self._sweep)),
        ]
        if self.settings.certificate_mode is CertificateMode.SELF:
            coroutines.append(("certificates", rotation.Rotation(self._api, self.settings).run()))
        if self.settings.home_enabled:
            coroutines += [("certificate", self.serving.run()), ("home", self._after_caches(self._serve_home))]
        return coroutines

    async def _follow_policies(self) -> None:
        while True:
            try:
                await self.watcher.relist()
                break
            except (client.ApiError, client.Unreachable) as err:
                _log.warning("cannot list the policies: %s", err)
                await asyncio.sleep(RETRY_S)
        for each in (self.pods, self.job_objects, self.checkpoints):
            await each.synced.wait()
        self._caches_filled.set()
        _log.info("active: the caches hold %d pods and %d Checkpoint objects", len(self.pods), len(self.checkpoints))
        await self.watcher.run(self._restore_signals)

    async def _after_caches(self, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a task once the caches are filled: a missing object would otherwise count as deleted."""
        await self._caches_filled.wait()
        await part()

    async def _sweep(self) -> None:
        while True:
            self.report_handler.sweep()
            await asyncio.sleep(SWEEP_S)

    async def _serve_home(self) -> None:
        pods = injected.Pods(self.pods, self._api)
        home = server.Home(
            authenticate.Authenticator(self._api, self.settings.token_audience, pods),
            pods,
            self.jobs,
            policy_of=self.reconciler.policies.now,
            commands_of=self.report_handler.commands_of,
            on_report=self.report_handler.reported,
        )
        tls = listener.Listener(
            home.application(),
            address=self.settings.listen_address,
            port=self.home_port,
            context=self.serving.context,
            keep_alive_s=server.KEEP_ALIVE_S,
            close_s=CLOSE_S,
        )
        async with tls:
            self.home_port = tls.port
            _log.info("serving reports of sidecars", extra={Field.PORT: self.home_port})
            if not self.settings.pod_ip:
                _log.warning("PILLION_POD_IP is not set: sidecars cannot reach this controller")
                await asyncio.Event().wait()
            self.endpoint = endpoint.Endpoint(self._api, self.settings, self.home_port)
            try:
                await self.endpoint.run()
            finally:
                if not self._lease.lost.is_set():
                    await self.endpoint.remove()

    async def _stop(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Stop in order: take the endpoint away and stop writing objects, then post the events that wait."""
        by_name = {task.get_name(): task for task in tasks}
        await process.cancel([by_name[name] for name in ("home", "writer") if name in by_name], STOP_S)
        await self.events.flush()

    def _pod_changed(self, key: reflector.Key, old: injected.Pod | None, new: injected.Pod | None) -> None:
        self.pod_index.pod_changed(key, old, new)
        if old is None and new is not None:
            arrivals.arrived(new, self.events.post, time.time())

    def _policy_changed(self, key: pod_index.PolicyKey) -> None:
        self.reconciler.mark_policy(key)

    def _job_changed(self, _: object) -> None:
        # The next report of the job is answered with the command; nothing is to be written.
        pass
