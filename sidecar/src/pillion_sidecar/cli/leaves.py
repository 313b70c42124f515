"""
Reads leaves of a checkpoint, verifies each by its digest, and hands their bytes on while they are in memory.

    leaves of a file   [aaaa][bb][c][dddddddddddddddddd]        each has a digest in its part file
    stretches          [-----------------][------------]        neighbours are read together; a large leaf is read in several

Called from: the commands of `cli`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from pillion.wire import manifest
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.cli import places, reading
from pillion_sidecar.storage import digest
from pillion_sidecar.storage.folder import Folder

GAP_BYTES: Final = 64 * 1024
"""Bytes between two leaves that are read with them: less than a further request costs. They are padding."""

Leaf = manifest.StoredChunk | manifest.StoredBytes
Sink = Callable[[Leaf, int, memoryview], None]
"""Takes the bytes of a leaf from an offset on: (leaf, offset in the leaf, bytes). They are valid during the call only."""


def drop(leaf: Leaf, start: int, data: memoryview) -> None:
    """Drop the bytes: a sink for those who only verify."""


def all_of(stored: catalog.Stored) -> list[Leaf]:
    """Return every chunk and every opaque leaf of a checkpoint."""
    return [*(chunk for chunks in stored.chunks.values() for chunk in chunks), *stored.opaque.values()]


@dataclass(slots=True)
class Result:
    """The result of `read`."""

    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    """Texts that name file, leaf and what is wrong; empty: every byte could be read, and every digest matches."""


def read(
    folder: Folder,
    wanted: Iterable[Leaf],
    *,
    sink: Sink = drop,
    moved: Callable[[int], None],
    ends_at_damage: bool = False,
) -> Result:
    """
    Read leaves, in the order of their places in the files.

    A leaf without a digest (a checkpoint of another program) is read and not verified. The sink has taken the bytes of a leaf before its digest
    is known, so that a problem means that the output must not be used.

    Args:
        moved: called with the number of bytes that were read.
        ends_at_damage: whether the first problem is raised. Then the sink takes no leaf after one that is damaged.

    Raises:
        catalog.Damaged: see `ends_at_damage`.
        LoadError: the storage does not answer. That says nothing about the checkpoint.
    """
    reader = _Reader(folder, wanted, sink, moved, ends_at_damage)
    reading.run(folder, reader.stretches(), reader.take, reader.fail)
    return reader.result


class _Reader:
    def __init__(
        self, folder: Folder, wanted: Iterable[Leaf], sink: Sink, moved: Callable[[int], None], ends_at_damage: bool
    ) -> None:
        self.result = Result()
        self._ends_at_damage = ends_at_damage
        self._folder, self._sink, self._moved = folder, sink, moved
        self._leaves = sorted(wanted, key=lambda leaf: (leaf.file, leaf.offset, leaf.length))
        self._running = digest.Running()
        self._bad_files: set[str] = set()
        self._parts: deque[list[tuple[Leaf, int, int]]] = deque()
        """For each stretch that is not taken yet, what of which leaf is in it: (leaf, first byte of the leaf, number of bytes)."""

    def stretches(self) -> Iterator[reading.Stretch]:
        parts: list[tuple[Leaf, int, int]] = []
        file, start, end = "", 0, 0
        for leaf in self._leaves:
            done = 0
            while True:
                at = leaf.offset + done
                if parts and not (
                    leaf.file == file and end <= at <= end + GAP_BYTES and at - start < reading.STRETCH_BYTES
                ):
                    self._parts.append(parts)
                    yield reading.Stretch(file, start, end - start)
                    parts = []
                if not parts:
                    file, start = leaf.file, at
                count = min(leaf.length - done, start + reading.STRETCH_BYTES - at)
                parts.append((leaf, done, count))
                end, done = at + count, done + count
                if done >= leaf.length:
                    break
        if parts:
            self._parts.append(parts)
            yield reading.Stretch(file, start, end - start)

    def take(self, stretch: reading.Stretch, data: memoryview) -> None:
        for leaf, done, count in self._parts.popleft():
            start = leaf.offset + done - stretch.offset
            view = data[start : start + count]
            self.result.num_bytes += count
            self._moved(count)
            self._sink(leaf, done, view)
            if leaf.digest and leaf.file not in self._bad_files:
                self._verify(leaf, done + count, view)

    def _verify(self, leaf: Leaf, done: int, view: memoryview) -> None:
        self._running.update(view)
        if done == leaf.length and (found := self._running.finish()) != leaf.digest:
            self._note(
                f"{self._folder}/{leaf.file}: {leaf.fqn!r} at offset {leaf.offset} has digest {found}, not {leaf.digest}"
            )

    def _note(self, problem: str) -> None:
        if self._ends_at_damage:
            raise catalog.Damaged(problem)
        self.result.problems.append(problem)

    def fail(self, stretch: reading.Stretch, error: OSError) -> None:
        self._running = digest.Running()
        self._moved(sum(count for _, _, count in self._parts.popleft()))
        if stretch.file not in self._bad_files:
            self._bad_files.add(stretch.file)
            self._note(places.explain(error))
