"""
This pod's share of a save: where each chunk lies in its file, writing the files, and the part file that says so.

Called from: `executor.save.persist` (every pod), `executor.save.commit` (the coordinator computes where everybody's chunks lie).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, Final

from pillion.wire import layout, manifest, names
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.executor.save import replicas
from pillion_sidecar.executor.save.request import Request
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import digest, directio, durable, folders

SWITCH_S: Final = 0.0005
"""sys.setswitchinterval of this process: a thread that goes on with the next block does not wait 5 ms for one that digests."""


class PodWriter:
    """Where this pod writes what."""

    def __init__(self, context: Context, request: Request, plan: plan_module.Plan) -> None:
        self.context = context
        self.plan = plan
        self.step = request.step
        self.directory = directory_of(context, request)
        self.generation = generation_of(context, request)
        self._repeated = request.repeated
        self._made = context.begun_files(self.directory, self.generation)

    def write(self, slot_images: Mapping[int, image.SlotImage]) -> dict[str, Any]:
        """
        Frame, write and digest; leave the part file.

        Returns:
            The result document: what was written, or each local rank that failed and why. Never raises: whatever failed here is
            told to every rank.
        """
        try:
            return self._write(slot_images)
        except Exception as err:  # a boundary, see above
            return failed(dict.fromkeys(self.context.local_ranks, err))

    def _write(self, slot_images: Mapping[int, image.SlotImage]) -> dict[str, Any]:
        watch = self.context.watch
        watch.storage(f"write {self.directory}")
        if self._repeated and commit.is_committed_as(self.directory, self.generation):
            return self._written_before()
        folders.make(self.directory)
        sys.setswitchinterval(SWITCH_S)
        failures: dict[int, Exception] = {}
        places: dict[int, tuple[image.SlotImage, RankPlacement]] = {}
        for rank, slot_image in slot_images.items():
            try:
                place = RankPlacement(rank, slot_image.layout, slot_image.opaque_lengths, self.plan, self.generation)
                places[rank] = image.frame(slot_image), place
            except Exception as err:  # a boundary: the other local ranks' failures are to be told too
                failures[rank] = err
        files = {place.file: place.file_bytes for _, place in places.values() if place.runs}
        with futures.ThreadPoolExecutor(1, "pillion-digest") as pool:
            # Beside the writing, and its text too: 10,000 tensors take as long as writing 200 MiB.
            describing = pool.submit(self._describe, places, files)
            for rank, (slot_image, place) in places.items():
                try:
                    if place.runs:
                        self._write_file(slot_image, place)
                except Exception as err:  # a boundary, as above
                    failures[rank] = err
        if failures:
            self.discard()
            return failed(failures)
        part, compared = describing.result()
        name = names.part_file(self.context.first_rank, self.generation)
        watch.storage(f"write {name}", len(part))
        self._begin(name)
        durable.replace_file(os.path.join(self.directory, name), part)
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
        """An executor before this one has brought the save to its commit: nothing that is committed is written again."""
        name = names.part_file(self.context.first_rank, self.generation)
        with open(os.path.join(self.directory, name), "rb") as file:
            part = file.read()
        return self._result(name, part, manifest.decode_part(part).files)

    def _begin(self, name: str) -> None:
        """
        A file is about to be written.

        Raises:
            FileExistsError: somebody else has written it. No save has the name of another, so that it is none of Pillion's.
        """
        path = os.path.join(self.directory, name)
        if name not in self._made and not self._repeated and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "this save has not written it, and leaves it alone", path)
        self._made.add(name)

    def discard(self) -> None:
        """Remove what this save has written here, and the directory when nothing else is in it."""
        if commit.is_committed_as(self.directory, self.generation):
            return
        for name in sorted(self._made):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.directory, name))
        self._made.clear()
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

    def _write_file(self, slot_image: image.SlotImage, place: RankPlacement) -> None:
        self._begin(place.file)
        watch = self.context.watch
        what = f"write {place.file}"

        def progressed(written_bytes: int) -> None:
            # Behind the last block comes the sync, of what went through the page cache.
            watch.storage(what, 0 if written_bytes < place.file_bytes else place.file_bytes)

        watch.storage(what)
        directio.write_file(
            os.path.join(self.directory, place.file),
            slot_image.memory,
            place.runs,
            num_threads=self.context.write_threads,
            on_progress=progressed,
        )

    def _describe(
        self, places: Mapping[int, tuple[image.SlotImage, RankPlacement]], files: Mapping[str, int]
    ) -> tuple[bytes, dict[str, Any]]:
        """Digest every rank's image; the part file, and what the result says of replicas."""
        digested: list[replicas.Digested] = []
        chunks: list[manifest.StoredChunk] = []
        opaque: list[manifest.StoredBytes] = []
        paths: dict[str, tuple[str | int, ...]] = {}
        for slot_image, place in places.values():
            digests = image.digest_all(slot_image)
            digested.append((slot_image.layout, digests))
            chunks += [chunk for _, chunk in place.chunks(digests)]
            opaque += [leaf for _, leaf in place.opaque(digests[len(slot_image.layout.items) :])]
            paths |= slot_image.layout.paths
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
        )
        compared: dict[str, Any] = {"differing": replicas.within(digested)}
        if len(self.context.pods) > 1 and self.context.sampled != self.plan.plan_id:
            compared["sample"] = replicas.sample(digested)
            self.context.sampled = self.plan.plan_id
        return part.encode(), compared


class RankPlacement:
    """Where one rank's chunks lie in its file. Pure: the coordinator computes the same for every rank."""

    def __init__(
        self,
        rank: int,
        rank_layout: layout.Layout,
        opaque_lengths: tuple[int, ...],
        plan: plan_module.Plan,
        generation: str,
    ) -> None:
        self.layout = rank_layout
        self.file = names.data_file(rank, 0, generation)
        self._opaque_lengths = opaque_lengths
        self._item_ranges = plan.items.get(rank, ())
        self._opaque_ranges = plan.opaque.get(rank, ())
        self._opaque_starts, _ = rank_layout.opaque_starts(opaque_lengths)
        self.runs = [
            directio.Run(rank_layout.starts[a], rank_layout.end(b - 1) - rank_layout.starts[a])
            for a, b in self._item_ranges
        ]
        for first, last in self._opaque_ranges:
            start = self._opaque_starts[first]
            end = self._opaque_starts[last - 1] + opaque_lengths[last - 1]
            self.runs.append(directio.Run(start, end - start))
        self._placed = directio.place(self.runs)
        self.file_bytes = self._placed.file_bytes

    def chunks(self, digests: Sequence[str] | None = None) -> list[tuple[int, manifest.StoredChunk]]:
        """(index of the item, its chunk); `digests` are those of all items."""
        chunks = []
        rank_layout = self.layout
        for run, (first, last) in enumerate(self._item_ranges):
            shift = self._placed.file_offsets[run] - self.runs[run].slot_offset
            for index in range(first, last):
                item, start = rank_layout.items[index], rank_layout.starts[index]
                chunks.append(
                    (
                        index,
                        manifest.StoredChunk(
                            item.fqn, item.dtype, item.size, item.offsets, item.sizes,
                            self.file, start + shift, rank_layout.end(index) - start, digests[index] if digests else "",
                        ),
                    )
                )  # fmt: skip
        return chunks

    def opaque(self, digests: Sequence[str] | None = None) -> list[tuple[int, manifest.StoredBytes]]:
        """(index of the opaque leaf, it); `digests` are those of all opaque leaves."""
        leaves = []
        for position, (first, last) in enumerate(self._opaque_ranges):
            run = len(self._item_ranges) + position
            shift = self._placed.file_offsets[run] - self.runs[run].slot_offset
            for index in range(first, last):
                fqn, start, leaf_digest = (
                    self.layout.opaque[index],
                    self._opaque_starts[index],
                    digests[index] if digests else "",
                )
                leaf = manifest.StoredBytes(fqn, self.file, start + shift, self._opaque_lengths[index], leaf_digest)
                leaves.append((index, leaf))
        return leaves


def directory_of(context: Context, request: Request) -> str:
    """Where a save goes."""
    return str((request.destination or {}).get("path") or context.step_path(request.step))


def generation_of(context: Context, request: Request) -> str:
    """What every file name of this save carries: see `checkpoint.commit.generation_text`."""
    number = request.sequence or commit.save_number(context.epoch, rescued=request.rescued)
    return commit.generation_text(context.generation, number)


def failed(errors: Mapping[int, Exception]) -> dict[str, Any]:
    """The result document of a pod whose ranks failed; `errnos` are there when it was the storage every time."""
    failures = {rank: failures_module.of_exception(err) for rank, err in errors.items()}
    errnos = [err.errno for err in errors.values() if isinstance(err, OSError) and err.errno is not None]
    document: dict[str, Any] = {"failures": failures_module.documents(failures)}
    return document | ({"errnos": errnos} if len(errnos) == len(errors) else {})
