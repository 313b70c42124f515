"""
Tests of what every folder promises of bulk bytes.

Called from: pytest.
"""

import itertools
import random
from typing import Final

import pytest

from pillion_sidecar.storage import placement
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.stretches import PAGE_BYTES, Piece, Run, TruncatedFile

SLOT_BYTES: Final = 9 << 20
CONTENT: Final = random.Random(1).randbytes(SLOT_BYTES)
RANGES: Final = [
    [Run(5, 1000), Run(1005, 3 << 20)],
    [Run((4 << 20) + 1, 1 << 20), Run((5 << 20) + 7, 100), Run((5 << 20) + 107, 2 << 20)],
]
"""Items of a share, with a gap of some bytes in the second range, and one of many between the two."""


def write(folder: Folder, name: str = "__0_") -> tuple[placement.Placement, list[tuple[str, int]]]:
    """Write the share as its folder wants it cut; where its items lie, and what was said of progress."""
    folder.make()
    placed = placement.place(RANGES, folder.object_bytes and 1 << 20)
    said: list[tuple[str, int]] = []
    folder.write(
        {f"{name}{number}": each.runs for number, each in enumerate(placed.files)},
        memoryview(CONTENT + bytes(PAGE_BYTES)),
        num_threads=2,
        on_progress=lambda *progress: said.append(progress),
    )
    return placed, said


def test_a_share_is_read_back_item_by_item(step: Folder) -> None:
    """Whatever the folder's files look like, each item is where the placement says, and each file has the length that it says."""
    placed, said = write(step)
    lengths = {name: entry.length for name, entry in step.files().items()}
    assert lengths == {f"__0_{number}": each.file_bytes for number, each in enumerate(placed.files)}
    assert dict(said) == lengths
    items = [item for each in RANGES for item in each]
    for item, (number, offset) in zip(items, placed.items, strict=True):
        stored = step.read_piece(f"__0_{number}", offset, item.length)
        assert stored == CONTENT[item.slot_offset : item.slot_offset + item.length]


def test_pieces_go_where_they_belong_and_nowhere_else(step: Folder) -> None:
    """Pieces of any order and alignment land in their places, each is told in order when it is whole, and no other byte changes."""
    placed, _ = write(step)
    number, _ = placed.items[1]
    runs = placed.files[number].runs
    stored = bytes(step.read_piece(f"__0_{number}", 0, placed.files[number].file_bytes))
    assert len(runs) >= 1
    cuts = sorted({0, len(stored), *(random.Random(2).randrange(len(stored)) for _ in range(20))})
    pieces = [Piece(a, a + 64, b - a) for a, b in itertools.pairwise(cuts)]
    pieces.insert(3, Piece(10, 0, 0))
    for order in (pieces, pieces[::-1]):
        memory = bytearray(len(stored) + 100)
        told: list[int] = []

        def whole(index: int, order: list[Piece] = order, memory: bytearray = memory, told: list[int] = told) -> None:
            piece = order[index]
            told.append(index)
            assert (
                memory[piece.slot_offset : piece.slot_offset + piece.length]
                == stored[piece.file_offset : piece.file_offset + piece.length]
            )

        step.read_into(f"__0_{number}", memoryview(memory), order, on_piece=whole)
        assert told == list(range(len(order)))
        assert memory == bytes(64) + stored + bytes(36)


def test_a_file_that_is_too_short_says_so(step: Folder) -> None:
    """Pieces that reach beyond the end, or lie beyond it, are a TruncatedFile with both lengths, and no silent zeros."""
    step.put("file", b"12345")
    for offset in (3, 5, 9000):
        with pytest.raises(TruncatedFile) as into:
            step.read_into("file", memoryview(bytearray(10)), [Piece(offset, 0, 10)])
        with pytest.raises(TruncatedFile) as piece:
            step.read_piece("file", offset, 10)
        for caught in (into, piece):
            assert (caught.value.wanted_bytes, caught.value.found_bytes) == (offset + 10, 5)
            assert caught.value.filename is not None


def test_a_file_that_is_not_there_says_so(step: Folder) -> None:
    """Reading into memory from what is not there is a FileNotFoundError with its name."""
    with pytest.raises(FileNotFoundError) as caught:
        step.read_into("none", memoryview(bytearray(10)), [Piece(0, 0, 10)])
    assert str(caught.value.filename).endswith("none")


def test_what_on_piece_raises_ends_the_reading(step: Folder) -> None:
    """A digest that differs ends the reading with the digest's own error."""
    step.put("file", bytes(100))

    def differs(index: int) -> None:
        raise ValueError("the digest differs")

    with pytest.raises(ValueError, match="the digest differs"):
        step.read_into("file", memoryview(bytearray(100)), [Piece(0, 0, 50), Piece(50, 50, 50)], on_piece=differs)


def test_what_on_progress_raises_ends_the_writing(step: Folder) -> None:
    """Whoever gives up a write gets his own error, and no half file stays."""
    placed = placement.place(RANGES, step.object_bytes and 1 << 20)

    def give_up(name: str, written_bytes: int) -> None:
        raise ValueError("given up")

    files = {f"__0_{number}": each.runs for number, each in enumerate(placed.files)}
    with pytest.raises(ValueError, match="given up"):
        step.write(files, memoryview(CONTENT + bytes(PAGE_BYTES)), num_threads=2, on_progress=give_up)
    whole = {f"__0_{number}": each.file_bytes for number, each in enumerate(placed.files)}
    assert {name: entry.length for name, entry in step.files().items()}.items() <= whole.items()


def test_memory_that_is_not_there_is_refused(step: Folder) -> None:
    """A run or a piece outside the memory is a ValueError, and nothing is written."""
    with pytest.raises(ValueError, match=r"."):
        step.write({"file": [Run(0, PAGE_BYTES + 1)]}, memoryview(bytes(PAGE_BYTES)), num_threads=1)
    assert step.files() == {}
    step.put("file", bytes(100))
    with pytest.raises(ValueError, match=r"."):
        step.read_into("file", memoryview(bytearray(10)), [Piece(0, 5, 10)])


def test_a_write_that_is_tried_again_leaves_the_same(step: Folder) -> None:
    """The same share written again, as after an error, is the same files."""
    placed, _ = write(step)
    _, said = write(step)
    assert dict(said) == {f"__0_{number}": each.file_bytes for number, each in enumerate(placed.files)}
    number, offset = placed.items[0]
    assert step.read_piece(f"__0_{number}", offset, 1000) == CONTENT[5:1005]
