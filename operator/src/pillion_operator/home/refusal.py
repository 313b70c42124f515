"""
The whole of: refusals of reports: an HTTP status, a code for the metric, and a sentence.

Called from: everything that looks at a report before it counts.
Must never: repeat a token, or a claim of it that the API server did not verify.
"""

from enum import StrEnum
from typing import Final

RETRY_AFTER_S: Final = 5
"""Time to wait before a retry, for a refusal that is not the caller's fault."""


class Result(StrEnum):
    """Result of a report: the label `result` of pillion_reports_total."""

    ACCEPTED = "accepted"
    STALE = "stale"
    """From an attempt that has a successor. It is answered, and changes nothing."""
    BAD = "bad"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    UNAVAILABLE = "unavailable"
    """The API server did not answer."""
    BUSY = "busy"
    SLOW = "slow"
    """It did not come whole within the deadline."""


_STATUS: Final = {
    Result.BAD: 400,
    Result.UNAUTHENTICATED: 401,
    Result.FORBIDDEN: 403,
    Result.SLOW: 408,
    Result.UNAVAILABLE: 503,
    Result.BUSY: 503,
}


class Refused(Exception):
    """A report is refused."""

    def __init__(self, result: Result, text: str) -> None:
        super().__init__(text)
        self.result = result
        self.status = _STATUS[result]

    @property
    def headers(self) -> dict[str, str]:
        """Additional headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else {}
