"""
Which tensors of a save are copied after it has returned.

Called from: `pillion.habits`. Pure.

A tensor may wait only if nothing but an optimizer's `step()` writes to its memory, because `step()` waits for the copy and nothing else
does. Every byte of it must lie in memory that the optimizer holds. A buffer beside a weight, in one allocation, does not wait.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

SMALL_LEAF_BYTES: Final = 64 * 1024
"""Maximum size of a leaf that is copied to private memory at once. Buffers that a forward pass changes are this small (BatchNorm's
statistics, step counters), and so are most leaves."""
USUAL_MIN_BYTES: Final = 64 * 1024**2
"""Minimum size of what waits, unless the script asks for `overlap=True`. A copy of 64 MiB takes some 5 ms. For less, a second thread and
the sample cost as much as they save, and a sample would have less than 1,000 elements."""
USUAL_MIN_MEAN_BYTES: Final = 512 * 1024
"""Minimum mean size of the state's tensors, unless the script asks for `overlap=True`. The work on each tensor takes as long as a copy of
some 200 KiB."""


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where a tensor lies.

    Attributes:
        fqn: its name in the state.
        num_bytes: its size.
        start: address of its first byte. 0 if its elements do not fill one stretch of memory, or are not read as they lie there.
    """

    fqn: str
    num_bytes: int
    start: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Indexes of the tensors of more than SMALL_LEAF_BYTES. Each is in `late` or in `early`."""

    late: tuple[int, ...]
    """Copied after `save` has returned."""
    early: tuple[int, ...]
    """Copied before."""
    untried: tuple[int, ...] = ()
    """Those of `early` that would wait, if the script was known to leave them alone until the next step."""


class Stretches:
    """
    A union of stretches of memory.

    Args:
        stretches: start and end addresses, bytes, in any order. They may touch and overlap.
    """

    def __init__(self, stretches: Iterable[tuple[int, int]]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(stretches):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(start)
                self._ends.append(end)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of [start, end) is in the union. An empty stretch is not covered."""
        index = bisect.bisect_right(self._starts, start) - 1
        return start < end and index >= 0 and end <= self._ends[index]


def is_small(num_bytes: int) -> bool:
    return num_bytes <= SMALL_LEAF_BYTES


def pays(state_bytes: int, num_tensors: int) -> bool:
    """Whether a state is worth an overlapped save that its script did not ask for."""
    return state_bytes >= USUAL_MIN_BYTES and state_bytes >= USUAL_MIN_MEAN_BYTES * num_tensors


def choose(
    places: Sequence[Place], owned: Stretches, *, changing: Collection[str], tried: Collection[str] | None
) -> Choice:
    """
    Return which tensors are copied late.

    Args:
        places: the tensors of a state.
        owned: the memory that optimizers hold.
        changing: names of tensors that something other than a step has changed.
        tried: names of tensors that a script left alone from one save to the next step. None if the script asked for `overlap=True`: it
            knows that.
    """
    large = [index for index, place in enumerate(places) if not is_small(place.num_bytes)]
    may = [index for index in large if _may_wait(places[index], owned) and places[index].fqn not in changing]
    late = may if tried is None else [index for index in may if places[index].fqn in tried]
    if tried is not None and sum(places[index].num_bytes for index in may) < USUAL_MIN_BYTES:
        return Choice((), tuple(large))
    if tried is not None and sum(places[index].num_bytes for index in late) < USUAL_MIN_BYTES:
        late = []
    early = sorted(set(large).difference(late))
    untried = () if tried is None else tuple(index for index in may if places[index].fqn not in tried)
    return Choice(tuple(late), tuple(early), untried)


def _may_wait(place: Place, owned: Stretches) -> bool:
    return place.start > 0 and owned.covers(place.start, place.start + place.num_bytes)
