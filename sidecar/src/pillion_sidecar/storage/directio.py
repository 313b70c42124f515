"""
Direct I/O between arena memory and files, past the page cache. The sidecar's only module for bulk bytes of files.

    slot (mapped tmpfs)   |....rrrrrr|rrrrrrrrrr|rrr.......|..........|........qq|qqqq......|   r, q: two runs
    file                  |....rrrrrr|rrrrrrrrrr|rrr.......|........qq|qqqq......|              |: page edges

A slot is the image of the file to be written, so its pages go to the disk as they lie: no copy, no page cache, almost no CPU. So a file has
whole pages, and each run begins at the same place in its page as in the slot. Beside a run, its first and last page hold bytes of its
neighbours in the slot. No reader uses them.

Called from: the executor (writing, loading). Small files go through `storage.durable`.
This module must never touch a byte of a slot outside the pieces, return from a write before the bytes are durable, lose an error of a thread
(as in pytorch/pytorch#191391), or leave a thread or a descriptor behind.

If a file system has no direct I/O, or refuses it for this memory, the same calls go through the page cache.

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, final

from pillion import fault_points
from pillion_sidecar.storage import blocks, durable
from pillion_sidecar.storage.stretches import PAGE_BYTES, Piece, Run, TruncatedFile

_log = logging.getLogger(__name__)
BLOCK_BYTES: Final = 8 << 20
"""Default size of one read or write, bytes. It reaches full speed, and a larger one would delay the first digest."""
NUM_THREADS: Final = 2
"""Default number of calls in flight. A second call fills the gap between two calls of the first thread."""
_MAX_VIEWS: Final = 1024
"""Maximum of memory stretches that one pwritev(2) gathers: IOV_MAX of Linux."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The places of runs in a file, as the result of `place`."""

    file_offsets: tuple[int, ...]
    """Offset of the first byte of each run. It is congruent to the run's slot offset modulo PAGE_BYTES, unless the run is empty."""
    file_bytes: int
    """Size of the file, a multiple of PAGE_BYTES."""


def place(runs: Sequence[Run]) -> Layout:
    """
    Lay runs into a file, one after the other, each with the whole pages around it. Pure.

    A page that two runs share is in the file twice: at most one page per run, and each run stays in one stretch. An empty run takes no page. Its
    offset is where the next run's pages begin.

    Raises: ValueError if an offset or length is negative.
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
    Write runs of a slot to a file as `place` lays them. Return the file's size when its bytes are durable.

    `path` is created, or emptied if it exists. A temporary name and the sync of the directory are the caller's responsibility. `slot` should begin
    at a page, and must reach to the end of the last page of every run. `on_progress(written_bytes)` is called in this thread with the number of
    bytes that are written from the start of the file. An error of `on_progress` ends the write, so a caller can give up with it. After any error
    the file is removed, if possible.

    Blocks: until the storage has taken everything. If the storage hangs, this call hangs. The bound is the supervisor's watchdog.
    Raises: OSError with errno and filename (ENOSPC comes before the first byte if the file system can reserve room); ValueError if a run is outside
    the slot, or the block size is not a multiple of a page.
    """
    planned = list(_write_blocks(runs, slot.nbytes, block_bytes))
    file_bytes = place(runs).file_bytes
    with memoryview(slot).cast("B") as memory, _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
        try:
            _reserve(file.fd, file_bytes)

            def write(index: int) -> None:
                file_offset, length, spans = planned[index]
                _transfer(file, os.pwritev, [memory[a:b] for a, b in spans], file_offset, needed=length)
                fault_points.reach(fault_points.FaultPoint.WRITE, path=file.path)

            def progressed(index: int) -> None:
                if on_progress is not None:
                    on_progress(planned[index].file_offset + planned[index].length)

            blocks.run_in_order(len(planned), num_threads, write, progressed)
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

    Pieces that follow each other both in the file and in the slot are read as one stretch. A stretch whose two offsets are congruent modulo
    PAGE_BYTES goes from the disk straight into the slot, except for the partial page at either end. Any other stretch is read through the page
    cache. `on_piece(index)` is called in this thread, in the order of `pieces`, when that piece and all before it are whole. Other threads read
    on meanwhile, so a digest check in `on_piece` takes no extra time. An error of `on_piece` ends the read. After an error the bytes inside the
    pieces are undefined.

    Blocks: as `write_file`.
    Raises: TruncatedFile, before the first byte is read unless the file shrinks later; OSError with errno and filename; ValueError if a piece is
    outside the slot, the slot is read-only, or the block size is not a multiple of a page.
    """
    if slot.readonly:
        raise ValueError("the slot to read into is read-only")
    cut, last_blocks = blocks.cut(pieces, slot.nbytes, block_bytes)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(memoryview(slot).cast("B"))
        direct = stack.enter_context(_opened(path, os.O_RDONLY))
        # Needs a separate file descriptor: O_DIRECT is a property of the open file, and both kinds are in use at once.
        ragged = direct
        if not all(block.is_congruent for block in cut):
            ragged = stack.enter_context(_opened(path, os.O_RDONLY, try_direct=False))
        wanted_bytes = max((piece.file_offset + piece.length for piece in pieces), default=0)
        found_bytes = os.fstat(direct.fd).st_size
        if found_bytes < wanted_bytes:
            raise TruncatedFile(direct.path, wanted_bytes=wanted_bytes, found_bytes=found_bytes)

        def read(block: Piece) -> None:
            if block.is_congruent:
                _read_block(direct, memory, block)
            else:
                views = [memory[block.slot_offset : block.slot_offset + block.length]]
                _transfer(ragged, os.preadv, views, block.file_offset, needed=block.length)

        blocks.move(cut, last_blocks, num_threads=num_threads, read=read, on_piece=on_piece)


# Files, and what the kernel may refuse.


@final
class _File:
    """An open file. It begins with direct I/O if possible, and changes to the page cache for good if direct I/O is refused."""

    def __init__(self, path: str, fd: int, *, is_direct: bool) -> None:
        self.path = path
        self.fd = fd
        self.is_direct = is_direct

    def go_buffered(self, why: str) -> None:
        """Take O_DIRECT off the open file. Calls in other threads that have begun end as they began."""
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        if self.is_direct:
            _log.warning("no direct I/O on %s (%s): using the page cache", self.path, why)
        self.is_direct = False


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], flags: int, *, try_direct: bool = True) -> Iterator[_File]:
    """Open a file, with direct I/O if the file system has it. Every OSError raised inside gets the file's name."""
    try:
        try:
            fd, is_direct = os.open(path, flags | (os.O_DIRECT if try_direct else 0), 0o666), try_direct
        except OSError as err:
            # EINVAL shows a file system without direct I/O. The file may exist by now: no caller here passes O_EXCL.
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
    Reserve room for the whole file. So a full disk is an error now and not after minutes, and extents are large.

    This uses the system call, not os.posix_fallocate: if a file system cannot reserve, glibc writes a byte to each block.
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
    """One write: a stretch of the file, gathered from spans (start, end) of the slot. All of them end at page edges."""

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
    """Cut the file at multiples of the block size, independently of the runs: one call writes many small runs."""
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


# Moving: one block, in one thread.


def _read_block(file: _File, memory: memoryview, block: Piece) -> None:
    """
    Read one congruent block with one system call.

    Whole pages go straight into the slot. A page at either end that also has other bytes goes into a scratch page, and only the block's own bytes
    are copied from there.
    """
    file_start, file_end = block.file_offset, block.file_offset + block.length
    to_slot = block.slot_offset - block.file_offset
    inner_start, inner_end = _page_ceil(file_start), _page_floor(file_end)
    inner_end = max(inner_start, inner_end)  # They cross if the block lies inside one page, which is then the head.
    head = tail = memoryview(b"")
    if file_start < inner_start or inner_end < file_end:
        scratch = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))  # Aligned memory, freed with its last view.
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

    A short direct call may end inside a page, and the next call cannot begin there. So that page is moved again.
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
    """Return the rest of `views` after their first `skip` bytes, without empty views."""
    rest = []
    for view in views:
        if skip < len(view):
            rest.append(view[skip:])
        skip = max(0, skip - len(view))
    return rest
