"""
Chunks that were not stored as they are wanted: put together from what overlaps them.

Called from: `executor.load.fill`. Imports torch: n-dimensional copies, and the archives of stock DCP, which `torch.load` reads with
`weights_only=True` (its restricted unpickler).
"""

from __future__ import annotations

import io
import os
from typing import Final

import torch

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import layout, manifest
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.storage import digest, reading

CACHE_BYTES: Final = 256 * 1024**2
"""Stored chunks kept between two wanted ones: neighbours of a resharded tensor overlap the same stored chunk."""


def _torch_dtype(name: str, fqn: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise IncompatibleCheckpoint(f"{fqn!r} has dtype {name!r}, which this torch does not know", fqns=[fqn])
    return dtype


class Source:
    """Tensors of one stored checkpoint, chunk by chunk."""

    def __init__(self, stored: catalog.Stored) -> None:
        self._stored = stored
        self._cache: dict[tuple[str, int], torch.Tensor] = {}
        self._cached_bytes = 0

    def assemble(self, target: layout.Layout, index: int, memory: memoryview) -> None:
        """
        Write the payload of item `index` of the target layout into the image.

        Raises:
            catalog.Damaged: a stored chunk cannot be read, does not match its digest, or the chunks leave a hole.
        """
        item = target.items[index]
        if item.payload_bytes == 0:
            return
        dtype = _torch_dtype(item.dtype, item.fqn)
        start = target.payload_starts[index]
        view = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=item.payload_bytes).view(dtype)
        out = view.view(item.sizes)
        covered = 0
        for chunk in self._stored.chunks[item.fqn]:
            overlap = intersect(item.offsets, item.sizes, chunk.offsets, chunk.sizes)
            if overlap is None:
                continue
            tensor = self._chunk(chunk)
            into, source = out, tensor
            elements = 1
            for dim, (first, length) in enumerate(overlap):
                into = into.narrow(dim, first - item.offsets[dim], length)
                source = source.narrow(dim, first - chunk.offsets[dim], length)
                elements *= length
            into.copy_(source)
            covered += elements
        if covered < out.numel():
            raise catalog.Damaged(f"{self._stored.path}: the stored chunks of {item.fqn!r} leave a hole")

    def _chunk(self, chunk: manifest.StoredChunk) -> torch.Tensor:
        key = (chunk.file, chunk.offset)
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        path = os.path.join(self._stored.path, chunk.file)
        with catalog.damage(path):
            data = reading.read_piece(path, chunk.offset, chunk.length)
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


def intersect(
    a_offsets: tuple[int, ...], a_sizes: tuple[int, ...], b_offsets: tuple[int, ...], b_sizes: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """(first, length) of the overlap in each dimension; None when there is none. 0-d boxes overlap."""
    overlap = []
    for a, n, b, m in zip(a_offsets, a_sizes, b_offsets, b_sizes, strict=True):
        first, last = max(a, b), min(a + n, b + m)
        if first >= last:
            return None
        overlap.append((first, last - first))
    return overlap
