"""
The whole of: the pod that a token belongs to, verified by the API server once a minute for each token.

Called from: the server, for each report, before its body is read.
Must never: log or keep a token (its digest stands for it); trust the unverified claims of a token, which only save a review when they
lead to a refusal; let clients without a good token displace clients with one.

A token names its pod. A token that names no injected pod is refused without a review; another costs one review, at most two at
one time for each pod. So a stranger, who knows no injected pod's UID, causes no review and displaces no remembered token.
Source: Kubernetes documentation, "Managing Service Accounts", bound tokens; API reference, TokenReview.
"""

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from pillion_operator.cluster import client, paths
from pillion_operator.home.refusal import Refused, Result

Json = dict[str, Any]
T = TypeVar("T")

KNOWN_S: Final = 60.0
"""
Time for which a verified token is accepted, and for which a deleted pod can still report. Never longer than the token's own life.
"""
REFUSED_S: Final = 10.0
"""Time for which a refusal is remembered: a pod that repeats a bad token every few seconds costs one review in ten seconds."""
MAX_REMEMBERED: Final = 4096
"""Maximum number of verified tokens that are remembered: one a job, renewed each hour, for several thousand jobs."""
MAX_REFUSALS: Final = 1024
"""Maximum number of refusals that are remembered. They are kept apart from verified tokens, because anybody can cause them."""
ASKED_AT_ONCE: Final = 8
"""
Maximum number of token reviews at one time. After a restart all jobs report at once, and each review takes the API server
milliseconds.
"""
MAX_WAITING: Final = 512
"""Maximum number of tokens that wait for a review. Further ones are refused with a retry."""
ASKED_FOR_A_POD: Final = 2
"""Maximum number of reviews at one time for one pod: its token, and the successor of that token."""
MAX_TOKEN: Final = 8192
"""Maximum characters of a token; a service account token has about a thousand."""
SAID_AGAIN_S: Final = 30.0
"""Minimum time between two log lines about an API server that does not answer."""
_POD_NAME: Final = "authentication.kubernetes.io/pod-name"
_POD_UID: Final = "authentication.kubernetes.io/pod-uid"
_USER: Final = "system:serviceaccount"
_BOUND_TO: Final = "kubernetes.io"
"""The claim of a service account's token that names its namespace and pod."""
_BOUND_TO_NO_POD: Final = "the token is bound to no pod: a projected volume makes one that is"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The pod that a token was made for."""

    namespace: str
    pod: str
    pod_uid: str
    service_account: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claims:
    """The unverified claims of a token."""

    end_s: float
    """When it ends, in seconds since 1970."""
    namespace: str
    pod: str
    pod_uid: str


class Api(Protocol):
    """The used part of `cluster.client.Client`."""

    async def create(self, path: str, body: Json) -> Json: ...


class Pods(Protocol):
    """The used part of `injected.Pods`."""

    async def find(self, namespace: str, name: str, uid: str) -> object | None: ...


class Authenticator:
    """Tokens to pods."""

    def __init__(self, api: Api, audience: str, pods: Pods, *, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            api: access to the API server.
            audience: what the tokens have to be made for.
            pods: the injected ones.
            clock: seconds since 1970: a token's end is such a time.
        """
        self._api = api
        self._audience = audience
        self._clock = clock
        self._pods = pods
        self._identities: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[float, Refused]] = OrderedDict()
        self._asking_for: Counter[str] = Counter()
        """Questions under way, by the UID of the pod that the token names."""
        self._asking: dict[bytes, asyncio.Task[Identity]] = {}
        self._slots = asyncio.Semaphore(ASKED_AT_ONCE)
        self._said_s = -SAID_AGAIN_S

    async def authenticate(self, authorization: str) -> Identity:
        """
        Verify a token.

        Args:
            authorization: the header.

        Raises:
            Refused: 401, 403, or 503 when the API server does not answer.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Refused(
                Result.UNAUTHENTICATED, "the header 'Authorization: Bearer <service account token>' is required"
            )
        now_s = self._clock()
        claims = self._claims(token, now_s)
        digest = hashlib.sha256(token.encode()).digest()
        until_s, identity = self._identities.get(digest, (0.0, None))
        if identity is not None and now_s < until_s:
            self._identities.move_to_end(digest)
            return identity
        until_s, refused = self._refused.get(digest, (0.0, None))
        if refused is not None and now_s < until_s:
            raise Refused(refused.result, str(refused))
        if await self._pods.find(claims.namespace, claims.pod, claims.pod_uid) is None:
            raise Refused(Result.FORBIDDEN, "the token belongs to a pod that was not injected or no longer exists")
        asking = self._asking.get(digest)
        if asking is None:
            if len(self._asking) >= MAX_WAITING or self._asking_for[claims.pod_uid] >= ASKED_FOR_A_POD:
                raise Refused(Result.BUSY, "too many new tokens wait for verification; try again")
            asking = asyncio.create_task(self._ask(token, digest, claims.end_s), name="token review")
            self._asking[digest] = asking
            self._asking_for[claims.pod_uid] += 1
            asking.add_done_callback(lambda done: self._forget_request(digest, claims.pod_uid, done))
        # The first caller may be cancelled; the others still need the answer.
        return await asyncio.shield(asking)

    def _claims(self, token: str, now_s: float) -> _Claims:
        """The claims of the token, after the refusals that need no API server."""
        if len(token) > MAX_TOKEN:
            raise Refused(Result.UNAUTHENTICATED, f"the token is longer than {MAX_TOKEN} characters")
        try:
            payload = token.split(".")[1]
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
            audiences = claims["aud"]
            audiences = [audiences] if isinstance(audiences, str) else [str(each) for each in audiences]
            end_s = float(claims["exp"])
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as err:
            raise Refused(Result.UNAUTHENTICATED, "the bearer token is not a service account token") from err
        if self._audience not in audiences:
            raise Refused(
                Result.UNAUTHENTICATED, f"the token is for another audience; allowed: the audience {self._audience}"
            )
        # NaN is in no order with anything.
        if not end_s > now_s:
            raise Refused(Result.UNAUTHENTICATED, "the token has expired")
        try:
            bound = claims[_BOUND_TO]
            holder = bound["namespace"], bound["pod"]["name"], bound["pod"]["uid"]
            if not all(isinstance(each, str) and each for each in holder):
                raise TypeError
        except (KeyError, TypeError) as err:
            raise Refused(Result.FORBIDDEN, _BOUND_TO_NO_POD) from err
        namespace, pod, uid = holder
        return _Claims(end_s=end_s, namespace=namespace, pod=pod, pod_uid=uid)

    def _forget_request(self, digest: bytes, pod_uid: str, done: asyncio.Task[Identity]) -> None:
        self._asking.pop(digest, None)
        self._asking_for[pod_uid] -= 1
        if not self._asking_for[pod_uid]:
            del self._asking_for[pod_uid]
        # Retrieved even if nobody waits any more, as asyncio would log an error otherwise.
        if not done.cancelled():
            done.exception()

    async def _ask(self, token: str, digest: bytes, end_s: float) -> Identity:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self._audience]},
        }
        try:
            async with self._slots:
                answer = await self._api.create(paths.TOKEN_REVIEWS.everywhere, body)
        except (client.ApiError, client.Unreachable) as err:
            if time.monotonic() - self._said_s >= SAID_AGAIN_S:
                self._said_s = time.monotonic()
                _log.warning("cannot verify tokens of sidecars: %s", err)
            raise Refused(Result.UNAVAILABLE, "the token cannot be verified now; try again") from err
        now_s = self._clock()
        verdict = judge(answer.get("status") or {}, self._audience)
        if isinstance(verdict, Refused):
            _remember(self._refused, digest, (min(now_s + REFUSED_S, end_s), verdict), MAX_REFUSALS)
            raise verdict
        _remember(self._identities, digest, (min(now_s + KNOWN_S, end_s), verdict), MAX_REMEMBERED)
        return verdict


def _remember(answers: OrderedDict[bytes, T], digest: bytes, answer: T, most: int) -> None:
    answers[digest] = answer
    answers.move_to_end(digest)
    while len(answers) > most:
        answers.popitem(last=False)


def judge(review: Json, audience: str) -> Identity | Refused:
    """The identity in the status of a TokenReview, or the refusal."""
    if review.get("authenticated") is not True:
        return Refused(Result.UNAUTHENTICATED, "the API server rejects the token, or its pod no longer exists")
    # An API server without audiences leaves them out, and has then not checked this one.
    if audience not in (review.get("audiences") or []):
        return Refused(Result.UNAUTHENTICATED, f"the token is for another audience; allowed: the audience {audience}")
    user = review.get("user") or {}
    extra = user.get("extra") or {}
    parts = str(user.get("username") or "").split(":")
    pod, uid = ((extra.get(name) or [""])[0] for name in (_POD_NAME, _POD_UID))
    if ":".join(parts[:2]) != _USER or len(parts) != 4:
        return Refused(Result.FORBIDDEN, "the token is not of a service account")
    if not pod or not uid:
        return Refused(Result.FORBIDDEN, _BOUND_TO_NO_POD)
    return Identity(namespace=parts[2], pod=str(pod), pod_uid=str(uid), service_account=parts[3])
