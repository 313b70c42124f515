"""
The whole of: what the trainers of a session do, as its root is told.

Called from: the supervisor (says it), `checkpoint.ownership` (writes and judges it), `channel` (carries it).
"""

from enum import StrEnum


class State(StrEnum):
    """What a session is in."""

    TRAINING = "training"
    DRAINING = "draining"
    """Without trainers, and something of theirs is on its way to storage."""
    LEFT = "left"
