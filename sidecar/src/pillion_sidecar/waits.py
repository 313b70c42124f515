"""
The executor's waits, and their kinds. The watchdog names the kind, and the supervisor decides by it what a too long wait means.
"""

from dataclasses import dataclass
from enum import StrEnum


class WaitKind(StrEnum):
    """Kind of a wait of the executor."""

    STORAGE = "storage"
    """The executor waits for a call of the file system."""
    PEERS = "peers"
    """The executor waits for other pods, or for the job's store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A wait that the executor is in."""

    kind: WaitKind
    what: str
    """What the executor waits for, as a text for people."""
    for_s: float
    """How long the wait has lasted without progress."""
    bound_s: float
    """Timeout of the wait. Then the executor is replaced; see `executor.exchange.watchdog`."""
