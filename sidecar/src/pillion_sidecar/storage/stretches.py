"""
Stretches of memory and of files, and the error of a file that is too short: the terms of all transfers of bulk bytes.

Called from: `storage.folder` and its implementations, `executor.save.write`, `executor.load.fill`. No I/O.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final, final

PAGE_BYTES: Final = 4096
"""Alignment for direct I/O, bytes: the largest that disks need in practice. It is not the page size of the machine."""


class TruncatedFile(OSError):
    """A file ends at `found_bytes`, before the end of the requested bytes at `wanted_bytes`. Its errno is ENODATA."""

    def __init__(self, path: str, *, wanted_bytes: int, found_bytes: int) -> None:
        super().__init__(errno.ENODATA, f"file is too short: {wanted_bytes} bytes wanted, {found_bytes} found", path)
        self.wanted_bytes = wanted_bytes
        self.found_bytes = found_bytes


@final
@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of a slot that is written to a file, with any alignment. In practice it has items that lie one after the other."""

    slot_offset: int
    length: int


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file, and its place in the slot. Both have any alignment."""

    file_offset: int
    slot_offset: int
    length: int

    @property
    def is_congruent(self) -> bool:
        """Whether the piece has the same place in its pages in file and slot, so that direct I/O can move it."""
        return (self.file_offset - self.slot_offset) % PAGE_BYTES == 0
