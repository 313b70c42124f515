"""
Bytes between arena memory and files, past the page cache: all of the sidecar's bulk file I/O.

    slot (mapped tmpfs)   |....rrrrrr|rrrrrrrrrr|rrr.......|..........|........qq|qqqq......|   r, q: two runs
    file                  |....rrrrrr|rrrrrrrrrr|rrr.......|........qq|qqqq......|              |: page edges

A slot is the image of the file to be written, so a page of it goes to the disk as it lies: no copy, no page cache,
next to no CPU. A file therefore holds whole pages, each run in it begins at the same place in its page as in the slot,
and what lies beside a run in its first and last page are bytes of its neighbours that nothing refers to.

Called from: the executor (writing, loading). Small files are the business of `storage.durable`.
It must never touch a byte of a slot outside the pieces asked for, return from a write before the bytes are durable,
lose an error of a thread (pytorch/pytorch#191391 is what that does), or leave a thread or a descriptor behind.

Where a file system has no direct I/O, or refuses it for this memory, the same calls go through the page cache.

Seen on one ext4 disk, 2 cores, 1 GiB, with xxh3_128 of each 16 MiB beside it, as a ratio to one thread's plain O_DIRECT
calls in the same run (2.1 GB/s writing, 3.0 reading): 8 MiB in 1, 2, 4 threads 0.96, 1.04, 1.05 and 0.79, 1.04, 1.11.
Source: open(2), NOTES on O_DIRECT; statx(2), STATX_DIOALIGN.
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import logging
import mmap
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Final, NamedTuple, final

from pillion import fault_points
from pillion_sidecar.storage import durable

_log = logging.getLogger(__name__)
PAGE_BYTES: Final = 4096
"""The alignment of everything here; the largest that a disk asks for in practice. Not the page size of the machine."""
BLOCK_BYTES: Final = 8 << 20
"""The default size of one read or write: enough for full speed; a larger one would delay the first digest."""
NUM_THREADS: Final = 2
"""The default number of calls in flight: a second one fills the gap between two calls of the first."""
_MAX_VIEWS: Final = 1024
"""IOV_MAX of Linux: how many stretches of memory one pwritev(2) may gather."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class TruncatedFile(OSError):
    """A file ends, at `found_bytes`, before the bytes asked for, which end at `wanted_bytes`. Its errno is ENODATA."""

    def __init__(self, path: str, *, wanted_bytes: int, found_bytes: int) -> None:
        super().__init__(errno.ENODATA, f"file is too short: {wanted_bytes} bytes wanted, {found_bytes} found", path)
        self.wanted_bytes = wanted_bytes
        self.found_bytes = found_bytes


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A stretch of a slot that goes to the file, of any alignment: in practice, items that lie one after the other."""

    slot_offset: int
    length: int


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file and the place in the slot where it goes; both of any alignment."""

    file_offset: int
    slot_offset: int
    length: int

    @property
    def is_congruent(self) -> bool:
        """Whether it has the same place in its pages on both sides, so that direct I/O can move it."""
        return (self.file_offset - self.slot_offset) % PAGE_BYTES == 0


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What `place` decided."""

    file_offsets: tuple[int, ...]
    """Of the first byte of each run; congruent to its slot offset modulo PAGE_BYTES, unless the run is empty."""
    file_bytes: int
    """A multiple of PAGE_BYTES."""


def place(runs: Sequence[Run]) -> Layout:
    """
    Lay runs into a file, one after the other, each with the whole pages around it. Pure.

    A page that two runs share is in the file twice: at most a page per run, and each run stays in one stretch.
    An empty run takes no page; its offset is where the next one's pages begin.

    Raises: ValueError for a negative offset or length.
    """
    file_offsets = []
    file_bytes = 0
    for run in runs:
        start, end = _pages_around(run)
        file_offsets.append(file_bytes + run.slot_offset - start)
        file_bytes += end - start
    return Layout(tuple(file_offsets), file_bytes)


def write_file(
    path: str | os.PathLike[str],
    slot: memoryview,
    runs: Sequence[Run],
    *,
    block_bytes: int = BLOCK_BYTES,
    num_threads: int = NUM_THREADS,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """
    Write runs of a slot to a file as `place` lays them, and return the file's size once its bytes are durable.

    `path` is opened as it is (created, or emptied if it exists): naming it for the time being and syncing its directory
    are the caller's. `slot` should begin at a page, and must reach to the end of the last page of every run.
    `on_progress(written_bytes)` is called in this thread with the bytes written so far, from the start of the file on;
    whatever it raises ends the write, which is how a caller gives up. After any error the file is gone, if it can be.

    Blocks: until the storage has taken everything. If that hangs, this hangs; the supervisor's ladder is the bound.
    Raises: OSError with errno and filename (ENOSPC comes before the first byte where the file system can reserve room);
    ValueError for a run outside the slot or a block size that is no multiple of a page.
    """
    blocks = list(_write_blocks(runs, slot.nbytes, block_bytes))
    file_bytes = place(runs).file_bytes
    with memoryview(slot).cast("B") as memory, _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
        try:
            _reserve(file.fd, file_bytes)

            def write(index: int) -> None:
                file_offset, length, spans = blocks[index]
                _transfer(file, os.pwritev, [memory[a:b] for a, b in spans], file_offset, needed=length)
                fault_points.reach(fault_points.FaultPoint.WRITE, path=file.path)

            def progressed(index: int) -> None:
                if on_progress is not None:
                    on_progress(blocks[index].file_offset + blocks[index].length)

            _run_in_order(len(blocks), num_threads, write, progressed)
            fault_points.reach(fault_points.FaultPoint.FSYNC, path=file.path)
            os.fdatasync(file.fd)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(path).unlink()
            raise
    return file_bytes


def read_file(
    path: str | os.PathLike[str],
    slot: memoryview,
    pieces: Sequence[Piece],
    *,
    block_bytes: int = BLOCK_BYTES,
    num_threads: int = NUM_THREADS,
    on_piece: Callable[[int], None] | None = None,
) -> None:
    """
    Read pieces of a file into a slot, and touch no other byte of the slot.

    Pieces that follow each other both in the file and in the slot are read as one stretch. A stretch whose two offsets
    are congruent modulo PAGE_BYTES goes from the disk straight into the slot, except for the ragged page at either end;
    any other is read through the page cache.
    `on_piece(index)` is called in this thread, in the order of `pieces`, once that piece and all before it are whole.
    Reading goes on in other threads meanwhile, so a digest checked there takes no time of its own; whatever it raises
    ends the reading. After an error the bytes inside the pieces are undefined.

    Blocks: as `write_file`.
    Raises: TruncatedFile, before the first byte is read unless the file shrinks later; OSError with errno and filename;
    ValueError for a piece outside the slot, a read-only slot, or a block size that is no multiple of a page.
    """
    if slot.readonly:
        raise ValueError("the slot to read into is read-only")
    blocks, last_blocks = _read_blocks(pieces, slot.nbytes, block_bytes)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(memoryview(slot).cast("B"))
        direct = stack.enter_context(_opened(path, os.O_RDONLY))
        # A file descriptor of its own: O_DIRECT is a property of the open file, and both kinds are in use at once.
        ragged = direct
        if not all(block.is_congruent for block in blocks):
            ragged = stack.enter_context(_opened(path, os.O_RDONLY, try_direct=False))
        wanted_bytes = max((piece.file_offset + piece.length for piece in pieces), default=0)
        found_bytes = os.fstat(direct.fd).st_size
        if found_bytes < wanted_bytes:
            raise TruncatedFile(direct.path, wanted_bytes=wanted_bytes, found_bytes=found_bytes)
        num_announced = 0

        def read(index: int) -> None:
            block = blocks[index]
            if block.is_congruent:
                _read_block(direct, memory, block)
            else:
                views = [memory[block.slot_offset : block.slot_offset + block.length]]
                _transfer(ragged, os.preadv, views, block.file_offset, needed=block.length)

        def announce(index: int) -> None:
            nonlocal num_announced
            while num_announced < len(pieces) and last_blocks[num_announced] <= index:
                num_announced += 1
                if on_piece is not None:
                    on_piece(num_announced - 1)

        announce(-1)
        _run_in_order(len(blocks), num_threads, read, announce)


# Files, and what the kernel may refuse.


@final
class _File:
    """An open file that begins with direct I/O where it can, and changes to the page cache for good when it cannot."""

    def __init__(self, path: str, fd: int, *, is_direct: bool) -> None:
        self.path = path
        self.fd = fd
        self.is_direct = is_direct

    def go_buffered(self, why: str) -> None:
        """Take O_DIRECT off the open file: calls that other threads are in the middle of end as they began."""
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        if self.is_direct:
            _log.warning("no direct I/O on %s (%s): using the page cache", self.path, why)
        self.is_direct = False


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], flags: int, *, try_direct: bool = True) -> Iterator[_File]:
    """Open, direct where the file system can; every OSError from inside leaves with the file's name on it."""
    try:
        try:
            fd, is_direct = os.open(path, flags | (os.O_DIRECT if try_direct else 0), 0o666), try_direct
        except OSError as err:
            # EINVAL is a file system without direct I/O. The file may exist by now: no caller here passes O_EXCL.
            if not try_direct or err.errno != errno.EINVAL:
                raise
            fd, is_direct = os.open(path, flags, 0o666), False
        try:
            yield _File(os.fspath(path), fd, is_direct=is_direct)
        finally:
            os.close(fd)
    except OSError as err:
        durable.put_name(err, path)
        raise


def _reserve(fd: int, length: int) -> None:
    """
    Reserve room for the whole file, so that a full disk is an error now and not after minutes, and extents are large.

    The system call, not os.posix_fallocate: where a file system cannot reserve, glibc would write a byte to each block.
    Source: posix_fallocate(3), NOTES.
    """
    while length and _libc.fallocate(fd, 0, 0, length) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


# Planning: which call moves which bytes. Pure.


class _WriteBlock(NamedTuple):
    """One write: a stretch of the file, gathered from spans (start, end) of the slot. Everything at page edges."""

    file_offset: int
    length: int
    spans: tuple[tuple[int, int], ...]


def _page_floor(offset: int) -> int:
    return offset - offset % PAGE_BYTES


def _page_ceil(offset: int) -> int:
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


def _pages_around(run: Run) -> tuple[int, int]:
    if run.slot_offset < 0 or run.length < 0:
        raise ValueError(f"a run cannot begin or reach below zero: {run}")
    if run.length == 0:
        return run.slot_offset, run.slot_offset
    return _page_floor(run.slot_offset), _page_ceil(run.slot_offset + run.length)


def _write_blocks(runs: Sequence[Run], slot_bytes: int, block_bytes: int) -> Iterator[_WriteBlock]:
    """Cut the file at multiples of the block size, whatever the runs are: many small runs go out in one call."""
    if block_bytes <= 0 or block_bytes % PAGE_BYTES:
        raise ValueError(f"block_bytes must be a positive multiple of {PAGE_BYTES}, got {block_bytes}")
    file_offset = length = 0
    spans: list[tuple[int, int]] = []
    for run in runs:
        start, end = _pages_around(run)
        if end > slot_bytes:
            raise ValueError(f"the pages of {run} end at {end}, beyond the slot of {slot_bytes} bytes")
        while start < end:
            taken = min(end - start, block_bytes - length)
            spans.append((start, start + taken))
            start += taken
            length += taken
            if length == block_bytes or len(spans) == _MAX_VIEWS:
                yield _WriteBlock(file_offset, length, tuple(spans))
                file_offset, length, spans = file_offset + length, 0, []
    if spans:
        yield _WriteBlock(file_offset, length, tuple(spans))


def _read_blocks(pieces: Sequence[Piece], slot_bytes: int, block_bytes: int) -> tuple[list[Piece], list[int]]:
    """
    Merge pieces into stretches, and cut those into blocks, pieces themselves, that end at page edges of the file.

    Returns the blocks, and for each piece the index of the block with its last byte (for an empty one: of the block
    before it, or -1). Blocks are in the order of the pieces: a piece is whole when all blocks up to that index are.
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
            # A piece that goes on where the one before it ended first fills up the block that one had begun.
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


# Moving: one block, in one thread.


def _read_block(file: _File, memory: memoryview, block: Piece) -> None:
    """
    Read one congruent block: whole pages straight into the slot, and a page at either end that holds bytes of others
    into two pages of our own, from where only the block's own bytes are copied. One system call for the three.
    """
    file_start, file_end = block.file_offset, block.file_offset + block.length
    to_slot = block.slot_offset - block.file_offset
    inner_start, inner_end = _page_ceil(file_start), _page_floor(file_end)
    inner_end = max(inner_start, inner_end)  # They cross when the block lies inside one page, which is then the head.
    head = tail = memoryview(b"")
    if file_start < inner_start or inner_end < file_end:
        scratch = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))  # Memory of the right alignment; gone with the last view.
        head = scratch[: PAGE_BYTES if file_start < inner_start else 0]
        tail = scratch[PAGE_BYTES : 2 * PAGE_BYTES if inner_end < file_end else 0]
    views = [head, memory[inner_start + to_slot : inner_end + to_slot], tail]
    read_start = inner_start - len(head)
    _transfer(file, os.preadv, views, read_start, needed=file_end - read_start)
    if head:
        stop = min(inner_start, file_end)
        memory[file_start + to_slot : stop + to_slot] = head[file_start - read_start : stop - read_start]
    if tail:
        memory[inner_end + to_slot : file_end + to_slot] = tail[: file_end - inner_end]


def _transfer(
    file: _File,
    call: Callable[[int, Sequence[memoryview], int], int],
    views: Sequence[memoryview],
    file_offset: int,
    *,
    needed: int,
) -> None:
    """
    Call preadv or pwritev until `needed` bytes have moved between the file and `views`, which may be longer.

    A short direct call may end inside a page, where the next one cannot begin: that page is moved again.
    """
    moved = 0
    while moved < needed:
        was_direct = file.is_direct
        try:
            count = call(file.fd, _rest(views, moved), file_offset + moved)
        except OSError as err:
            if err.errno != errno.EINVAL or not was_direct:
                raise
            file.go_buffered("refused with EINVAL")
            continue
        if count == 0 and call is os.preadv:
            found_bytes = os.fstat(file.fd).st_size
            raise TruncatedFile(file.path, wanted_bytes=file_offset + needed, found_bytes=found_bytes)
        if count == 0:
            raise OSError(errno.EIO, f"nothing was written at offset {file_offset + moved}")
        if was_direct and moved + count < needed and count % PAGE_BYTES:
            count = _page_floor(count)
            if count == 0:
                file.go_buffered("moved less than a page")
        moved += count


def _rest(views: Sequence[memoryview], skip: int) -> list[memoryview]:
    """What is left of `views` behind their first `skip` bytes; an empty view is dropped."""
    rest = []
    for view in views:
        if skip < len(view):
            rest.append(view[skip:])
        skip = max(0, skip - len(view))
    return rest


def _run_in_order(num_tasks: int, num_threads: int, act: Callable[[int], None], on_done: Callable[[int], None]) -> None:
    """
    Run `act(task)` for every task in threads, and here `on_done(task)` in order, each once all before it are done.

    The first task that failed, or `on_done`, ends it: tasks not yet begun are dropped, and the error is raised here,
    after every thread has ended, because the descriptors and the memory they use go away with the caller.
    """

    def act_and_let_go(task: int) -> None:
        try:
            act(task)
        except BaseException as err:
            # Views of the slot in the traceback's frames would make closing its mapping fail, and hide this error.
            traceback.clear_frames(err.__traceback__)
            raise

    pool = futures.ThreadPoolExecutor(max(1, min(num_threads, num_tasks)), thread_name_prefix="pillion-io")
    try:
        for task, future in enumerate([pool.submit(act_and_let_go, task) for task in range(num_tasks)]):
            future.result()
            on_done(task)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
