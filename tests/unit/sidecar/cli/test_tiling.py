"""
The whole of: a tensor that is put together from any chunks, by stretches of any length, has every byte in its place.

Called from: pytest.
"""

import math

import pytest
import torch

from pillion_sidecar.cli import tiling


def assembled(whole: torch.Tensor, chunks: list[tuple[tuple[int, ...], tuple[int, ...]]], stretch: int) -> bytes:
    """The bytes of a tensor, from chunks at these offsets with these sizes."""
    item_bytes = whole.element_size()
    memory = bytearray(whole.numel() * item_bytes)
    for offsets, sizes in chunks:
        part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].contiguous()
        data = bytes(part.reshape(-1).view(torch.uint8).tolist())
        tile = tiling.tile(whole.shape, offsets, sizes, item_bytes)
        for start in range(0, len(data), stretch):
            length = min(stretch, len(data) - start)
            for source, target, count in tiling.places(tile, start, length):
                memory[target : target + count] = data[start + source : start + source + count]
    return bytes(memory)


@pytest.mark.parametrize("stretch", [1, 7, 1000])
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((), [((), ())]),
        ((5,), [((0,), (2,)), ((2,), (3,))]),
        ((4, 6), [((0, 0), (4, 6))]),
        ((4, 6), [((0, 0), (1, 6)), ((1, 0), (3, 6))]),
        ((4, 6), [((0, 0), (4, 2)), ((0, 2), (4, 4))]),
        ((4, 6), [((0, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 3))]),
        ((2, 3, 4), [((0, 0, 0), (2, 1, 4)), ((0, 1, 0), (2, 2, 4))]),
        ((2, 3, 4), [((0, 0, 0), (2, 3, 1)), ((0, 0, 1), (2, 3, 3))]),
        ((2, 1, 4), [((0, 0, 0), (1, 1, 4)), ((1, 0, 0), (1, 1, 4))]),
        ((3, 4), [((0, 0), (0, 4)), ((0, 0), (3, 4))]),
    ],
)
def test_chunks_make_the_tensor(
    shape: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]], stretch: int
) -> None:
    """Rows, columns, blocks, middle dimensions, empty chunks, and a scalar."""
    whole = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    wanted = b"".join(int(each).to_bytes(4, "little") for each in whole.flatten())
    assert assembled(whole, chunks, stretch) == wanted


def test_whole_rows_are_one_stretch() -> None:
    """However many there are, so that the usual shard of FSDP costs one copy."""
    assert tiling.tile((1000, 8), (10, 0), (500, 8), 2) == tiling.Tiling(500 * 16, (160,))
    assert tiling.tile((1000, 8), (0, 0), (1000, 4), 2).row_bytes == 8
