"""
What the machine can do at best: the floors that everything else is measured against.

    python benchmarks/floors.py [--bytes 1GiB] [--dir DIR] [--repeat N] [--json]

The functions are the whole of it: each does one thing in the plainest way there is and returns the seconds it took.
Other benchmarks import them and call them in turn with the thing they measure, in the same process and on the same
memory: on a shared machine the ratio within one run means something, seconds from different runs do not.
Nothing here imports Pillion, or it would be no floor. Files are removed after use.
"""

import argparse
import ctypes
import itertools
import json
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

BLOCK_BYTES = 8 << 20
"""The size of one raw read or write; the curve is flat from 4 MiB to 16 MiB."""

ITEM_BYTES = 16 << 20
"""What one digest covers: about the size of a large tensor's shard."""

_PAGE_BYTES = 4096
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "B": 1}


def shared_memory(num_bytes: int, directory: str = "/dev/shm") -> memoryview:
    """Touched memory of a tmpfs file without a name, mapped shared: what an arena slot is. Gone with its last view."""
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        mapping = mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
    view = memoryview(mapping)
    # Not zeros, nor one page over and over: nothing below may gain from bytes that are easy to store.
    pattern = os.urandom(min(num_bytes, 1 << 20) + 1)
    for start in range(0, num_bytes, len(pattern)):
        part = view[start : start + len(pattern)]
        part[:] = pattern[: len(part)]
    return view


def memcpy_s(target: memoryview, source: memoryview, num_threads: int = 1) -> float:
    """Seconds to copy `source` into `target` with memmove(3), split evenly over threads; the GIL is released."""
    to, of = _address(target), _address(source)
    edges = [len(source) * i // num_threads for i in range(num_threads + 1)]

    def copy(start: int, end: int) -> None:
        ctypes.memmove(to + start, of + start, end - start)

    return _timed(lambda: _in_threads(copy, list(itertools.pairwise(edges))))


def memcpy_pieces_s(targets: list[memoryview], sources: list[memoryview], num_threads: int = 1) -> float:
    """
    Seconds to copy each source into its target with memmove(3), one call a piece, split evenly over threads; the GIL is released in each call.

    A busy thread may keep the GIL for a whole switch interval after each call. The interval is shortened meanwhile, as a program that hurries would.
    """
    pieces = [
        (_address(target), _address(source), len(source)) for target, source in zip(targets, sources, strict=True)
    ]
    edges = [len(pieces) * i // num_threads for i in range(num_threads + 1)]

    def copy(first: int, last: int) -> None:
        for to, of, length in pieces[first:last]:
            ctypes.memmove(to, of, length)

    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        return _timed(lambda: _in_threads(copy, list(itertools.pairwise(edges))))
    finally:
        sys.setswitchinterval(before_s)


def torch_copy_s(target: memoryview, source: memoryview) -> float:
    """Seconds for `Tensor.copy_` of the same bytes, with as many threads as torch takes by itself."""
    import torch

    to, of = torch.frombuffer(target, dtype=torch.uint8), torch.frombuffer(source, dtype=torch.uint8)
    return _timed(lambda: to.copy_(of))


def direct_write_s(path: Path, source: memoryview, block_bytes: int = BLOCK_BYTES) -> float:
    """Seconds from open to durable: one reserved file, one thread, one O_DIRECT pwrite after the other, one fsync."""

    def write() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        try:
            os.posix_fallocate(fd, 0, len(source))
            for start in range(0, len(source), block_bytes):
                block = source[start : start + block_bytes]
                if os.pwrite(fd, block, start) != len(block):
                    raise OSError(f"short write at {start}")
            os.fsync(fd)
        finally:
            os.close(fd)

    return _timed(write)


def buffered_write_s(path: Path, source: memoryview) -> float:
    """Seconds from open to durable through the page cache: write(2) until done, then fsync."""

    def write() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            start = 0
            while start < len(source):
                start += os.write(fd, source[start:])
            os.fsync(fd)
        finally:
            os.close(fd)

    return _timed(write)


def direct_read_s(path: Path, target: memoryview, block_bytes: int = BLOCK_BYTES) -> float:
    """Seconds to read a file of the target's length with one thread and O_DIRECT, one block after the other."""

    def read() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            for start in range(0, len(target), block_bytes):
                block = target[start : start + block_bytes]
                if os.preadv(fd, [block], start) != len(block):
                    raise OSError(f"short read at {start}")
        finally:
            os.close(fd)

    return _timed(read)


def xxh3_s(source: memoryview, item_bytes: int = ITEM_BYTES) -> float:
    """Seconds for xxh3_128 of every item of `source`, one thread."""
    import xxhash

    def hash_all() -> None:
        for start in range(0, len(source), item_bytes):
            xxhash.xxh3_128_digest(source[start : start + item_bytes])

    return _timed(hash_all)


def _timed(act: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    act()
    return time.perf_counter() - begin_s


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _in_threads(act: Callable[[int, int], None], ranges: list[tuple[int, int]]) -> None:
    threads = [threading.Thread(target=act, args=item) for item in ranges[1:]]
    for thread in threads:
        thread.start()
    act(*ranges[0])
    for thread in threads:
        thread.join()


def _parsed_bytes(text: str) -> int:
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            num_bytes = int(float(text.removesuffix(unit)) * factor)
            break
    else:
        num_bytes = int(text)
    if num_bytes <= 0 or num_bytes % _PAGE_BYTES:
        raise argparse.ArgumentTypeError(f"wanted a positive multiple of {_PAGE_BYTES} bytes, like 1GiB, got {text}")
    return num_bytes


def measure(num_bytes: int, directory: Path, repeat: int) -> dict[str, list[float]]:
    """Seconds of every floor, `repeat` times in turn, so that a disturbance of the machine meets all of them alike."""
    seconds: dict[str, list[float]] = {}
    source, target = shared_memory(num_bytes), shared_memory(num_bytes)
    with tempfile.TemporaryDirectory(dir=directory, prefix="floors-") as scratch:
        path = Path(scratch) / "data"
        cases: dict[str, Callable[[], float]] = {
            "memcpy, 1 thread": lambda: memcpy_s(target, source),
            "memcpy, 2 threads": lambda: memcpy_s(target, source, 2),
            "torch copy_": lambda: torch_copy_s(target, source),
            "xxh3_128": lambda: xxh3_s(source),
            "write, buffered + fsync": lambda: buffered_write_s(path, source),
            "write, O_DIRECT + fsync": lambda: direct_write_s(path, source),
            "read, O_DIRECT": lambda: direct_read_s(path, target),
        }
        for _ in range(repeat):
            for name, case in cases.items():
                seconds.setdefault(name, []).append(case())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="What the machine can do at best.")
    parser.add_argument("--bytes", type=_parsed_bytes, default=1 << 30, help="how much to move each time, like 1GiB")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where files are written")
    parser.add_argument("--repeat", type=int, default=3, help="how many times each floor is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    seconds = measure(args.bytes, args.dir, args.repeat)
    if args.json:
        json.dump({"bytes": args.bytes, "seconds": seconds}, sys.stdout)
        print()
        return
    print(f"{'floor':26} {'median s':>9} {'best s':>9} {'median GB/s':>12}")
    for name, values in seconds.items():
        median_s = statistics.median(values)
        print(f"{name:26} {median_s:9.3f} {min(values):9.3f} {args.bytes / median_s / 1e9:12.2f}")


if __name__ == "__main__":
    main()
