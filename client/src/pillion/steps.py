"""
Steps, as a training script gives them. Pure.

Called from: `Checkpointer`.
"""

from __future__ import annotations

import operator
from typing import Final

from pillion.errors import UsageError

MAX_STEP: Final = 2**63 - 1
"""Largest step. The arena stores a step in 64 bits."""


def whole(step: object) -> int:
    """
    Return the step as a Python int. NumPy and torch have integers of their own.

    Raises:
        UsageError: the step is not a whole number, or does not fit into a slot's header.
    """
    try:
        if not isinstance(step, bool) and 0 <= (number := operator.index(step)) <= MAX_STEP:  # type: ignore[arg-type] # tried
            return number
    except TypeError:
        pass
    raise UsageError(f"step must be a whole number from 0 to {MAX_STEP}, not {step!r}")


def wanted(step: object) -> int | None:
    """Return the step that a load names as a Python int, or None. Raises: as `whole`."""
    return None if step is None else whole(step)


def too_old(step: int, newest: int, *, loaded: bool) -> str:
    """Return why a save of this step is refused. `loaded`: the newest step was loaded, not saved."""
    why = (
        f"is older than step {newest}, which was loaded"
        if loaded
        else f"comes after step {newest}: steps must increase"
    )
    return f"step {step} {why}; load() an older step to go back to it"
