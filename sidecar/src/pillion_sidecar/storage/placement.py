"""
The places of the items of a rank's share in its files. Pure: the coordinator computes for every rank the same as the rank itself.

    one file     [page.... items ....page][page ... items ... page]       a file system: pages go to the disk as they lie
    objects      [items][items]  [items][items]  [items]                  a bucket: exactly the items, cut at `object_bytes`

Called from: `executor.save.write`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pillion_sidecar.storage import directio
from pillion_sidecar.storage.stretches import Run


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """One file of a rank's share."""

    runs: tuple[Run, ...]
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The files of a rank's share, and the place of each item in them."""

    files: tuple[PlacedFile, ...]
    items: tuple[tuple[int, int], ...]
    """(index of its file, offset in the file in bytes) for each item, in the order of the ranges."""


def place(ranges: Sequence[Sequence[Run]], object_bytes: int | None) -> Placement:
    """
    Lay the items of a share into files.

    Args:
            ranges: stretches of consecutive items of the slot. Bytes between two items of one range are written with them.
            object_bytes: size at which files are cut, bytes; None: one file of whole pages. An item is never cut: a larger item is a file by itself.
    """
    return _whole_pages(ranges) if object_bytes is None else _cut(ranges, object_bytes)


def _whole_pages(ranges: Sequence[Sequence[Run]]) -> Placement:
    runs = tuple(_around(each) for each in ranges)
    placed = directio.place(runs)
    items = [
        (0, file_offset + item.slot_offset - run.slot_offset)
        for each, run, file_offset in zip(ranges, runs, placed.file_offsets, strict=True)
        for item in each
    ]
    return Placement((PlacedFile(runs, placed.file_bytes),) if runs else (), tuple(items))


def _around(items: Sequence[Run]) -> Run:
    start = items[0].slot_offset
    return Run(start, items[-1].slot_offset + items[-1].length - start)


def _cut(ranges: Sequence[Sequence[Run]], object_bytes: int) -> Placement:
    files: list[list[Run]] = []
    sizes: list[int] = []
    items: list[tuple[int, int]] = []
    for each in ranges:
        end = None
        for item in each:
            gap = 0 if end is None else item.slot_offset - end
            if not files or (sizes[-1] and sizes[-1] + gap + item.length > object_bytes):
                files.append([])
                sizes.append(0)
                end = None
            if end is None:
                files[-1].append(item)
                gap = 0
            else:
                last = files[-1][-1]
                files[-1][-1] = Run(last.slot_offset, last.length + gap + item.length)
            items.append((len(files) - 1, sizes[-1] + gap))
            sizes[-1] += gap + item.length
            end = item.slot_offset + item.length
    placed = tuple(PlacedFile(tuple(runs), size) for runs, size in zip(files, sizes, strict=True))
    return Placement(placed, tuple(items))
