"""
Moves pieces of a file into memory by blocks, several blocks at a time, and reports which pieces are whole.

Called from: `storage.directio`, `storage.object_transfer`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Final

from pillion_sidecar.storage.stretches import PAGE_BYTES, Piece

WAIT_S: Final = 1.0
"""Interval of `run_in_order`'s reports that it still waits for a task, seconds."""


def cut(pieces: Sequence[Piece], slot_bytes: int, block_bytes: int) -> tuple[list[Piece], list[int]]:
    """
    Merge pieces into stretches, and cut the stretches into blocks that end at page edges of the file. A block is a `Piece` too. Pure.

    Return the blocks in the order of the pieces. Return also for each piece the index of the block with its last byte: a piece is whole when
    all blocks up to that index are. An empty piece has the index of the block before it, or -1.

    Raises: ValueError if a piece is outside the slot, or the block size is not a multiple of a page.
    """
    if block_bytes <= 0 or block_bytes % PAGE_BYTES:
        raise ValueError(f"block_bytes must be a positive multiple of {PAGE_BYTES}, got {block_bytes}")
    blocks: list[Piece] = []
    last_blocks: list[int] = []
    for piece in pieces:
        if min(piece.file_offset, piece.slot_offset, piece.length) < 0:
            raise ValueError(f"a piece cannot begin or reach below zero: {piece}")
        if piece.slot_offset + piece.length > slot_bytes:
            raise ValueError(f"{piece} ends beyond the slot of {slot_bytes} bytes")
        start, end, to_slot = piece.file_offset, piece.file_offset + piece.length, piece.slot_offset - piece.file_offset
        if blocks and start < end:
            # A piece that continues the one before it first fills that piece's last block.
            last = blocks[-1]
            if (start, start + to_slot) == (last.file_offset + last.length, last.slot_offset + last.length):
                stop = min(end, _page_floor(last.file_offset) + block_bytes)
                blocks[-1] = Piece(last.file_offset, last.slot_offset, stop - last.file_offset)
                start = stop
        while start < end:
            stop = min(end, _page_floor(start) + block_bytes)
            blocks.append(Piece(start, start + to_slot, stop - start))
            start = stop
        last_blocks.append(len(blocks) - 1)
    return blocks, last_blocks


def _page_floor(offset: int) -> int:
    return offset - offset % PAGE_BYTES


def move(
    blocks: Sequence[Piece],
    last_blocks: Sequence[int],
    *,
    num_threads: int,
    read: Callable[[Piece], None],
    on_piece: Callable[[int], None] | None,
) -> None:
    """
    Call `read(block)` for the blocks of `cut`, `num_threads` at a time.

    Call `on_piece(index)` in this thread for each piece, in order, when that piece and all before it are whole.

    Raises: as `run_in_order`.
    """
    num_announced = 0

    def announce(index: int) -> None:
        nonlocal num_announced
        while num_announced < len(last_blocks) and last_blocks[num_announced] <= index:
            num_announced += 1
            if on_piece is not None:
                on_piece(num_announced - 1)

    announce(-1)
    run_in_order(len(blocks), num_threads, lambda index: read(blocks[index]), announce)


def run_in_order(
    num_tasks: int,
    num_threads: int,
    act: Callable[[int], None],
    on_done: Callable[[int], None],
    on_wait: Callable[[int], None] | None = None,
) -> None:
    """
    Run `act(task)` for every task in threads. Call `on_done(task)` in this thread, in order, when the task and all before it are done.

    During the wait for a task, `on_wait(task)` is called in this thread every WAIT_S. The first error of a task, of `on_done` or of `on_wait`
    ends the run. Tasks that have not begun are dropped. The error is raised after every thread has ended, because the caller then closes the
    descriptors and the memory that the threads use.
    """

    def act_and_let_go(task: int) -> None:
        try:
            act(task)
        except BaseException as err:
            # Views of the slot in the traceback's frames would prevent the unmapping of the slot, and hide this error.
            traceback.clear_frames(err.__traceback__)
            raise

    pool = futures.ThreadPoolExecutor(max(1, min(num_threads, num_tasks)), thread_name_prefix="pillion-io")
    try:
        for task, future in enumerate([pool.submit(act_and_let_go, task) for task in range(num_tasks)]):
            while on_wait is not None and not futures.wait([future], WAIT_S).done:
                on_wait(task)
            future.result()
            on_done(task)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
