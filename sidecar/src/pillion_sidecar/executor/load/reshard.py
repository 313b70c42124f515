"""
Resharding: a wanted chunk that was not stored as it is, is assembled from the stored chunks that overlap it.

Called from: `executor.load.fill`, `executor.load.whole`. Imports torch for n-dimensional copies, and for the archives of stock DCP. `torch.load` reads these with
`weights_only=True` (its restricted unpickler).
"""

from __future__ import annotations

import io
from typing import Final

import torch

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import layout, manifest
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.storage import digest, reading

CACHE_BYTES: Final = 256 * 1024**2
"""Maximum bytes of stored chunks that are kept: the next wanted chunk of a tensor often overlaps the same stored chunk."""


def _torch_dtype(name: str, fqn: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise IncompatibleCheckpoint(f"{fqn!r} has dtype {name!r}, which this torch does not know", fqns=[fqn])
    return dtype


class Source:
    """The stored chunks of one checkpoint, with a cache of the last ones that were read."""

    def __init__(self, stored: catalog.Stored) -> None:
        self._stored = stored
        self._cache: dict[tuple[str, int], torch.Tensor] = {}
        self._cached_bytes = 0

    def assemble(self, target: layout.Layout, index: int, memory: memoryview) -> None:
        """
        Write the payload of item `index` of the target layout into the image.

        Raises:
            catalog.Damaged: a stored chunk cannot be read, or does not match its digest; or the chunks leave a hole.
        """
        item = target.items[index]
        if item.payload_bytes == 0:
            return
        out = view(memory, target.payload_starts[index], item)
        covered = 0
        for chunk in self._stored.chunks[item.fqn]:
            if intersect(item.offsets, item.sizes, chunk.offsets, chunk.sizes) is not None:
                covered += paste(out, item, self._chunk(chunk), chunk.offsets)
        if covered < out.numel():
            raise catalog.Damaged(f"{self._stored.folder}: the stored chunks of {item.fqn!r} leave a hole")

    def _chunk(self, chunk: manifest.StoredChunk) -> torch.Tensor:
        key = (chunk.file, chunk.offset)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        folder = self._stored.folder
        path = f"{folder}/{chunk.file}"
        with catalog.damage(path):
            data = reading.retried(path, lambda: folder.read_piece(chunk.file, chunk.offset, chunk.length))
        if chunk.digest and digest.digest(data) != chunk.digest:
            raise catalog.Damaged(f"{path}: {chunk.fqn!r} at offset {chunk.offset} does not match its digest")
        tensor = self._parse(chunk, data, path)
        while self._cache and self._cached_bytes > CACHE_BYTES:
            self._cached_bytes -= self._cache.pop(next(iter(self._cache))).nbytes
        self._cache[key] = tensor
        self._cached_bytes += tensor.nbytes
        return tensor

    def _parse(self, chunk: manifest.StoredChunk, data: bytearray, path: str) -> torch.Tensor:
        dtype = _torch_dtype(chunk.dtype, chunk.fqn)
        if self._stored.native:
            num_bytes = torch.Size(chunk.sizes).numel() * dtype.itemsize
            if num_bytes == 0:
                return torch.empty(chunk.sizes, dtype=dtype)
            flat = torch.frombuffer(data, dtype=torch.uint8, offset=layout.HEAD_BYTES, count=num_bytes)
            return flat.view(dtype).view(chunk.sizes)
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as err:  # a damaged archive fails in many ways
            raise catalog.Damaged(f"{path}: {chunk.fqn!r} cannot be read: {type(err).__name__}: {err}") from err
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.sizes:
            raise catalog.Damaged(f"{path}: {chunk.fqn!r} holds no tensor of shape {list(chunk.sizes)}")
        return tensor


def view(memory: memoryview, start: int, item: layout.Item) -> torch.Tensor:
    """Return an item's payload in memory as a tensor of the item's shape. It shares the memory."""
    dtype = _torch_dtype(item.dtype, item.fqn)
    if item.payload_bytes == 0:
        return torch.empty(item.sizes, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=item.payload_bytes)
    return flat.view(dtype).view(item.sizes)


def paste(out: torch.Tensor, item: layout.Item, chunk: torch.Tensor, offsets: tuple[int, ...]) -> int:
    """
    Copy the part of a chunk that lies in an item into the item's tensor. Return the number of its elements.

    Args:
        out: the tensor of the item.
        item: the wanted part of the global tensor.
        chunk: another part of the global tensor.
        offsets: start of the chunk in the global tensor.
    """
    overlap = intersect(item.offsets, item.sizes, offsets, tuple(chunk.shape))
    if overlap is None:
        return 0
    destination, source = out, chunk
    for dim, (first, length) in enumerate(overlap):
        destination = destination.narrow(dim, first - item.offsets[dim], length)
        source = source.narrow(dim, first - offsets[dim], length)
    destination.copy_(source)
    return destination.numel()


def intersect(
    a_offsets: tuple[int, ...], a_sizes: tuple[int, ...], b_offsets: tuple[int, ...], b_sizes: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """Return (first, length) of the overlap of two boxes in each dimension; None: they do not overlap. Two boxes of 0 dimensions overlap."""
    overlap = []
    for a, n, b, m in zip(a_offsets, a_sizes, b_offsets, b_sizes, strict=True):
        first, last = max(a, b), min(a + n, b + m)
        if first >= last:
            return None
        overlap.append((first, last - first))
    return overlap
