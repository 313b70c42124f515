"""
One pod's share of a save: computes where each chunk lies in its file, writes the files, and writes the part, which lists them.

Called from: `executor.save.persist` (every pod), `executor.save.commit` (the coordinator computes the places of all pods' chunks).
"""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, Final

from pillion import progress
from pillion.wire import events, layout, manifest, names
from pillion.wire.remarks import Remarks
from pillion_sidecar import channel
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.executor.save import replicas
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import digest, generation, placement
from pillion_sidecar.storage.folder import Entry, Folder
from pillion_sidecar.storage.stretches import Run

SWITCH_S: Final = 0.0005
"""sys.setswitchinterval of this process. With the default a thread would wait 5 ms for a digest before it writes its next block."""


class PodWriter:
    """Writes this pod's share of one save."""

    def __init__(self, context: Context, request: channel.Persist, plan: plan_module.Plan) -> None:
        self.context = context
        self.plan = plan
        self.step = request.step
        self.folder = folder_of(context, request)
        self.generation = generation_of(context, request)
        self._repeated = request.repeated
        self._made = context.begun_files(str(self.folder), self.generation)
        self._listed: Mapping[str, Entry] = {}
        self.is_new = False
        """Whether the folder had no file of another save when the last write into it began."""
        self._written: dict[str, int] = {}
        """File -> bytes that are written."""
        self._begun_s = time.monotonic()
        self._rhythm = progress.Rhythm(self._begun_s)
        self._size_bytes = 0
        self.remarks = Remarks()
        """What rank 0's script said about the save, in rank 0's pod. Known after `write`."""

    def write(self, images: Mapping[int, image.Image]) -> dict[str, Any]:
        """
        Frame the images, write and digest them, and write the part.

        Returns:
            The result document: the written files, or each failed local rank with its error. Never raises, because every rank must learn of
            any failure here.
        """
        try:
            return self._write(images)
        except Exception as err:  # a boundary: see the docstring
            return failed(dict.fromkeys(self.context.local_ranks, err))

    def _write(self, images: Mapping[int, image.Image]) -> dict[str, Any]:
        watch = self.context.watch
        watch.storage(f"write {self.folder}")
        if self._repeated and commit.is_committed_as(self.folder, self.generation):
            return self._written_before()
        self.folder.make()
        sys.setswitchinterval(SWITCH_S)
        failures: dict[int, Exception] = {}
        places: dict[int, tuple[image.Image, RankPlacement]] = {}
        for rank, rank_image in images.items():
            try:
                place = RankPlacement(
                    rank,
                    rank_image.layout,
                    rank_image.opaque_lengths,
                    self.plan,
                    self.generation,
                    self.context.object_bytes,
                )
                places[rank] = rank_image.framed(), place
            except Exception as err:  # a boundary: the failures of the other local ranks must be reported too
                failures[rank] = err
        files = {name: file.file_bytes for _, place in places.values() for name, file in place.files.items()}
        self._size_bytes, self._written = sum(files.values()), {}
        name = names.part_file(self.context.first_rank, self.generation)
        self._begin([*files, name])
        with futures.ThreadPoolExecutor(1, "pillion-digest") as pool:
            # Runs while the files are written. To describe 10,000 tensors takes as long as to write 200 MiB.
            describing = pool.submit(self._describe, places, files)
            for rank, (rank_image, place) in places.items():
                try:
                    self._write_files(rank_image, place)
                except Exception as err:  # a boundary, as above
                    failures[rank] = err
        if failures:
            if self.folder.object_bytes is None:
                self.discard()
            # In a bucket every file that exists is whole, and the next try sends only the others. After the last try `persist` discards all of them.
            return failed(failures)
        part, compared = describing.result()
        watch.storage(f"write {self.folder}/{name}", len(part))
        self.folder.put(name, part)
        watch.idle()
        return self._result(name, part, files) | compared

    def _result(self, name: str, part: bytes, files: Mapping[str, int]) -> dict[str, Any]:
        return {
            "failures": {},
            "generation": self.generation,
            "part": name,
            "digest": digest.digest(part),
            "length": len(part),
            "files": dict(files),
            "size_bytes": sum(files.values()) + len(part),
        }

    def _written_before(self) -> dict[str, Any]:
        """Return the result of a save that an earlier executor has committed. Committed files are not written again."""
        name = names.part_file(self.context.first_rank, self.generation)
        part = self.folder.read(name)
        decoded = manifest.decode_part(part)
        self.remarks = decoded.remarks
        return self._result(name, part, decoded.files)

    def _begin(self, files: Sequence[str]) -> None:
        """
        Check that no file of this save exists yet, and note the files as written by it.

        Raises:
            FileExistsError: a file exists. No two saves have the same file names, so another program has written it.
        """
        self._listed = self.folder.files()
        self.is_new = all(generation.in_file_name(name) == self.generation for name in self._listed)
        if not self._repeated:
            for name in files:
                if name in self._listed and name not in self._made:
                    path = f"{self.folder}/{name}"
                    raise FileExistsError(errno.EEXIST, "this save has not written it, and leaves it alone", path)
        self._made.update(files)

    def discard(self) -> None:
        """Remove the files that this save has written, and the folder if it is then empty."""
        try:
            if commit.is_committed_as(self.folder, self.generation):
                return
        except OSError:
            return  # it is not known whether the save is committed; retention removes the files after a later commit
        for name in sorted(self._made):
            with contextlib.suppress(OSError):
                self.folder.delete([name])
        self._made.clear()
        self.folder.remove_if_empty()

    def _write_files(self, rank_image: image.Image, place: RankPlacement) -> None:
        watch = self.context.watch

        def progressed(name: str, written_bytes: int) -> None:
            # After the last block the files are synced. That writes the bytes that went through the page cache.
            file_bytes = place.files[name].file_bytes
            watch.storage(f"write {self.folder}/{name}", 0 if written_bytes < file_bytes else file_bytes)
            self._written[name] = min(written_bytes, file_bytes)
            self._tell()

        watch.storage(f"write {self.folder}/{next(iter(place.files), '')}")
        self.folder.write(
            {name: file.runs for name, file in place.files.items()},
            rank_image.memory,
            num_threads=self.context.write_threads,
            on_progress=progressed,
            listed=self._listed,
        )

    def _tell(self) -> None:
        """Tell the supervisor how far this save is, if it is long."""
        now_s = time.monotonic()
        if self._rhythm.due(now_s):
            self.context.say(
                events.Persisting(
                    step=self.step,
                    written_bytes=sum(self._written.values()),
                    size_bytes=self._size_bytes,
                    elapsed_s=now_s - self._begun_s,
                )
            )

    def _describe(
        self, places: Mapping[int, tuple[image.Image, RankPlacement]], files: Mapping[str, int]
    ) -> tuple[bytes, dict[str, Any]]:
        """Digest every rank's image. Return the part file, and the entries of the result document about replicas."""
        digested: list[replicas.Digested] = []
        chunks: list[manifest.StoredChunk] = []
        opaque: list[manifest.StoredBytes] = []
        paths: dict[str, tuple[str | int, ...]] = {}
        for rank, (rank_image, place) in places.items():
            digests = rank_image.digested()
            digested.append((rank_image.layout, digests))
            chunks += [chunk for _, chunk in place.chunks(digests)]
            opaque += [leaf for _, leaf in place.opaque(digests[len(rank_image.layout.items) :])]
            paths |= rank_image.layout.paths
            if rank == 0:
                self.remarks = rank_image.remarks
        written = {chunk.fqn for chunk in chunks} | {leaf.fqn for leaf in opaque}
        part = manifest.Part(
            step=self.step,
            generation=self.generation,
            run_id=self.context.run_id,
            world_size=self.context.world_size,
            plan_id=self.plan.plan_id,
            ranks=self.context.local_ranks,
            files=files,
            chunks=tuple(chunks),
            opaque=tuple(opaque),
            paths={fqn: path for fqn, path in paths.items() if fqn in written},
            remarks=self.remarks,
        )
        compared: dict[str, Any] = {"differing": replicas.within(digested)}
        if len(self.context.pods) > 1 and self.context.sampled != self.plan.plan_id:
            compared["sample"] = replicas.sample(digested)
            self.context.sampled = self.plan.plan_id
        return part.encode(), compared


class RankPlacement:
    """The places of one rank's chunks in its files. Pure: the coordinator computes the same for every rank."""

    def __init__(
        self,
        rank: int,
        rank_layout: layout.Layout,
        opaque_lengths: tuple[int, ...],
        plan: plan_module.Plan,
        generation_text: str,
        object_bytes: int | None,
    ) -> None:
        self.layout = rank_layout
        self._opaque_lengths = opaque_lengths
        self._item_ranges = plan.items.get(rank, ())
        self._opaque_ranges = plan.opaque.get(rank, ())
        starts, _ = rank_layout.opaque_starts(opaque_lengths)
        ranges = [
            [
                Run(rank_layout.starts[index], rank_layout.end(index) - rank_layout.starts[index])
                for index in range(a, b)
            ]
            for a, b in self._item_ranges
        ]
        ranges += [[Run(starts[index], opaque_lengths[index]) for index in range(a, b)] for a, b in self._opaque_ranges]
        placed = placement.place(ranges, object_bytes)
        self._files = [names.data_file(rank, number, generation_text) for number in range(len(placed.files))]
        self._placed = placed.items
        self.files = dict(zip(self._files, placed.files, strict=True))
        """Name -> file, in the order of the items."""

    def chunks(self, digests: Sequence[str] | None = None) -> list[tuple[int, manifest.StoredChunk]]:
        """Return (index of the item, its chunk) for each item of the rank's share. `digests` are those of all items."""
        rank_layout = self.layout
        indices = [index for first, last in self._item_ranges for index in range(first, last)]
        chunks = []
        for index, (file, offset) in zip(indices, self._placed, strict=False):
            item, length = rank_layout.items[index], rank_layout.end(index) - rank_layout.starts[index]
            chunks.append(
                (
                    index,
                    manifest.StoredChunk(
                        item.fqn, item.dtype, item.size, item.offsets, item.sizes,
                        self._files[file], offset, length, digests[index] if digests else "",
                    ),
                )
            )  # fmt: skip
        return chunks

    def opaque(self, digests: Sequence[str] | None = None) -> list[tuple[int, manifest.StoredBytes]]:
        """Return (index of the opaque leaf, the leaf) for each opaque leaf of the share. `digests` are those of all opaque leaves."""
        indices = [index for first, last in self._opaque_ranges for index in range(first, last)]
        placed = self._placed[len(self._placed) - len(indices) :]
        leaves = []
        for index, (file, offset) in zip(indices, placed, strict=True):
            fqn, leaf_digest = self.layout.opaque[index], digests[index] if digests else ""
            leaf = manifest.StoredBytes(fqn, self._files[file], offset, self._opaque_lengths[index], leaf_digest)
            leaves.append((index, leaf))
        return leaves


def folder_of(context: Context, request: channel.Persist) -> Folder:
    """Return the folder that a save is written to."""
    path = request.destination.path if request.destination is not None else None
    return context.open_folder(path) if path else context.step_folder(request.step)


def generation_of(context: Context, request: channel.Persist) -> str:
    """Return the generation text in every file name of this save: see `storage.generation.text`."""
    number = request.sequence or generation.save_number(context.epoch, rescued=request.rescued)
    return generation.text(context.generation, number)


def failed(errors: Mapping[int, Exception]) -> dict[str, Any]:
    """Return the result document of a pod with failed ranks. It has `errnos` if every failure was an error of storage."""
    failures = {rank: failures_module.of_exception(err) for rank, err in errors.items()}
    errnos = [err.errno for err in errors.values() if isinstance(err, OSError) and err.errno is not None]
    document: dict[str, Any] = {"failures": failures_module.documents(failures)}
    return document | ({"errnos": errnos} if len(errnos) == len(errors) else {})
