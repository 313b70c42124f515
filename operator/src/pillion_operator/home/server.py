"""
The whole of: the HTTP of reports: a report is received, verified, stored, and answered.

Called from: the controller, which serves `Home.application` over TLS.
Must never: accept a report for another pod, hold more than a bounded number of requests, or wait for the rest of the
controller, which processes the effects of a report later.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from aiohttp import web

from pillion.wire import home
from pillion_operator import metrics
from pillion_operator.bodies import Bodies, Unread
from pillion_operator.home import authenticate, injected
from pillion_operator.home.refusal import Refused, Result
from pillion_operator.home.registry import JobKey, Received, Registry
from pillion_operator.log import Field

DEADLINE_S: Final = 10.0
"""Timeout for one request: its body, the token review, and the answer. A sidecar waits about as long."""
MAX_IN_FLIGHT: Final = 256
"""Maximum number of requests at one time. Further ones are refused with a retry."""
MAX_BODIES_BYTES: Final = 16 * 1024 * 1024
"""
Maximum bytes of all reports at one time, from the first byte to the answer. A report has some ten KiB, and 200 KiB for a job with
a thousand checkpoints.
"""
KEEP_ALIVE_S: Final = 15.0
"""
Maximum idle time of a connection. It is longer than the usual interval, so that a job needs no TLS handshake for each report.
"""

_UNREAD: Final = {400: Result.BAD, 408: Result.SLOW, 413: Result.BAD, 503: Result.BUSY}
"""Result for a body that could not be read, by HTTP status."""

_log = logging.getLogger(__name__)


class PolicyNow(NamedTuple):
    """A policy as it is sent to the jobs under it."""

    spec: Mapping[str, Any] | None
    generation: int


NO_POLICY: Final = PolicyNow(None, 0)


class Home:
    """The HTTP handler of reports."""

    def __init__(
        self,
        authenticator: authenticate.Authenticator,
        pods: injected.Pods,
        registry: Registry,
        *,
        policy_of: Callable[[str, str], PolicyNow],
        commands_of: Callable[[JobKey], tuple[home.Command, ...]],
        on_report: Callable[[Received], None],
    ) -> None:
        """
        Args:
            authenticator: whose token it is.
            pods: what was injected into that pod.
            registry: where reports are kept.
            policy_of: the policy of a namespace and name as it is now.
            commands_of: what a job is to do.
            on_report: called with what each report changed, before its answer is made.
        """
        self._authenticator = authenticator
        self._pods = pods
        self._registry = registry
        self._policy_of = policy_of
        self._commands_of = commands_of
        self._on_report = on_report
        self._in_flight = 0
        self._bodies = Bodies(
            longest=home.MAX_REPORT_BYTES, most_bytes=MAX_BODIES_BYTES, most=MAX_IN_FLIGHT, within_s=DEADLINE_S
        )

    def application(self) -> web.Application:
        """The application to serve."""
        application = web.Application()
        application.router.add_post(home.REPORT_PATH, self._post)
        return application

    async def _post(self, request: web.Request) -> web.Response:
        if self._in_flight >= MAX_IN_FLIGHT:
            return _refuse(Refused(Result.BUSY, f"more than {MAX_IN_FLIGHT} reports at one time; try again"))
        self._in_flight += 1
        try:
            async with asyncio.timeout(DEADLINE_S):
                answer, result = await self._answer(request)
        except Refused as refused:
            return _refuse(refused)
        except TimeoutError:
            return _refuse(Refused(Result.SLOW, f"the report was not received and verified within {DEADLINE_S:.0f} s"))
        finally:
            self._in_flight -= 1
        metrics.REPORTS.labels(result.value).inc()
        return web.Response(body=home.encode(answer), content_type="application/json")

    async def _answer(self, request: web.Request) -> tuple[home.Answer, Result]:
        # Before the body: a stranger is not worth a MiB of memory.
        identity = await self._authenticator.authenticate(request.headers.get("Authorization", ""))
        try:
            async with self._bodies.read(request) as body:
                report = home.decode_report(body)
        except home.BadReport as err:
            raise Refused(Result.BAD, str(err)) from err
        except Unread as err:
            raise Refused(_UNREAD[err.status], str(err)) from err
        pod = await self._pods.find(identity.namespace, identity.pod, identity.pod_uid)
        if pod is None:
            raise Refused(Result.FORBIDDEN, f"pod {identity.pod} was not injected or no longer exists")
        if differences := _differences(report, identity, pod):
            raise Refused(Result.FORBIDDEN, "a pod may report only for its own job: " + "; ".join(differences))
        received = self._registry.receive(report, created=pod.created, now_s=time.monotonic())
        if not received.stale:
            self._on_report(received)
        now = self._policy_of(pod.namespace, pod.policy)
        answer = home.Answer(
            interval_s=received.job.interval_s,
            policy=now.spec,
            policy_generation=now.generation,
            # A stale one may still be draining, and goes on with what it has; the job's commands are for its successor.
            commands=() if received.stale else self._commands_of(received.job.key),
        )
        return answer, Result.STALE if received.stale else Result.ACCEPTED


def _differences(report: home.Report, identity: authenticate.Identity, pod: injected.Pod) -> list[str]:
    """Return the fields in which a report contradicts its sender's token or pod. `actual`: the value of token or pod."""
    pairs = (
        ("namespace", report.namespace, identity.namespace),
        ("pod", report.pod, identity.pod),
        ("pod_uid", report.pod_uid, identity.pod_uid),
        ("policy", report.policy, pod.policy),
        ("job_id", report.job_id, pod.job_id),
    )
    return [
        f"{name} is {claimed[:253]!r}, and the pod's is {actual!r}"
        for name, claimed, actual in pairs
        if claimed != actual
    ]


def _refuse(refused: Refused) -> web.Response:
    metrics.REPORTS.labels(refused.result.value).inc()
    # At DEBUG: a refused pod reports again every few seconds, and its own log has the reason.
    _log.debug(
        "refused a report: %s", refused, extra={Field.STATUS: refused.status, Field.REASON: refused.result.value}
    )
    return web.Response(status=refused.status, text=f"{refused}\n", headers=refused.headers)
