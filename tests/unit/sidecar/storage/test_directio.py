"""Direct I/O between slots and files: byte for byte, on a disk and on tmpfs; and when it fails, it leaves nothing."""

import contextlib
import errno
import gc
import logging
import mmap
import os
import resource
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion_sidecar.storage import directio, stretches

PAGE = stretches.PAGE_BYTES
SLOT_PAGES = 24
SLOT_BYTES = SLOT_PAGES * PAGE
CONTENT = os.urandom(SLOT_BYTES)

few = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module", params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of each kind that a checkpoint may meet; tmpfs had no direct I/O before Linux 6.6."""
    if request.param == "disk":
        yield tmp_path_factory.mktemp("directio")
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pillion-test-") as name:
            yield Path(name)


@pytest.fixture(autouse=True)
def leaks_nothing() -> Iterator[None]:
    """Whatever a test did, no descriptor and no thread is left of it."""
    fds, threads = _open_fds(), threading.active_count()
    yield
    assert _open_fds() == fds
    assert threading.active_count() == threads


def _open_fds() -> set[str]:
    # The listing itself has one open, which is gone by the time it is looked at.
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


@contextlib.contextmanager
def slot_of(content: bytes) -> Iterator[memoryview]:
    """A page-aligned slot. Its mapping is closed at the end, before any garbage collection: no view may survive."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        mapping = mmap.mmap(-1, max(len(content), 1))
        mapping[: len(content)] = content
        view = memoryview(mapping)
        try:
            yield view
        finally:
            view.release()
        mapping.close()
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def cut_slot(num_pages: int, num_pages_left: int) -> Iterator[memoryview]:
    """A slot whose file was cut behind its back: the kernel answers EFAULT for the pages that are gone."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(num_pages * PAGE)
        with mmap.mmap(file.fileno(), num_pages * PAGE) as mapping, memoryview(mapping) as view:
            view[:] = b"x" * len(view)
            file.truncate(num_pages_left * PAGE)
            yield view


@contextlib.contextmanager
def mounted(kind: str, options: str, where: Path) -> Iterator[Path]:
    """A file system of its own, where the machine lets us have one."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", kind, "-o", options, kind, where], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no {kind} can be mounted here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def pages_of(run: stretches.Run) -> bytes:
    """What the file must hold for one run, without the module's own arithmetic: every page that has a byte of it."""
    numbers = range(SLOT_PAGES)
    hit = [n for n in numbers if max(n * PAGE, run.slot_offset) < min((n + 1) * PAGE, run.slot_offset + run.length)]
    return b"".join(CONTENT[n * PAGE : (n + 1) * PAGE] for n in hit)


@st.composite
def any_runs(draw: st.DrawFn) -> list[stretches.Run]:
    """Runs in any order, ragged, empty, adjacent or on each other's pages."""
    edges = st.one_of(st.integers(0, SLOT_BYTES), st.integers(0, SLOT_PAGES).map(lambda n: n * PAGE))
    pairs = draw(st.lists(st.tuples(edges, edges), max_size=6))
    return [stretches.Run(min(pair), max(pair) - min(pair)) for pair in pairs]


@st.composite
def any_pieces(draw: st.DrawFn) -> tuple[bytes, list[stretches.Piece]]:
    """
    A file, and pieces of it for places in the slot that do not overlap: adjacent or not, congruent or not, of any size.
    """
    file_bytes = draw(st.integers(1, SLOT_BYTES))
    pieces: list[stretches.Piece] = []
    slot_offset = file_offset = 0
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["next", "congruent", "anywhere"]))
        if kind != "next":
            slot_offset += draw(st.sampled_from([0, 1, 100, PAGE - 1, PAGE, 2 * PAGE]))
            file_offset = draw(st.integers(0, file_bytes))
        if kind == "congruent":
            file_offset = file_offset - file_offset % PAGE + slot_offset % PAGE
        longest = min(file_bytes - file_offset, SLOT_BYTES - slot_offset)
        if longest < 0:
            break
        length = draw(st.one_of(st.integers(0, longest), st.sampled_from([0, longest]), st.just(min(longest, 7))))
        pieces.append(stretches.Piece(file_offset, slot_offset, length))
        slot_offset += length
        file_offset += length
    return CONTENT[:file_bytes], pieces


@given(runs=any_runs())
@few
def test_runs_lie_in_the_file_as_in_the_slot_page_for_page(runs: list[stretches.Run]) -> None:
    """A run keeps its place in its page, in a file that is nothing but the pages of the runs, end to end."""
    layout = directio.place(runs)
    assert layout.file_bytes == sum(len(pages_of(run)) for run in runs)
    begin = 0
    for run, offset in zip(runs, layout.file_offsets, strict=True):
        assert begin <= offset <= offset + run.length <= begin + len(pages_of(run))
        assert run.length == 0 or offset % PAGE == run.slot_offset % PAGE
        begin += len(pages_of(run))


@given(runs=any_runs(), num_threads=st.integers(1, 3), block_pages=st.integers(1, 5))
@few
def test_a_file_is_the_pages_of_its_runs(
    directory: Path, runs: list[stretches.Run], num_threads: int, block_pages: int
) -> None:
    """Whatever the runs, the block size and the threads, every byte is where `place` said, and counted once."""
    path = directory / "written"
    progress: list[int] = []
    with slot_of(CONTENT) as slot:
        written_bytes = directio.write_file(
            path, slot, runs, block_bytes=block_pages * PAGE, num_threads=num_threads, on_progress=progress.append
        )
    found = path.read_bytes()
    assert found == b"".join(pages_of(run) for run in runs)
    for run, offset in zip(runs, directio.place(runs).file_offsets, strict=True):
        assert found[offset : offset + run.length] == CONTENT[run.slot_offset : run.slot_offset + run.length]
    assert written_bytes == len(found)
    assert progress == sorted(set(progress))
    assert progress[-1:] == [written_bytes][: len(progress)]


@given(case=any_pieces(), num_threads=st.integers(1, 3), block_pages=st.integers(1, 5))
@few
def test_a_read_fills_its_pieces_in_order_and_nothing_else(
    directory: Path, case: tuple[bytes, list[stretches.Piece]], num_threads: int, block_pages: int
) -> None:
    """Every piece is whole when it is announced, in order, and no other byte of the slot has changed at the end."""
    content, pieces = case
    path = directory / "read"
    path.write_bytes(content)
    before = bytes([0xA5]) * SLOT_BYTES
    expected = bytearray(before)
    for piece in pieces:
        wanted = content[piece.file_offset : piece.file_offset + piece.length]
        expected[piece.slot_offset : piece.slot_offset + piece.length] = wanted
    announced: list[int] = []
    with slot_of(before) as slot:

        def on_piece(index: int) -> None:
            announced.append(index)
            place = slice(pieces[index].slot_offset, pieces[index].slot_offset + pieces[index].length)
            assert bytes(slot[place]) == expected[place]

        directio.read_file(
            path, slot, pieces, block_bytes=block_pages * PAGE, num_threads=num_threads, on_piece=on_piece
        )
        assert bytes(slot) == expected
    assert announced == list(range(len(pieces)))


def test_memory_that_direct_io_refuses_goes_through_the_page_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A slot at an odd address is slower, with a warning that says so, and just as exact."""
    with slot_of(b"?" + CONTENT + b"?") as memory, memory[1 : 1 + SLOT_BYTES] as slot:
        directio.write_file(tmp_path / "file", slot, [stretches.Run(0, SLOT_BYTES)], block_bytes=PAGE)
        slot[:] = bytes(SLOT_BYTES)
        directio.read_file(tmp_path / "file", slot, [stretches.Piece(0, 0, SLOT_BYTES)], block_bytes=PAGE)
        assert bytes(memory) == b"?" + CONTENT + b"?"
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert {record.levelno for record in caplog.records} <= {logging.WARNING}


def test_a_file_system_with_neither_direct_io_nor_reservation_is_written_and_read(tmp_path: Path) -> None:
    """ramfs refuses O_DIRECT at open and fallocate altogether; both are tolerated, and nothing else changes."""
    runs = [stretches.Run(100, 5 * PAGE), stretches.Run(7 * PAGE, 1)]
    with mounted("ramfs", "mode=700", tmp_path / "ram") as where, slot_of(CONTENT) as slot:
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(where / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        directio.write_file(where / "file", slot, runs, block_bytes=PAGE)
        slot[:] = bytes(SLOT_BYTES)
        offsets = directio.place(runs).file_offsets
        pieces = [
            stretches.Piece(offset, run.slot_offset, run.length) for run, offset in zip(runs, offsets, strict=True)
        ]
        directio.read_file(where / "file", slot, pieces, block_bytes=PAGE)
        assert bytes(slot[100 : 100 + 5 * PAGE]) == CONTENT[100 : 100 + 5 * PAGE]
        assert slot[7 * PAGE] == CONTENT[7 * PAGE]
        assert bytes(slot[7 * PAGE + 1 :]) == bytes(SLOT_BYTES - 7 * PAGE - 1)


def test_a_full_file_system_is_enospc_and_leaves_no_file(tmp_path: Path) -> None:
    """The error comes before any byte is written, says ENOSPC and which file; what was reserved is given back."""
    progress: list[int] = []
    with mounted("tmpfs", f"size={8 * PAGE}", tmp_path / "small") as where, slot_of(CONTENT) as slot:
        with pytest.raises(OSError, match="No space left") as caught:
            directio.write_file(
                where / "file", slot, [stretches.Run(0, SLOT_BYTES)], block_bytes=PAGE, on_progress=progress.append
            )
        assert caught.value.errno == errno.ENOSPC
        assert progress == []
        assert caught.value.filename == str(where / "file")
        assert list(where.iterdir()) == []
        assert directio.write_file(where / "file", slot, [stretches.Run(0, PAGE)]) == PAGE


def test_a_file_beyond_the_limit_of_the_process_is_efbig_and_leaves_no_file(tmp_path: Path) -> None:
    """An error of the reservation has errno and file name, and no part of a file stays behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with slot_of(CONTENT) as slot:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                directio.write_file(tmp_path / "file", slot, [stretches.Run(0, SLOT_BYTES)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_threads", [1, 4])
def test_an_error_in_a_writing_thread_is_raised_and_leaves_no_file(tmp_path: Path, num_threads: int) -> None:
    """The reservation went well and a later block failed in a thread: the caller gets that error, not a short file."""
    with cut_slot(num_pages=16, num_pages_left=6) as slot:
        with pytest.raises(OSError, match="Bad address") as caught:
            directio.write_file(
                tmp_path / "file", slot, [stretches.Run(0, 16 * PAGE)], block_bytes=PAGE, num_threads=num_threads
            )
        assert (caught.value.errno, caught.value.filename) == (errno.EFAULT, str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_reading_thread_is_raised_after_the_pieces_before_it(tmp_path: Path) -> None:
    """Pieces that are whole are announced, the error of the next one is raised, and none behind it is announced."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT[: 16 * PAGE])
    announced: list[int] = []
    pieces = [stretches.Piece(n * PAGE, n * PAGE, PAGE) for n in range(16)]
    with cut_slot(num_pages=16, num_pages_left=6) as slot:
        with pytest.raises(OSError, match="Bad address") as caught:
            directio.read_file(path, slot, pieces, block_bytes=PAGE, on_piece=announced.append)
        assert (caught.value.errno, caught.value.filename) == (errno.EFAULT, str(path))
        assert bytes(slot[: 6 * PAGE]) == CONTENT[: 6 * PAGE]
    assert announced == list(range(6))


def test_a_caller_gives_up_a_write_by_raising_and_no_file_stays(tmp_path: Path) -> None:
    """The caller's own exception comes out as it is, and the half-written file is gone."""

    class GivenUp(Exception):
        pass

    def give_up(_written_bytes: int) -> None:
        raise GivenUp

    with slot_of(CONTENT) as slot, pytest.raises(GivenUp):
        directio.write_file(
            tmp_path / "file", slot, [stretches.Run(0, SLOT_BYTES)], block_bytes=PAGE, on_progress=give_up
        )
    assert list(tmp_path.iterdir()) == []


def test_a_caller_gives_up_a_read_by_raising(tmp_path: Path) -> None:
    """A digest that does not fit ends the reading at that piece."""
    (tmp_path / "file").write_bytes(CONTENT)
    announced: list[int] = []

    def refuse_the_second(index: int) -> None:
        announced.append(index)
        if index == 1:
            raise ValueError("digest")

    pieces = [stretches.Piece(n * PAGE, n * PAGE, PAGE) for n in range(SLOT_PAGES)]
    with slot_of(bytes(SLOT_BYTES)) as slot, pytest.raises(ValueError, match="digest"):
        directio.read_file(tmp_path / "file", slot, pieces, block_bytes=PAGE, on_piece=refuse_the_second)
    assert announced == [0, 1]


def test_a_short_file_is_an_error_with_both_lengths_before_any_byte_is_read(tmp_path: Path) -> None:
    """The error names the file, what was wanted and what is there; the slot is as it was."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT[: 3 * PAGE + 5])
    with slot_of(CONTENT[::-1]) as slot:
        pieces = [stretches.Piece(0, 0, PAGE), stretches.Piece(2 * PAGE, 2 * PAGE, PAGE + 6)]
        with pytest.raises(stretches.TruncatedFile) as caught:
            directio.read_file(path, slot, pieces)
        assert bytes(slot) == CONTENT[::-1]
    assert (caught.value.wanted_bytes, caught.value.found_bytes) == (3 * PAGE + 6, 3 * PAGE + 5)
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)
    assert str(3 * PAGE + 6) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Bytes that were there at the start and are gone when their turn comes are never made up."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)

    def shrink(_index: int) -> None:
        os.truncate(path, 2 * PAGE)

    # The empty piece is announced before the first block is asked for.
    pieces = [stretches.Piece(0, 0, 0), stretches.Piece(0, 0, SLOT_BYTES)]
    with slot_of(bytes(SLOT_BYTES)) as slot, pytest.raises(stretches.TruncatedFile) as caught:
        directio.read_file(path, slot, pieces, on_piece=shrink)
    assert (caught.value.wanted_bytes, caught.value.found_bytes) == (SLOT_BYTES, 2 * PAGE)


def test_a_missing_file_is_the_ordinary_error(tmp_path: Path) -> None:
    """A file that is not there is FileNotFoundError with its name, not a truncated one."""
    with slot_of(CONTENT) as slot, pytest.raises(FileNotFoundError) as caught:
        directio.read_file(tmp_path / "none", slot, [stretches.Piece(0, 0, 1)])
    assert caught.value.filename == str(tmp_path / "none")


def test_ranges_outside_the_slot_are_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    """A wrong range is the caller's error; the file that was there before is still there, whole."""
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with slot_of(CONTENT) as slot:
        for run in (stretches.Run(0, SLOT_BYTES + 1), stretches.Run(-1, 2), stretches.Run(0, -1)):
            with pytest.raises(ValueError, match=r"[Rr]un"):
                directio.write_file(path, slot, [run])
        with pytest.raises(ValueError, match="beyond the slot"):
            directio.write_file(path, slot[: PAGE + 10], [stretches.Run(PAGE, 5)])
        with pytest.raises(ValueError, match="block_bytes"):
            directio.write_file(path, slot, [], block_bytes=PAGE + 1)
        for piece in (stretches.Piece(0, SLOT_BYTES - 1, 2), stretches.Piece(-1, 0, 2), stretches.Piece(0, 0, -1)):
            with pytest.raises(ValueError, match=r"[Pp]iece"):
                directio.read_file(path, slot, [piece])
        with slot.toreadonly() as readonly, pytest.raises(ValueError, match="read-only"):
            directio.read_file(path, readonly, [])
    assert path.read_bytes() == b"before"
