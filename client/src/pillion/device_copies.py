"""
Copies between devices and the arena: beside the trainer's streams, on one of their own for each device.

Called from: `pillion.staging`, with no mode on. Must never: return while a copy runs; the slot may be sealed, or given up, behind it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pillion import host_copies

Cuts = Mapping[int, tuple[int, ...]]
"""Index of an item -> offsets in its payload, bytes, that no copy may cross; see `registration.cuts`."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One item, of contiguous memory of the host and a tensor of a device."""

    index: int
    host: torch.Tensor
    device: torch.Tensor


class DeviceCopies:
    """The streams of one mapping. One thread copies at a time."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def take(self, copies: Iterable[Copy], cuts: Cuts, ready: Mapping[torch.device, Any] | None) -> None:
        """
        Copy from devices to the host.

        Args:
            ready: for each device an event that its copies wait for; None: what its current stream has to do so far.

        Blocks: until the copies are done, on every device.

        Raises:
            host_copies.CopyFailed: one cannot be begun.
        """
        by_device: dict[torch.device, list[Copy]] = defaultdict(list)
        for copy in copies:
            by_device[copy.device.device].append(copy)
        begun = []
        try:
            for device, own in by_device.items():
                if device.type != "cuda":
                    for copy in own:
                        _take(copy, cuts.get(copy.index, ()), non_blocking=False)
                    continue
                stream = self._stream(device)
                if ready is None:
                    stream.wait_stream(torch.cuda.current_stream(device))
                else:
                    stream.wait_event(ready[device])
                begun.append(stream)
                with torch.cuda.stream(stream):
                    for copy in own:
                        _take(copy, cuts.get(copy.index, ()), non_blocking=True)
        finally:
            # Behind an error as well: what was begun still writes. The sources need no record_stream, as they are held until here.
            for stream in begun:
                stream.synchronize()

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _take(copy: Copy, offsets: Sequence[int], *, non_blocking: bool) -> None:
    source = copy.device
    try:
        if source.is_conj() or source.is_neg():
            # On the device: torch would do it on the host, at once, beside a copy that it has only queued.
            source = source.resolve_conj().resolve_neg()
        if not offsets:
            copy.host.copy_(source, non_blocking=non_blocking)
            return
        for part, own in zip(_parts(copy.host, offsets), _parts(source.contiguous(), offsets), strict=True):
            part.copy_(own, non_blocking=non_blocking)
    except RuntimeError as err:
        raise host_copies.CopyFailed(copy.index, str(err)) from err


@torch.inference_mode()
def give(copy: Copy, offsets: Sequence[int]) -> None:
    """
    Copy from the host to a device, whose tensor may be of another dtype or order.

    Raises:
        host_copies.CopyFailed: torch cannot.
    """
    host, target = copy.host, copy.device
    if not offsets:
        host_copies.copy_one(target, host, copy.index)
        return
    plain = target.is_contiguous() and target.dtype == host.dtype
    whole = target if plain else torch.empty(host.shape, dtype=host.dtype, device=target.device)
    for part, own in zip(_parts(whole, offsets), _parts(host, offsets), strict=True):
        host_copies.copy_one(part, own, copy.index)
    if whole is not target:
        host_copies.copy_one(target, whole, copy.index)


def _parts(tensor: torch.Tensor, offsets: Sequence[int]) -> Iterator[torch.Tensor]:
    """A contiguous tensor, cut at offsets in bytes."""
    flat = tensor.view(-1)
    cuts = [offset // tensor.element_size() for offset in offsets]
    for start, end in itertools.pairwise([0, *cuts, flat.numel()]):
        yield flat[start:end]
