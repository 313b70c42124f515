"""
The plan: which rank writes which items, made from the layouts of all ranks. Pure; no torch, no store.

Called from: the executor of the coordinator, once for each new set of layouts. One of the ranks that have a replica (equal FQN, offsets and
sizes) writes it. These ranks divide their replicas by bytes, in contiguous stretches, so that each rank writes few long runs. The lowest rank
that has an opaque leaf writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pillion.wire import layout

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of indices, ascending."""


class PlanError(ValueError):
    """The ranks' layouts contradict each other. `ranks` are the ranks concerned."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Plan:
    """The items and opaque leaves that each rank writes."""

    plan_id: str
    """Id of the plan. The same layouts on the same ranks have the same id, and need no new plan."""
    items: Mapping[int, Ranges]
    """Rank -> ranges of item indexes in its layout."""
    opaque: Mapping[int, Ranges]
    """Rank -> ranges of indexes of opaque leaves in its layout."""

    def to_document(self) -> dict[str, Any]:
        return {
            "plan_id": self.plan_id,
            "items": {str(rank): ranges for rank, ranges in self.items.items()},
            "opaque": {str(rank): ranges for rank, ranges in self.opaque.items()},
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Plan:
        def read(part: Mapping[str, Any]) -> dict[int, Ranges]:
            return {int(rank): tuple((int(a), int(b)) for a, b in ranges) for rank, ranges in part.items()}

        return cls(str(document["plan_id"]), read(document["items"]), read(document["opaque"]))


def plan_id(digests: Mapping[int, str]) -> str:
    """Return the id of the plan for these layouts (rank -> layout digest)."""
    return hashlib.blake2b(json.dumps(sorted(digests.items())).encode(), digest_size=16).hexdigest()


def make_plan(layouts: Mapping[int, layout.Layout]) -> Plan:
    """
    Plan a save of these layouts.

    Raises:
        PlanError: two ranks disagree on a tensor, or its chunks do not tile it.
    """
    _validate(layouts)
    holders: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for rank in sorted(layouts):
        for index, item in enumerate(layouts[rank].items):
            holders.setdefault(item.key, []).append((rank, index))
    chosen: dict[int, list[int]] = {rank: [] for rank in layouts}
    groups: dict[tuple[int, ...], list[list[tuple[int, int]]]] = {}
    for held in holders.values():
        groups.setdefault(tuple(rank for rank, _ in held), []).append(held)
    load = dict.fromkeys(layouts, 0)
    # Chunks that only one rank has come first, so that their bytes count when the replicas are divided.
    for ranks, members in sorted(groups.items(), key=lambda group: len(group[0])):
        _share(ranks, members, layouts, load, chosen)
    opaque: dict[int, list[int]] = {rank: [] for rank in layouts}
    seen: set[str] = set()
    for rank in sorted(layouts):
        for index, fqn in enumerate(layouts[rank].opaque):
            if fqn not in seen:
                seen.add(fqn)
                opaque[rank].append(index)
    return Plan(
        plan_id({rank: rank_layout.digest for rank, rank_layout in layouts.items()}),
        {rank: as_ranges(sorted(indices)) for rank, indices in chosen.items()},
        {rank: as_ranges(indices) for rank, indices in opaque.items()},
    )


def _share(
    ranks: tuple[int, ...],
    members: list[list[tuple[int, int]]],
    layouts: Mapping[int, layout.Layout],
    load: dict[int, int],
    chosen: dict[int, list[int]],
) -> None:
    """Give each holder a contiguous stretch of the group's members, so that all end with about equal bytes."""
    sizes = [layouts[held[0][0]].items[held[0][1]].payload_bytes + layout.HEAD_BYTES for held in members]
    order = sorted(set(ranks), key=lambda rank: (load[rank], rank))
    left = sum(sizes)
    cursor = 0
    for position, rank in enumerate(order):
        remaining = order[position:]
        target = (left + sum(load[r] for r in remaining)) / len(remaining) - load[rank]
        taken = 0
        last = position == len(order) - 1
        while cursor < len(members) and (last or taken + sizes[cursor] / 2 <= target):
            index = next(i for r, i in members[cursor] if r == rank)
            chosen[rank].append(index)
            taken += sizes[cursor]
            cursor += 1
        load[rank] += taken
        left -= taken


def as_ranges(indices: Sequence[int]) -> Ranges:
    """Return ascending indexes as half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return tuple(ranges)


def _validate(layouts: Mapping[int, layout.Layout]) -> None:
    first: dict[str, tuple[int, layout.Item]] = {}
    volume: dict[str, int] = {}
    seen: set[tuple[Any, ...]] = set()
    opaque_at: dict[str, int] = {}
    for rank in sorted(layouts):
        for fqn in layouts[rank].opaque:
            opaque_at.setdefault(fqn, rank)
        for item in layouts[rank].items:
            known_rank, first_item = first.setdefault(item.fqn, (rank, item))
            if (first_item.dtype, first_item.size) != (item.dtype, item.size):
                raise PlanError(
                    f"{item.fqn!r} is {first_item.dtype}{list(first_item.size)} on rank {known_rank} and"
                    f" {item.dtype}{list(item.size)} on rank {rank}",
                    [known_rank, rank],
                )
            if item.key not in seen:
                seen.add(item.key)
                volume[item.fqn] = volume.get(item.fqn, 0) + math.prod(item.sizes)
    for fqn, (rank, item) in first.items():
        if fqn in opaque_at:
            raise PlanError(f"{fqn!r} is a tensor on rank {rank} and no tensor on rank {opaque_at[fqn]}", [rank])
        if volume[fqn] != math.prod(item.size):
            raise PlanError(
                f"the chunks of {fqn!r} hold {volume[fqn]} elements of {math.prod(item.size)}: "
                + ("a rank did not save its chunk" if volume[fqn] < math.prod(item.size) else "chunks overlap"),
                [rank],
            )
