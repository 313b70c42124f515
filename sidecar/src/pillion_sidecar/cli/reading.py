"""
Reads stretches of a checkpoint's files in a fixed order, several at a time, in memory that is used again.

    pool      read(0) read(1) read(2) ...        several reads in flight, each with a buffer of its own: direct I/O, or ranges of a bucket
    caller          take(0) take(1) take(2) ...  in this thread, in order: a digest, a copy; then the buffer is free again

So a digest that spans many stretches needs no lock, and memory does not depend on the size of the checkpoint.

Called from: the commands of `cli`.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable
from concurrent import futures
from dataclasses import dataclass
from typing import Final

from pillion_sidecar.storage import reading
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.stretches import PAGE_BYTES, Piece

STRETCH_BYTES: Final = 32 * 2**20
"""Maximum bytes of a stretch: large enough that a disk reads at its full rate, small enough that a few of them are little memory."""
IN_FLIGHT: Final = 4
"""Number of stretches that are read together. Each read has several blocks in flight itself."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of one file, at most STRETCH_BYTES long."""

    file: str
    offset: int
    length: int


def run(
    folder: Folder,
    stretches: Iterable[Stretch],
    take: Callable[[Stretch, memoryview], None],
    failed: Callable[[Stretch, OSError], None],
) -> None:
    """
    Read stretches, and call `take(stretch, bytes)` in this thread in their order. The bytes are valid during the call only.

    A stretch whose file is missing or too short goes to `failed(stretch, error)` in the same order.

    Blocks: for the reads; a stretch that storage refuses is tried again for 10 s (`storage.reading`).

    Raises:
        LoadError: the storage does not answer.
    """
    buffers = [memoryview(mmap.mmap(-1, STRETCH_BYTES + PAGE_BYTES)) for _ in range(IN_FLIGHT + 1)]
    pending: deque[tuple[Stretch, memoryview, futures.Future[OSError | None]]] = deque()

    def settle() -> None:
        stretch, memory, future = pending.popleft()
        error = future.result()
        if error is None:
            start = stretch.offset % PAGE_BYTES
            take(stretch, memory[start : start + stretch.length])
        else:
            failed(stretch, error)
        buffers.append(memory)

    with futures.ThreadPoolExecutor(IN_FLIGHT, "pillion-read") as pool:
        try:
            for stretch in stretches:
                if not buffers:
                    settle()
                memory = buffers.pop()
                pending.append((stretch, memory, pool.submit(_read, folder, stretch, memory)))
            while pending:
                settle()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(folder: Folder, stretch: Stretch, memory: memoryview) -> OSError | None:
    # The same place in a page as in the file, so that direct I/O moves whole pages.
    piece = Piece(stretch.offset, stretch.offset % PAGE_BYTES, stretch.length)
    try:
        reading.retried(f"{folder}/{stretch.file}", lambda: folder.read_into(stretch.file, memory, [piece]))
    except OSError as err:  # the file is missing or too short; all other errors have become a LoadError
        return err
    return None
