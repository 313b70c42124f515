"""
The request for a load, as the executor works on it: the message `channel.Load`, with its layouts decoded.

Producer: `executor.worker`. Consumer: `executor.load.restore`, `executor.load.choose`, `executor.load.snapshot`, `executor.load.fill`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pillion.wire import layout
from pillion_sidecar import channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The layout of the state dict that one local rank wants filled."""

    rank: int
    layout: layout.Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """See the module."""

    step: int | None
    wanted: tuple[Wanted, ...]
    arena: Mapping[int, int]
    """step -> slot that every local rank has sealed."""
    orders: Mapping[int, tuple[int, int]]
    """step -> (generation, epoch) in which it was sealed; see `commit.Order`."""
    strangers: tuple[channel.Stranger, ...]
    """Snapshots of another world that are in the arena."""
    spare_slot: int
    """Slot that may be filled; NO_SLOT: a slot is taken when the pods have agreed on the checkpoint."""
    near: Mapping[int, int] = field(default_factory=dict)
    """rank -> process id of its trainer. Memory for the rank is allocated near that process."""
    strict: bool = True
    """True: a name that the checkpoint lacks is an error. False: the tensor keeps its value, and the name is reported."""
    find: bool = False
    """Only choose a checkpoint. Read nothing, fill nothing."""
    path: str | None = None
    """Directory of the only checkpoint that counts; None: any checkpoint of the root or of memory."""
    below: bool = False
    """True: `path` may be the root of a run. Then the checkpoints below it count."""
    whole: bool = False
    """True: the wanted layouts have whole tensors, and nothing but the slot changes by the load."""
    prefixes: tuple[str, ...] = ()
    """With `find` and `whole`: the dotted names whose content is wanted. Empty: all."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Checkpoints that an earlier read of the same call has found corrupt."""

    @classmethod
    def from_message(cls, message: channel.Load) -> Request:
        """
        Return the request that a message asks for.

        Raises:
            ValueError: a layout cannot be read.
        """
        return cls(
            step=message.step,
            wanted=tuple(
                Wanted(rank=rank, layout=layout.decode(encoded.encode()))
                for rank, encoded in sorted(message.layouts.items())
            ),
            arena=message.arena,
            orders=message.orders,
            strangers=message.strangers,
            spare_slot=message.spare_slot,
            near=message.near,
            strict=message.strict,
            find=message.find,
            path=message.path,
            below=message.below,
            whole=message.whole,
            prefixes=message.prefixes,
            refused=message.refused,
        )
