"""
The whole of: the faults of an object store, what each answers by, and which request each strikes.

Called from: `fault_proxy`, and the tests that arm them.
Must never: strike what nobody armed.
"""

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from support.object_stores import http1
from support.object_stores.operations import Only, Seen
from support.object_stores.places import Kind


@final
class Fault(enum.Enum):
    """
    What befalls a request. The text says what the store has done, and what the client sees of it.
    """

    SLOW_DOWN = "refused, 503: the store is asked for too much"
    TOO_MANY = "refused, 429: the same word of other stores"
    CONFLICT = "refused, 409: somebody else writes this key at this moment; says nothing about what is there"
    PRECONDITION = "refused, 412: another version is there, whether it is or not"
    EXPIRED = "refused: the token has expired"
    DENIED = "refused, 403: the credentials may not"
    NO_BUCKET = "refused, 404: there is no such bucket"
    FULL = "refused, 507: no space"
    QUOTA = "refused, 403: the quota of the bucket is used up, as Ceph says it"
    FAILED_AFTER = "applied, and answered by 500"
    CUT_BEFORE = "not applied: the connection breaks when the request is there"
    CUT_AFTER = "applied: the connection breaks instead of an answer"
    HANG = "not applied: no answer until released; then it goes its way, also where the client has given up"
    HANG_AFTER = "applied: no answer until released"
    STALL_UPLOAD = "not applied: half of the body is read, then nothing more until released, when the connection breaks"
    STALL_DOWNLOAD = "half of the body is sent, the rest when released"
    TRUNCATE = "half of the body is sent, then the connection breaks"
    FLIP = "one bit of the body is another one"
    LATE = "the request waits before it goes its way"
    UNCONDITIONAL = "the condition is taken off: a store that knows none"


_Refusals = dict[Fault, tuple[int, str]]

_REFUSALS: Final[_Refusals] = {
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.TOO_MANY: (429, "TooManyRequests"),
    Fault.CONFLICT: (409, "ConditionalRequestConflict"),
    Fault.PRECONDITION: (412, "PreconditionFailed"),
    # S3 says it by 400, as its list of error codes has it.
    Fault.EXPIRED: (400, "ExpiredToken"),
    Fault.DENIED: (403, "AccessDenied"),
    Fault.NO_BUCKET: (404, "NoSuchBucket"),
    Fault.FULL: (507, "InsufficientStorage"),
    Fault.QUOTA: (403, "QuotaExceeded"),
    Fault.FAILED_AFTER: (500, "InternalError"),
}
_REFUSALS_APART: Final[dict[Kind, _Refusals]] = {
    "s3": {},
    "gcs": {Fault.EXPIRED: (401, "AuthenticationRequired"), Fault.CONFLICT: (409, "Conflict")},
    "azure": {
        Fault.SLOW_DOWN: (503, "ServerBusy"),
        Fault.CONFLICT: (409, "PendingCopyOperation"),
        Fault.PRECONDITION: (412, "ConditionNotMet"),
        Fault.EXPIRED: (403, "AuthenticationFailed"),
        Fault.DENIED: (403, "AuthorizationPermissionMismatch"),
        Fault.NO_BUCKET: (404, "ContainerNotFound"),
    },
}
"""Answers of a kind of store that differ from those of S3."""
_ONLY_CONDITIONAL: Final = frozenset({Fault.CONFLICT, Fault.PRECONDITION, Fault.UNCONDITIONAL})
"""No store answers so to a request without a condition, so these strike none."""


def refusal(kind: Kind, fault: Fault) -> http1.Answer | None:
    """
    What a store of that kind answers by; None: the fault is no answer.
    """
    said = _REFUSALS_APART[kind].get(fault) or _REFUSALS.get(fault)
    if said is None:
        return None
    status, code = said
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>a test</Message></Error>'
    headers = [("Content-Type", "application/xml")]
    if kind == "azure":
        headers.append(("x-ms-error-code", code))
    return http1.Answer(status=status, headers=headers, body=body.encode())


@final
@dataclass(kw_only=True, slots=True)
class Armed:
    """
    Faults that wait for their requests. `struck` has those that they met.
    """

    faults: Sequence[Fault]
    """One of them at random, or the one that there is."""
    only: Only
    skip: int
    """Requests that are let through first."""
    times: int | None
    """Requests that are struck at most; None: all."""
    rate: float
    """Share of the requests that are struck."""
    rng: random.Random
    delay_s: float
    struck: list[Seen]

    def choose(self, seen: Seen) -> Fault | None:
        """
        The fault that strikes this request; None: none of these. Counts it.
        """
        if not self.only.means(seen) or (self.times is not None and len(self.struck) >= self.times):
            return None
        if self.skip > 0:
            self.skip -= 1
            return None
        fits = [each for each in self.faults if seen.conditional or each not in _ONLY_CONDITIONAL]
        # Drawn in any case, so that a seed gives the same faults whatever the requests are.
        drawn, pick = self.rng.random(), self.rng.random()
        if drawn >= self.rate or not fits:
            return None
        self.struck.append(seen)
        fault = fits[int(pick * len(fits))]
        seen.fault = fault.name
        return fault
