"""
Puts tensors together from their chunks, into memory that the caller gives, while the bytes are read and verified.

Called from: `cli.exporting`, `cli.comparing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from pillion.wire import layout
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.cli import contents, leaves, tiling
from pillion_sidecar.cli.exits import not_found
from pillion_sidecar.storage import archive


def fill(
    stored: catalog.Stored,
    wanted: Sequence[contents.Tensor],
    memory_of: Mapping[str, memoryview],
    *,
    moved: Callable[[int], None],
) -> leaves.Result:
    """
    Read the values of tensors into memory, row-major, little-endian, without a gap.

    Args:
        memory_of: FQN -> memory of exactly the tensor's bytes.

    Raises:
        Ended: a tensor has no chunk for some of its values, or its dtype is not known, or the checkpoint is another program's.
        LoadError: the storage does not answer.
    """
    rows: dict[int, tiling.Tiling] = {}
    chunks = [chunk for tensor in wanted for chunk in tensor.chunks]
    for tensor in wanted:
        _require_whole(stored, tensor)
        for chunk in tensor.chunks:
            item_bytes = archive.SUPPORTED_DTYPES[tensor.dtype]
            rows[id(chunk)] = tiling.tile(tensor.shape, chunk.offsets, chunk.sizes, item_bytes)

    def sink(leaf: leaves.Leaf, start: int, data: memoryview) -> None:
        tile, memory = rows[id(leaf)], memory_of[leaf.fqn]
        # Around the payload are the head and the tail of an archive (`storage.archive`).
        skip = max(0, layout.HEAD_BYTES - start)
        length = min(start + len(data), layout.HEAD_BYTES + tile.row_bytes * len(tile.starts)) - start - skip
        for source, target, count in tiling.places(tile, start + skip - layout.HEAD_BYTES, max(0, length)):
            memory[target : target + count] = data[skip + source : skip + source + count]

    return leaves.read(stored.folder, chunks, sink=sink, moved=moved)


def _require_whole(stored: catalog.Stored, tensor: contents.Tensor) -> None:
    if not stored.native:
        raise not_found(
            f"{stored.folder} was written by another program: pillion reads the values of its own checkpoints only"
        )
    if tensor.num_bytes is None:
        raise not_found(f"{stored.folder}: {tensor.fqn!r} has dtype {tensor.dtype}, which this release does not know")
    covered = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
    if covered != math.prod(tensor.shape):
        raise not_found(
            f"{stored.folder}: {tensor.fqn!r} has {math.prod(tensor.shape)} values, and its chunks have {covered}"
        )
