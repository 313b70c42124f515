"""
The whole of: answering the API server: one POST, one AdmissionReview.

Called from: `app`. What an error of ours means for a pod, its policy says, or the operator's setting where no policy is known.
Must never: leave a request without an answer of ours within `DEADLINE_S`, after which the API server would give up on us.

    POST /mutate     an AdmissionReview of a pod that is to be made; 200 with the answer
                     400: no AdmissionReview; 413: longer than `BODY_MOST_BYTES`
"""

import asyncio
import logging
import time
from typing import Final

from aiohttp import web

from pillion.wire import policy
from pillion_operator import metrics
from pillion_operator.cluster import events
from pillion_operator.injection import annotations, checkpoint_policy, decide, pods, shape
from pillion_operator.injection.reasons import Reason
from pillion_operator.log import Field
from pillion_operator.settings import Settings
from pillion_operator.webhook import policies, review

DEADLINE_S: Final = 4.0
"""For one request: the webhook is registered with `timeoutSeconds: 5`, and the way there and back takes some of it."""
BODY_MOST_BYTES: Final = 8 * 1024 * 1024
"""A review holds a pod twice at most, and the API server takes no object above 3 MiB."""
IDLE_S: Final = 120.0
"""How long a connection without a request stays open. The API server closes its own after 90 s, and who closes first has to be the
one who sends: else a request meets a connection that ends."""

_log = logging.getLogger(__name__)
_QUIET: Final = frozenset({Reason.NOT_OPTED_IN, Reason.OPTED_OUT, Reason.MIRROR_POD})
"""Reasons that nobody has to be told of."""


class Server:
    """The handler, and what it decides with."""

    def __init__(self, found: policies.Policies, told: events.Events, settings: Settings) -> None:
        self.settings = settings
        """With what pods are injected from now on; replaced when the certificate's authority changes."""
        self.is_ending = False
        """Whether connections are closed with their next answer, so that the API server finds another replica."""
        self._policies = found
        self._events = told

    def application(self) -> web.Application:
        """To be served."""
        application = web.Application(client_max_size=BODY_MOST_BYTES)
        application.router.add_post("/mutate", self._mutate)
        return application

    async def _mutate(self, request: web.Request) -> web.Response:
        begun_s = time.monotonic()
        with metrics.ADMISSION_IN_FLIGHT.track_inprogress():
            try:
                question = review.read(await request.read())
            except web.HTTPRequestEntityTooLarge:
                metrics.ADMISSION_BAD_REQUESTS.labels("413").inc()
                raise
            except review.BadReview as err:
                metrics.ADMISSION_BAD_REQUESTS.labels("400").inc()
                return self._respond(str(err).encode(), status=400, content_type="text/plain")
            decision = await self.decision(question) if question.pod is not None else None
            body = review.answer(question, decision)
        elapsed_s = time.monotonic() - begun_s
        metrics.ADMISSION_DURATION.observe(elapsed_s)
        if decision is not None:
            self._tell(question, decision, elapsed_s)
        return self._respond(body, status=200, content_type="application/json")

    def _respond(self, body: bytes, *, status: int, content_type: str) -> web.Response:
        response = web.Response(body=body, status=status, content_type=content_type)
        if self.is_ending:
            response.force_close()
        return response

    async def decision(self, question: review.Question) -> decide.Decision:
        """The decision about a pod, whatever happens. Blocks: up to `DEADLINE_S`."""
        pod, found = question.pod or {}, None
        try:
            async with asyncio.timeout(DEADLINE_S):
                # The name is judged before it becomes a part of a path.
                wishes, _ = annotations.parse(pods.metadata_map(pod, "annotations"))
                if wishes.policy and wishes.inject:
                    found = await self._policies.find(question.namespace, wishes.policy)
            shape.require(pod)
            return decide.inject(pod, found, self.settings)
        except policies.LookupFailed as err:
            return self._failed(found, str(err))
        except TimeoutError:
            return self._failed(found, f"it took longer than {DEADLINE_S:.0f} s")
        except Exception as err:
            # The boundary of the process: what is wrong with us must not decide about a pod, but the policy.
            _log.exception("injection failed", extra={Field.NAMESPACE: question.namespace})
            return self._failed(found, f"{type(err).__name__}: {err}")

    def _failed(self, found: checkpoint_policy.CheckpointPolicy | None, why: str) -> decide.Decision:
        failure_policy = (found.failure_policy if found else None) or self.settings.failure_policy
        refuse = decide.Deny if failure_policy is policy.FailurePolicy.FAIL else decide.Skip
        return refuse(reason=Reason.INTERNAL_ERROR, details=(why,))

    def _tell(self, question: review.Question, decision: decide.Decision, elapsed_s: float) -> None:
        """The same decision in metric, log and event."""
        kind = review.name(decision)
        metrics.ADMISSION_REQUESTS.labels(kind, decision.reason.value).inc()
        is_quiet = decision.reason in _QUIET
        about = review.about(question)
        message = decide.message(decision)
        _log.log(
            logging.DEBUG if is_quiet else logging.INFO,
            message,
            extra={
                Field.DECISION: kind,
                Field.REASON: decision.reason.value,
                Field.NAMESPACE: question.namespace,
                Field.OWNER: f"{about['kind']}/{about['name']}",
                Field.ELAPSED: round(elapsed_s, 4),
            },
        )
        # A dry run leaves nothing behind, and the webhook is registered without side effects for it.
        if is_quiet or question.is_dry_run:
            return
        if isinstance(decision, decide.Inject):
            message += f" (policy {decision.status.policy}, job {decision.status.job_id})"
        self._events.post(about, decision.reason.value, message, warning=not isinstance(decision, decide.Inject))
