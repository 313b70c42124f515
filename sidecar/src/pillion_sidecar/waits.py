"""
What a wait of the executor is for: the watchdog says it, and so do those who judge a wait that is too long.
"""

from enum import StrEnum


class WaitKind(StrEnum):
    """What the executor waits for when it reports that it stands still."""

    STORAGE = "storage"
    """A call of the file system."""
    PEERS = "peers"
    """Other pods, or the job's store."""
