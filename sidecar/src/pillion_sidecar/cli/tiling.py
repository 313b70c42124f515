"""
Where the bytes of a chunk lie in its whole tensor, row by row. Pure.

    tensor 4 x 6, chunk at (1, 2) of 2 x 3     ......          each row of the chunk is one stretch of the tensor;
                                               ..AAA.          a chunk of whole rows is a single stretch
                                               ..BBB.
                                               ......

Called from: `cli.assembly`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tiling:
    """The rows of a chunk in its tensor: all of one length, which may be the whole chunk."""

    row_bytes: int
    starts: tuple[int, ...]
    """For each row in the order of the chunk's bytes, its offset in the tensor, bytes."""


def tile(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], item_bytes: int) -> Tiling:
    """
    Return the rows of a chunk.

    Args:
        shape: of the whole tensor, in items. Row-major, as all tensors on storage.
        offsets, sizes: of the chunk in the tensor, in items.
    """
    if math.prod(sizes) == 0:
        return Tiling(0, ())
    # From the last dimension on: as long as the chunk is as wide as the tensor, rows follow each other without a gap.
    whole = len(shape)
    while whole > 0 and sizes[whole - 1] == shape[whole - 1]:
        whole -= 1
    inner = max(whole - 1, 0)
    strides = [math.prod(shape[axis + 1 :]) * item_bytes for axis in range(len(shape))]
    row_bytes = math.prod(sizes[inner:]) * item_bytes
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    outer = itertools.product(*(range(size) for size in sizes[:inner]))
    starts = tuple(first + sum(at * stride for at, stride in zip(each, strides, strict=False)) for each in outer)
    return Tiling(row_bytes, starts)


def places(tiling: Tiling, start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """
    Yield where a stretch of a chunk's bytes goes: (offset in the stretch, offset in the tensor, number of bytes).

    Args:
        start, length: the stretch in the chunk's bytes.
    """
    if not tiling.row_bytes:
        return
    done = 0
    while done < length:
        row, within = divmod(start + done, tiling.row_bytes)
        count = min(tiling.row_bytes - within, length - done)
        yield done, tiling.starts[row] + within, count
        done += count
