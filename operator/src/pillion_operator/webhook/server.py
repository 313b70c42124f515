"""
The whole of: answering the API server: one POST, one AdmissionReview.

Called from: `app`. On an internal error the pod's policy decides about the pod, or the operator's setting where no policy is known.
Must never: leave a request without an answer within `DEADLINE_S`, after which the API server would give up; trust a
review as the API server's: every client that reaches the port can send one, so that it costs a bounded amount, and leaves no
Event that was not verified.

    POST /mutate     an AdmissionReview of a pod that is to be created; 200 with the answer
                     400: no AdmissionReview; 403: not the API server's certificate, where one is required
                     408, 413, 503: the body is too slow, too long, or one of too many
"""

import asyncio
import logging
import time
from typing import Final

from aiohttp import web

from pillion.wire import policy
from pillion_operator import metrics
from pillion_operator.bodies import Bodies, Unread
from pillion_operator.injection import annotations, checkpoint_policy, decide, pods, shape
from pillion_operator.injection.reasons import Reason
from pillion_operator.log import Field
from pillion_operator.settings import Settings
from pillion_operator.webhook import callers, policies, refusals, review

DEADLINE_S: Final = 4.0
"""Timeout for one request. The webhook is registered with `timeoutSeconds: 5`, and the network takes some of it."""
BODY_S: Final = 2.0
"""Timeout for the body, which the API server sends in milliseconds; `policies.LOOKUP_S` is the other half of the deadline."""
MAX_BODY_BYTES: Final = 3 * 1024 * 1024
"""
Maximum length of a body. A review holds the new pod once; the API server accepts no object above 3 MiB, and etcd none above 1.5
MiB.
"""
MAX_BODIES_BYTES: Final = 4 * 1024 * 1024
"""
Maximum bytes of all bodies at one time, from the first byte to the answer. Parsed JSON takes up to 36 times its length: with the
process's own memory, 144 MiB fit into the 256 MiB of its pod. 200 pods at one time, as many as an API server sends, are 2 MiB.
"""
MAX_BODIES: Final = 512
"""Maximum number of requests at one time."""
IDLE_S: Final = 120.0
"""
Maximum idle time of a connection. The API server closes its own after 90 s. The client must close first, or a request could meet
a closing connection.
"""

_log = logging.getLogger(__name__)
_QUIET: Final = frozenset({Reason.NOT_OPTED_IN, Reason.OPTED_OUT, Reason.MIRROR_POD})
"""Reasons that cause neither an event nor a log line at the level INFO."""


class Server:
    """The HTTP handler of reviews."""

    def __init__(self, cache: policies.Policies, queue: refusals.Refusals, settings: Settings) -> None:
        """
        Args:
            cache: the policies of the cluster.
            queue: posts Events about refused pods on their owners.
            settings: see there.
        """
        self.settings = settings
        """Settings for the next injection; replaced when the certificate's authority changes."""
        self.is_ending = False
        """Whether connections are closed with their next answer, so that the API server finds another replica."""
        self._policies = cache
        self._refusals = queue
        self._bodies = Bodies(longest=MAX_BODY_BYTES, most_bytes=MAX_BODIES_BYTES, most=MAX_BODIES, within_s=BODY_S)

    def application(self) -> web.Application:
        """The application to serve."""
        application = web.Application()
        application.router.add_post("/mutate", self._mutate)
        return application

    async def _mutate(self, request: web.Request) -> web.Response:
        begun_s = time.monotonic()
        if self.settings.webhook_client_ca and not self._is_api_server(request):
            return self._refuse(403, "the certificate is not the API server's")
        with metrics.ADMISSION_IN_FLIGHT.track_inprogress():
            try:
                async with self._bodies.read(request) as body:
                    read_s = time.monotonic()
                    question = review.read(body)
                    until_s = asyncio.get_running_loop().time() + DEADLINE_S - (read_s - begun_s)
                    decision = await self.decision(question, until_s) if question.pod is not None else None
                    answer = review.answer(question, decision)
            except Unread as err:
                return self._refuse(err.status, str(err))
            except review.BadReview as err:
                return self._refuse(400, str(err))
        elapsed_s = time.monotonic() - read_s
        metrics.ADMISSION_DURATION.observe(elapsed_s)
        if decision is not None:
            self._tell(question, decision, elapsed_s)
        return self._respond(answer, status=200, content_type="application/json")

    def _is_api_server(self, request: web.Request) -> bool:
        certificate = request.transport.get_extra_info("peercert") if request.transport is not None else None
        return callers.may_ask(certificate, self.settings.webhook_client_names)

    def _refuse(self, status: int, why: str) -> web.Response:
        metrics.ADMISSION_BAD_REQUESTS.labels(str(status)).inc()
        response = self._respond(f"{why}\n".encode(), status=status, content_type="text/plain")
        # The rest of its body is unread, so no further request can follow on the connection.
        response.force_close()
        return response

    def _respond(self, body: bytes, *, status: int, content_type: str) -> web.Response:
        response = web.Response(body=body, status=status, content_type=content_type)
        if self.is_ending:
            response.force_close()
        return response

    async def decision(self, question: review.Question, until_s: float) -> decide.Decision:
        """
        The decision about a pod, whatever happens. Blocks: until `until_s`, by the loop's clock.
        """
        pod, policy_object = question.pod or {}, None
        try:
            async with asyncio.timeout_at(until_s):
                # The name is validated before it becomes part of a path.
                parsed = annotations.parse(pods.metadata_map(pod, "annotations"))
                if parsed.annotations.policy and parsed.annotations.inject:
                    policy_object = await self._policies.find(question.namespace, parsed.annotations.policy)
            shape.require(pod)
            return decide.inject(pod, policy_object, self.settings, parsed=parsed, namespace=question.namespace)
        except policies.LookupFailed as err:
            return self._failed(policy_object, str(err))
        except TimeoutError:
            return self._failed(policy_object, f"it took longer than {DEADLINE_S:.0f} s")
        except Exception as err:
            # The boundary of the process: the policy, and not an internal error, decides about a pod.
            _log.exception("injection failed", extra={Field.NAMESPACE: question.namespace})
            return self._failed(policy_object, f"{type(err).__name__}: {err}")

    def _failed(self, policy_object: checkpoint_policy.CheckpointPolicy | None, why: str) -> decide.Decision:
        failure_policy = (policy_object.failure_policy if policy_object else None) or self.settings.failure_policy
        refuse = decide.Deny if failure_policy is policy.FailurePolicy.FAIL else decide.Skip
        return refuse(reason=Reason.INTERNAL_ERROR, details=(why,))

    def _tell(self, question: review.Question, decision: decide.Decision, elapsed_s: float) -> None:
        """Report a decision in metric, log and event alike."""
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
        # A dry run leaves nothing behind, and the webhook is registered without side effects for it. The Event of an injection is
        # the controller's, once the pod exists.
        if is_quiet or question.is_dry_run or isinstance(decision, decide.Inject):
            return
        self._refusals.post(about, decision.reason.value, message)
