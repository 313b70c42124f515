"""
The whole of: what the supervisor asks the executor to load, or only to look for.

Producer: `supervisor.loader`. Consumer: `executor.load.restore`, `executor.load.choose`, `executor.load.snapshot`, `executor.load.fill`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pillion.wire import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one local rank wants filled."""

    rank: int
    layout: layout.Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the supervisor asks for."""

    step: int | None
    wanted: tuple[Wanted, ...]
    arena: Mapping[int, int]
    """step -> slot that every local rank has sealed."""
    orders: Mapping[int, tuple[int, int]]
    """step -> (generation, epoch) in which it was sealed; see `commit.Order`."""
    strangers: tuple[tuple[int, int, tuple[int, int]], ...]
    """Snapshots of another world that were found in the arena: step, number of ranks, order."""
    spare_slot: int
    """A slot that may be filled; NO_SLOT: one is taken once the pods have agreed on what to fill it with."""
    near: Mapping[int, int] = field(default_factory=dict)
    """rank -> process of its trainer, which memory for it is to be near to."""
    strict: bool = True
    """What the checkpoint does not have is an error; else it is left as it is, and named."""
    find: bool = False
    """Only choose: read nothing, fill nothing."""
    path: str | None = None
    """The checkpoint in this directory, and no other; None: one of the root or of memory."""

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Request:
        return cls(
            step=document.get("step"),
            wanted=tuple(
                Wanted(rank=int(rank), layout=layout.decode(str(encoded).encode()))
                for rank, encoded in sorted(document["layouts"].items(), key=lambda entry: int(entry[0]))
            ),
            arena={int(step): int(slot) for step, slot in document["arena"].items()},
            orders={int(step): (int(order[0]), int(order[1])) for step, order in document["orders"].items()},
            strangers=tuple(
                (int(step), int(ranks), (int(order[0]), int(order[1]))) for step, ranks, order in document["strangers"]
            ),
            spare_slot=int(document["spare_slot"]),
            near={int(rank): int(pid) for rank, pid in document["near"].items()},
            strict=bool(document["strict"]),
            find=bool(document["find"]),
            path=document.get("path"),
        )
