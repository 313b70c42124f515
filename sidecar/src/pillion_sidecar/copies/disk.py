"""
The local disk of a pod: writes, finds, opens and removes local copies, one folder for each rank.

    <directory>/rank-3/lineage              which session of the root these copies are known to belong to
    <directory>/rank-3/step-20-3-1.image    see `copies.head`

Called from: the executor (`executor.save.hold`, `executor.save.upload`, `executor.load.nearby`). All pods of a job on one node may share the
directory (a hostPath), as each rank is in one pod.
Must never: hold up a save for longer than its caller's bound: a disk that hangs is its caller's to notice (`executor.save.hold`).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Final, final

from pillion.wire import home, layout, manifest, remarks
from pillion.wire.remarks import Remarks
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.copies import head as head_module
from pillion_sidecar.copies.head import Copy, Head, HeadError
from pillion_sidecar.storage import digest
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.stretches import Run

_log = logging.getLogger(__name__)

KEPT_COPIES: Final = 2
"""Number of newest copies that stay on the disk. A peer may have died before it wrote the newest one, so the one before is needed too."""
HELD: Final = "held"
STORED: Final = "stored"
LINEAGE: Final = "lineage"


class LocalCopyLost(catalog.Damaged):
    """A copy is missing, damaged or of another job. Its name is in the errors that trainers get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What the head of a copy has beside what its slot says."""

    run_id: str
    wanted: bool
    started_ns: int
    cause: home.Cause


@dataclass(frozen=True, slots=True)
class CopyImage:
    """One rank's image in a local copy, as an `image.Image`, mapped read-only. Its digests were taken from the arena, before it was written."""

    layout: layout.Layout
    opaque_lengths: tuple[int, ...]
    opaque_starts: tuple[int, ...]
    memory: memoryview
    digests: tuple[str, ...]
    path: str
    remarks: Remarks

    def framed(self) -> CopyImage:
        return self

    def digested(self) -> list[str]:
        """
        Return the digests that were taken at the seal, after a comparison with the bytes on the disk.

        Raises:
            LocalCopyLost: the disk returns other bytes than were written.
        """
        for index, (start, length) in enumerate(image.extents(self)):
            if digest.digest(self.memory[start : start + length]) != self.digests[index]:
                raise LocalCopyLost(f"{self.path}: the bytes at {start}+{length} do not match their digest")
        return list(self.digests)


@dataclass(frozen=True, slots=True)
class Marks:
    """What is known of a copy besides its content."""

    held: bool
    stored: bool


@final
@dataclass
class Disk:
    """
    The copies of this pod's ranks. See the module.

    Args:
        directory: directory of this job's copies.
        ranks: the local ranks.
        world_size, run_id: of the job, to recognize its copies.
    """

    directory: str
    ranks: Sequence[int]
    world_size: int
    run_id: str
    _in_use: set[Copy] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _folder(self, rank: int) -> LocalFolder:
        return LocalFolder(os.path.join(self.directory, f"rank-{rank}"))

    # --- looking ---

    def copies(self) -> dict[Copy, Marks]:
        """Return the copies that have a whole image of every local rank. Raises: OSError."""
        by_rank: list[dict[Copy, Marks]] = []
        for rank in self.ranks:
            files = self._folder(rank).files()
            whole = (head_module.parse_stem(name.removesuffix(".head")) for name in files if name.endswith(".head"))
            by_rank.append(
                {
                    copy: Marks(f"{copy.stem}.{HELD}" in files, f"{copy.stem}.{STORED}" in files)
                    for copy in whole
                    if copy is not None and f"{copy.stem}.image" in files
                }
            )
        shared = set.intersection(*(set(each) for each in by_rank))
        return {
            copy: Marks(any(each[copy].held for each in by_rank), any(each[copy].stored for each in by_rank))
            for copy in sorted(shared)
        }

    def head(self, rank: int, copy: Copy) -> Head:
        """
        Return the head of a copy.

        Raises:
            LocalCopyLost: it is missing, damaged, or of another job, rank or world.
            OSError.
        """
        folder, name = self._folder(rank), f"{copy.stem}.head"
        try:
            data = folder.read(name)
            found = head_module.decode(data)
        except FileNotFoundError as err:
            raise LocalCopyLost(f"{folder}/{name} is missing") from err
        except HeadError as err:
            raise LocalCopyLost(f"{folder}/{name} {err}") from err
        own = (self.run_id, self.world_size, rank)
        if (found.run_id, found.world_size, found.rank) != own:
            raise LocalCopyLost(
                f"{folder}/{name} is of rank {found.rank} of {found.world_size} of the run {found.run_id!r}"
            )
        return found

    def stored(self, rank: int, copy: Copy) -> catalog.Stored:
        """
        Return a rank's copy as a load reads it: as a checkpoint that has the leaves of this rank.

        Raises:
            LocalCopyLost; OSError.
        """
        found = self.head(rank, copy)
        rank_layout = _layout(found)
        starts, _ = rank_layout.opaque_starts(found.opaque_lengths)
        file = f"{copy.stem}.image"
        chunks: dict[str, tuple[manifest.StoredChunk, ...]] = {}
        for index, item in enumerate(rank_layout.items):
            start = rank_layout.starts[index]
            chunk = manifest.StoredChunk(
                item.fqn, item.dtype, item.size, item.offsets, item.sizes,
                file, start, rank_layout.end(index) - start, found.digests[index],
            )  # fmt: skip
            chunks[item.fqn] = (*chunks.get(item.fqn, ()), chunk)
        first = len(rank_layout.items)
        opaque = {
            fqn: manifest.StoredBytes(
                fqn, file, starts[index], found.opaque_lengths[index], found.digests[first + index]
            )
            for index, fqn in enumerate(rank_layout.opaque)
        }
        return catalog.Stored(self._folder(rank), copy.step, found.image_bytes, chunks, opaque, native=True)

    @contextlib.contextmanager
    def opened(self, copy: Copy) -> Iterator[dict[int, CopyImage]]:
        """
        Map the images of every local rank. Within the context the copy is not removed.

        Raises:
            LocalCopyLost; OSError.
        """
        with self.using(copy), contextlib.ExitStack() as open_maps:
            yield {rank: self._open(rank, copy, open_maps) for rank in self.ranks}

    def _open(self, rank: int, copy: Copy, open_maps: contextlib.ExitStack) -> CopyImage:
        found = self.head(rank, copy)
        rank_layout, said = _layout(found), remarks.read(found.remarks)
        starts, image_bytes = rank_layout.opaque_starts(found.opaque_lengths)
        path = f"{self._folder(rank)}/{copy.stem}.image"
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if image_bytes != found.image_bytes or length < image_bytes:
                raise LocalCopyLost(f"{path} has {length} bytes, and its head speaks of {found.image_bytes}")
            if length == 0:
                return CopyImage(rank_layout, found.opaque_lengths, starts, memoryview(b""), found.digests, path, said)
            mapped = mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ)
        open_maps.callback(_unmap, mapped)
        return CopyImage(rank_layout, found.opaque_lengths, starts, memoryview(mapped), found.digests, path, said)

    @contextlib.contextmanager
    def using(self, copy: Copy) -> Iterator[None]:
        """Keep a copy from being removed within the context."""
        with self._lock:
            self._in_use.add(copy)
        try:
            yield
        finally:
            with self._lock:
                self._in_use.discard(copy)

    # --- writing ---

    def write(
        self,
        copy: Copy,
        slot_images: Mapping[int, image.SlotImage],
        about: About,
        *,
        num_threads: int,
        on_progress: Callable[[int], None],
    ) -> int:
        """
        Write the copy of every local rank. Return its bytes. It is whole when this returns.

        Args:
            on_progress: called with the bytes that a sync is to make durable next; 0 between two blocks, before a slot is read, and before the
                head, which makes the copy whole. An error of it ends the write.

        Blocks: until the disk has taken everything.

        Raises:
            OSError: such as a full disk. Nothing of the copy is left, if possible.
        """
        try:
            return sum(
                self._write(rank, copy, slot_image, about, num_threads, on_progress)
                for rank, slot_image in slot_images.items()
            )
        except BaseException:  # also after Ctrl-C no part of a copy may stay
            with contextlib.suppress(OSError):
                self.remove([copy])
            raise

    def _write(
        self,
        rank: int,
        copy: Copy,
        slot_image: image.SlotImage,
        about: About,
        num_threads: int,
        on_progress: Callable[[int], None],
    ) -> int:
        folder = self._folder(rank)
        folder.make()
        on_progress(0)
        framed = slot_image.framed()
        image_bytes = framed.header.image_bytes
        with futures.ThreadPoolExecutor(1, "pillion-digest") as pool:
            digesting = pool.submit(framed.digested)
            if image_bytes:
                folder.write(
                    {f"{copy.stem}.image": [Run(0, image_bytes)]},
                    framed.memory,
                    num_threads=num_threads,
                    on_progress=lambda _, written_bytes: on_progress(
                        image_bytes if written_bytes >= image_bytes else 0
                    ),
                )
            else:
                folder.put(f"{copy.stem}.image", b"")
            digests = digesting.result()
        on_progress(0)
        head = Head(
            rank=rank,
            world_size=self.world_size,
            run_id=about.run_id,
            image_bytes=image_bytes,
            layout=framed.layout.encoded.decode(),
            opaque_lengths=framed.opaque_lengths,
            digests=tuple(digests),
            wanted=about.wanted,
            remarks=framed.remarks.to_document(),
            started_ns=about.started_ns,
            cause=about.cause,
        )
        folder.put(f"{copy.stem}.head", head.encode())
        return image_bytes

    def mark(self, copy: Copy, mark: str) -> None:
        """Note that every pod has a copy (HELD), or that its save is on storage (STORED). Raises: OSError."""
        for rank in self.ranks:
            self._folder(rank).put(f"{copy.stem}.{mark}", b"")

    def remove(self, copies: Collection[Copy]) -> None:
        """Remove copies. The head goes first, so that no copy is half there. Raises: OSError."""
        for rank in self.ranks:
            for copy in copies:
                self._folder(rank).delete([f"{copy.stem}.{end}" for end in ("head", "image", HELD, STORED)])

    def tidy(self, but: Collection[Copy] = ()) -> None:
        """Remove the copies that are not needed any more, and what killed writes have left. Raises: OSError."""
        found = self.copies()
        with self._lock:
            kept = self._in_use | set(but)
        newest_stored = max((copy for copy, marks in found.items() if marks.stored), default=None)
        # An older one that waits was passed over.
        waiting = [
            copy
            for copy, marks in found.items()
            if (newest_stored is None or copy > newest_stored) and not marks.stored and self._is_wanted(copy)
        ]
        self.remove([copy for copy in surplus(found, waiting) if copy not in kept])
        for rank in self.ranks:
            folder = self._folder(rank)
            files = folder.files()
            stems = {name.rpartition(".")[0]: head_module.parse_stem(name.rpartition(".")[0]) for name in files}
            folder.delete(
                [
                    name
                    for name in files
                    if (copy := stems[name.rpartition(".")[0]]) is not None
                    and copy not in kept
                    and f"{copy.stem}.head" not in files
                ]
            )

    def _is_wanted(self, copy: Copy) -> bool:
        try:
            return self.head(self.ranks[0], copy).wanted
        except catalog.Damaged:
            return False

    def make_room(self) -> bool:
        """Remove the oldest copy that is on storage. Return whether there was one. Raises: OSError."""
        with self._lock:
            in_use = set(self._in_use)
        stored = [copy for copy, marks in self.copies().items() if marks.stored and copy not in in_use]
        self.remove(stored[:1])
        return bool(stored)

    # --- lineage ---

    def belong_to(self, line: str) -> bool:
        """
        Take up the copies that earlier sessions of the same root have left, or remove them.

        A root may be removed, and a job of the same name may begin again on this node: its copies are of another training.

        Args:
            line: what all sessions of the root have in common, also those that did not use this disk.

        Returns:
            Whether the copies on the disk belong to this root. False: they are removed.

        Raises: OSError.
        """
        belong = True
        for rank in self.ranks:
            folder = self._folder(rank)
            folder.make()
            try:
                before = folder.read(LINEAGE).decode(errors="replace")
            except FileNotFoundError:
                before = ""
            if before != line:
                found = [name for name in folder.files() if name != LINEAGE]
                belong = belong and not found
                folder.delete(found)
            folder.put(LINEAGE, line.encode())
        return belong


def surplus(found: Mapping[Copy, Marks], waiting: Sequence[Copy]) -> list[Copy]:
    """
    Return the copies that are not needed: all but the newest KEPT_COPIES, and the newest that waits for storage. Pure.

    Older ones that wait are passed over: storage gets the newest.
    """
    kept = {*sorted(found)[-KEPT_COPIES:], *sorted(waiting)[-1:]}
    return [copy for copy in sorted(found) if copy not in kept]


def _layout(found: Head) -> layout.Layout:
    try:
        return layout.decode(found.layout.encode())
    except ValueError as err:
        raise LocalCopyLost(f"a head's layout cannot be used: {err}") from err


def _unmap(mapped: mmap.mmap) -> None:
    # A view may still exist after a failure. Then the mapping ends with that view.
    with contextlib.suppress(BufferError):
        mapped.close()
