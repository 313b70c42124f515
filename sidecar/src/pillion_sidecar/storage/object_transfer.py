"""
Transfers bulk bytes between arena memory and the objects of a bucket, with several requests at a time.

An object is exactly its stretches of memory. It is written by one request, whole or not at all. An upload in flight uses no memory besides the
arena. A load uses CHUNK_BYTES for each request, and copies each byte once.

Called from: `storage.objects`.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, final

from pillion import fault_points
from pillion_sidecar.storage import blocks
from pillion_sidecar.storage.object_client import MAX_OBJECT_BYTES
from pillion_sidecar.storage.object_errors import OutOfRange
from pillion_sidecar.storage.object_requests import PART_BYTES, Bucket
from pillion_sidecar.storage.stretches import Piece, Run, TruncatedFile

RANGE_BYTES: Final = 16 << 20
"""Maximum of bytes that one request reads. It is large enough to make the latency unimportant, and small enough for early digests."""


@final
class Pace:
    """
    The bandwidth limit of a pod. An object begins when the time for the objects before it is over. Threads share the limit.

    A request itself is not slowed down: obstore takes all its bytes at once. So the limit holds for the time of several objects.

    Args:
        bytes_per_s: bandwidth limit, bytes per second; None: no limit.
    """

    def __init__(self, bytes_per_s: int | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._turn = threading.Lock()
        self._free_at_s = 0.0

    def take(self, length: int, stopped: threading.Event) -> None:
        """
        Wait until `length` bytes may be sent.

        Blocks: until then, or until `stopped` is set. The limit and the sizes of the objects before this one determine how long that is.
        """
        if self._bytes_per_s is None:
            return
        with self._turn:
            wait_s = self._free_at_s - time.monotonic()
            if wait_s > 0:
                stopped.wait(wait_s)
            self._free_at_s = time.monotonic() + length / self._bytes_per_s


def send(
    bucket: Bucket,
    keys: Mapping[str, str],
    files: Mapping[str, Sequence[Run]],
    memory: memoryview,
    *,
    pace: Pace,
    on_progress: Callable[[str, int], None],
) -> None:
    """
    Write objects, each gathered from its runs of `memory`.

    Args:
        keys: name in `files` -> key of the object, in the order of the uploads.
        on_progress: called in this thread with the name and the number of bytes, in the order of `keys`, when an object and all before it are
            written. For an object in parts it is also called during the upload, with the bytes that are on their way. While the bandwidth limit lets
            nothing be sent, it is called again and again with the same number: then the storage is not the one that everybody waits for.

    Blocks: until every request that has begun has ended, also after an error, because the requests read the memory.
    Raises: OSError; ValueError if a run is outside the memory.
    """
    flat = memoryview(memory).cast("B")
    for name in keys:
        for run in files[name]:
            if run.slot_offset < 0 or run.length < 0 or run.slot_offset + run.length > flat.nbytes:
                raise ValueError(f"{run} of {name} lies outside the memory of {flat.nbytes} bytes")
    upload = _Upload(bucket, keys, files, flat, pace, on_progress)
    try:
        blocks.run_in_order(len(keys), bucket.options.parallelism, upload.put, upload.tell_whole, upload.tell_moving)
    except OSError as err:
        if err in upload.failures:
            raise upload.failures[0] from None
        raise


@final
class _Upload:
    """The objects of one call of `send`, by their index in it. Its threads share it."""

    def __init__(
        self,
        bucket: Bucket,
        keys: Mapping[str, str],
        files: Mapping[str, Sequence[Run]],
        memory: memoryview,
        pace: Pace,
        on_progress: Callable[[str, int], None],
    ) -> None:
        self.failures: list[BaseException] = []
        self._bucket, self._memory, self._pace, self._on_progress = bucket, memory, pace, on_progress
        self._names, self._keys = list(keys), list(keys.values())
        self._runs = [files[name] for name in keys]
        self._lengths = [sum(run.length for run in runs) for runs in self._runs]
        self._taken = [0] * len(self._names)
        self._told = [0] * len(self._names)
        self._stopped = threading.Event()
        self._counting = threading.Lock()
        self._num_sending = 0

    def put(self, index: int) -> None:
        """Send one object, in a thread of its own."""
        url = self._bucket.url(self._keys[index])
        try:
            self._pace.take(self._lengths[index], self._stopped)
            if self._stopped.is_set():
                raise OSError(errno.ECANCELED, "the upload was given up", url)
            self._count_sending(1)
            try:
                self._bucket.send(self._keys[index], self._views(index), self._lengths[index])
            finally:
                self._count_sending(-1)
            fault_points.reach(fault_points.FaultPoint.WRITE, path=url)
        except BaseException as err:
            # A thread that waits in `Pace.take` gives up too, with an error of its own. The first error counts.
            self.failures.append(err)
            self._stopped.set()
            raise

    def _count_sending(self, change: int) -> None:
        with self._counting:
            self._num_sending += change

    def _views(self, index: int) -> Iterator[memoryview]:
        """Yield the runs in views of a part at most. obstore takes them one by one, so that they show the progress of a large object."""
        for run in self._runs[index]:
            for start in range(run.slot_offset, run.slot_offset + run.length, PART_BYTES):
                yield self._memory[start : min(start + PART_BYTES, run.slot_offset + run.length)]
                self._taken[index] += min(PART_BYTES, run.slot_offset + run.length - start)

    def tell_whole(self, index: int) -> None:
        """Announce that an object and all before it are written."""
        self._tell(index, self._lengths[index])

    def tell_moving(self, index: int) -> None:
        """
        Announce the progress of an object in parts, or that all wait for the bandwidth limit.

        A single request takes all its views at once, which is no progress. Its own bound ends it.
        """
        if self._num_sending == 0:
            self._tell(index, self._told[index])
        elif self._lengths[index] > MAX_OBJECT_BYTES and self._told[index] < self._taken[index] < self._lengths[index]:
            self._told[index] = self._taken[index]
            self._tell(index, self._told[index])

    def _tell(self, index: int, num_bytes: int) -> None:
        try:
            self._on_progress(self._names[index], num_bytes)
        except BaseException:
            self._stopped.set()
            raise


def fetch(
    bucket: Bucket, key: str, memory: memoryview, pieces: Sequence[Piece], *, on_piece: Callable[[int], None]
) -> None:
    """
    Read pieces of an object into memory, and touch no other byte of it. `on_piece` is called as in `Folder.read_into`.

    Raises: FileNotFoundError; TruncatedFile; OSError; ValueError if a piece is outside the memory, or the memory is read-only.
    """
    flat = memoryview(memory).cast("B")
    if flat.readonly:
        raise ValueError("the memory to read into is read-only")
    ranges, last_ranges = blocks.cut(pieces, flat.nbytes, RANGE_BYTES)
    wanted_bytes = max((piece.file_offset + piece.length for piece in pieces), default=0)

    def read(each: Piece) -> None:
        got = 0
        try:
            for chunk in bucket.fetch(key, each.file_offset, each.file_offset + each.length):
                count = min(len(chunk), each.length - got)
                flat[each.slot_offset + got : each.slot_offset + got + count] = chunk[:count]
                got += count
        except OutOfRange:
            pass
        if got < each.length:
            raise truncated(bucket, key, wanted_bytes)

    blocks.move(ranges, last_ranges, num_threads=bucket.options.parallelism, read=read, on_piece=on_piece)


def truncated(bucket: Bucket, key: str, wanted_bytes: int) -> OSError:
    """Return the error of an object that has fewer bytes than requested. Raises: OSError of the request for its length."""
    entry = bucket.head(key)
    if entry is None:
        return FileNotFoundError(errno.ENOENT, "the object was removed meanwhile", bucket.url(key))
    if entry.length >= wanted_bytes:
        return OSError(errno.EIO, "the answer ended before the object does", bucket.url(key))
    return TruncatedFile(bucket.url(key), wanted_bytes=wanted_bytes, found_bytes=entry.length)
