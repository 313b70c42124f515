"""
The quota of a root: which checkpoints go while all of them together have too many bytes, and what to say if those that must stay are too large. Pure.

Called from: `checkpoint.retention`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from pillion.wire.quantities import format_bytes

MAX_NAMED: Final = 5
"""Maximum of checkpoints that a text names."""


def beyond(candidates: Iterable[int], kept: Collection[int], sizes: Mapping[int, int], most_bytes: int) -> set[int]:
    """
    Return the steps that go, so that all kept steps together have at most `most_bytes`.

    Args:
        candidates: those of `kept` that may go, in the order in which they go.
        sizes: step -> bytes. A step without a size counts nothing, and stays.
    """
    total = total_bytes(kept, sizes)
    going: set[int] = set()
    for step in candidates:
        if total <= most_bytes:
            break
        if step in sizes:
            going.add(step)
            total -= sizes[step]
    return going


def total_bytes(steps: Iterable[int], sizes: Mapping[int, int]) -> int:
    return sum(sizes.get(step, 0) for step in steps)


def problem(kept: Collection[int], sizes: Mapping[int, int], why: Mapping[int, str], most_bytes: int | None) -> str:
    """
    Return why the quota is exceeded by what stays; empty: it is not.

    Args:
        why: step -> why it must stay.
    """
    total = total_bytes(kept, sizes)
    if most_bytes is None or total <= most_bytes:
        return ""
    largest = sorted((step for step in kept if step in sizes), key=lambda step: (-sizes[step], step))
    named = [f"step {step} ({format_bytes(sizes[step])}, {why.get(step, 'not removed yet')})" for step in largest]
    more = f", and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return (
        f"retention.maxBytes is {format_bytes(most_bytes)}, and the checkpoints that must stay have {format_bytes(total)}: "
        + ", ".join(named[:MAX_NAMED])
        + more
    )
