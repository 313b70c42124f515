"""
The whole of: whether the arena holds all that the trainers will stage. Pure.

Called from: `supervisor.staging`, with the first word of each rank about the size of its state: ahead of the first save, or with it. A save fits as long
as one slot is free and small enough, so that an arena of half the size loses the second save and not the first.
"""

from __future__ import annotations

from collections.abc import Mapping


def too_small(rooms: Mapping[int, int], *, num_ranks: int, slots: int, bounds: Mapping[str, int]) -> str:
    """
    Why the arena is too small; empty: it is not.

    Args:
        rooms: rank -> bytes of a slot that holds its state. A rank that has not said so counts as the largest one that has.
        num_ranks: of the pod.
        slots: of each rank.
        bounds: what the arena may take together, in bytes, by what says so.
    """
    if not rooms or not bounds:
        return ""
    needed = slots * (sum(rooms.values()) + (num_ranks - len(rooms)) * max(rooms.values()))
    tightest = min(bounds, key=lambda name: bounds[name])
    if needed <= bounds[tightest]:
        return ""
    return (
        f"the state needs {needed} bytes of arena (staging.slots: {slots}, ranks in this pod: {num_ranks}), and {tightest} allows"
        f" {bounds[tightest]}: saves will fail"
    )
