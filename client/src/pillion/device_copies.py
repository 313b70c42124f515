"""
Copies between devices and the arena, beside the trainer's streams: on a separate stream for each device.

Called from: `pillion.staging`, with no torch mode on. Must never: return while a copy runs, as the caller then seals the slot or gives it up.
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
    """One item: contiguous host memory, and a tensor on a device."""

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
            copies: the items to copy.
            cuts: see `Cuts`.
            ready: for each device an event that its copies wait for. None: they wait for its current stream.

        Blocks: until the copies are done, on every device.

        Raises:
            host_copies.CopyFailed: torch cannot start a copy.
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
            # After an error as well, because started copies still write. The sources need no record_stream: they live until here.
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
            # Resolved on the device. torch would do it on the host, immediately, while its copy is only queued.
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
    Copy from the host to a device. The device's tensor may have another dtype or memory order.

    Raises:
        host_copies.CopyFailed: torch cannot copy it.
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
    """Yield the parts of a contiguous tensor, cut at offsets in bytes."""
    flat = tensor.view(-1)
    cuts = [offset // tensor.element_size() for offset in offsets]
    for start, end in itertools.pairwise([0, *cuts, flat.numel()]):
        yield flat[start:end]
