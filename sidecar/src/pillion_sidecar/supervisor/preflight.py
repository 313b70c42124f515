"""
Checks whether the arena is large enough for the state that the trainers will stage. Pure.

Called from: `supervisor.staging`, when a rank first requests room for its state, before or at its first save. Without the check, an arena of
half the needed size would show only at the second save, because the first slot still fits.
"""

from __future__ import annotations

from collections.abc import Mapping


def too_small(rooms: Mapping[int, int], *, num_ranks: int, slots: int, bounds: Mapping[str, int]) -> str:
    """
    Return why the arena is too small. Empty if it is large enough.

    Args:
        rooms: rank -> bytes of a slot for its state. A missing rank counts as much as the largest one.
        num_ranks: number of ranks in the pod.
        slots: number of slots of each rank.
        bounds: origin of a limit (a field, a file system) -> maximum bytes of the whole arena.
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
