"""
`pillion cp`: copies one step between any two places, verified, visible only when it is whole. Called from: `cli.main`.

    source   part-*.json, data files        destination   step-N: data files, part-*.json, manifest, .metadata (the last makes it visible)

The bytes of every leaf are verified while they pass. Into a bucket, files are cut at the size of its objects; the parts of the copy name the new
places. So stock `torch.distributed.checkpoint.load` reads the copy as it reads the original.

A copy has generation 0: in its new root it is older than all that trainings save there. So it never takes the place of a root's newest checkpoint,
and a training that begins in an empty root continues from the largest copied step. The rest of the generation's text comes from the source's
manifest: a second `cp` of the same checkpoint finds the files of an interrupted one, and sends only what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import mmap
import os
import re
import secrets
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Final, TypeVar, final

from pillion.errors import CommitError
from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import catalog, commit, pins
from pillion_sidecar.cli import contents, leaves, output, places
from pillion_sidecar.cli.exits import Ended, Exit, not_found, wrong_usage
from pillion_sidecar.storage import digest, durable
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.stretches import Run

UPLOADS: Final = 4
"""Number of objects that are sent together. Each is in memory until it is sent."""
COPY: Final = re.compile(r"0-0-[0-9a-f]{8}")
"""Generation text of a copy."""


def run(arguments: argparse.Namespace) -> Exit:
    """Copy a step. FOUND: the source is damaged, or the destination has another checkpoint of that step; nothing is visible then."""
    options, ca_file = places.storage_options(arguments, os.environ)
    to_options, _ = places.storage_options(arguments, os.environ, "to_")
    place = places.open_place(arguments.src, options, ca_file)
    folder, number = places.checkpoint_of(place, arguments.step)
    root, to_step = places.open_new(arguments.dst, to_options, ca_file)
    source = read_source(folder, number)
    step = source.committed.step
    if to_step is not None and to_step != step:
        raise wrong_usage(
            f"{arguments.dst} names step {to_step}, and the checkpoint is of step {step}: a copy keeps its step; name the root"
        )
    target = catalog.step_folder(root, step)
    if str(target) == str(folder):
        raise wrong_usage(f"{folder} cannot be copied onto itself")
    num_bytes, rate = copy(source, target, is_quiet=arguments.quiet)
    if arguments.pin:
        pins.pin(root, step, reason=f"copied from {folder}")
    if num_bytes is None:
        output.show(f"{target} holds this checkpoint already\n")
    else:
        output.show(
            f"{target}  {output.size(num_bytes)} at {output.size(int(rate))}/s, verified{', pinned' if arguments.pin else ''}\n"
        )
    return Exit.WELL


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to copy, with all that its commit says."""

    folder: Folder
    committed: manifest.Manifest
    parts: tuple[manifest.Part, ...]
    generation: str
    """Generation text of the copy."""


def read_source(folder: Folder, step: int | None) -> Source:
    """Read manifest and parts. Raises: Ended: another program wrote the checkpoint; catalog.Damaged; LoadError."""
    stored = contents.read(folder, step)  # verifies the parts and the marker
    if not stored.native:
        raise not_found(
            f"{folder} was written by another program, and has no digests: copy it with cp, or with the tool of the bucket"
        )
    encoded = commit.read_manifest(folder)
    decoded = manifest.decode_manifest(encoded)
    with catalog.damage(folder):
        parts = tuple(manifest.decode_part(folder.read(each.name)) for each in decoded.parts)
    # A copy of a copy is the same copy: its own name tells which source it came from.
    is_copy = COPY.fullmatch(decoded.generation) is not None
    generation = decoded.generation if is_copy else f"0-0-{digest.digest(encoded)[:8]}"
    return Source(folder, decoded, parts, generation)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the leaves of a source lie in the copy. Pure."""

    files: Mapping[str, int]
    """New file -> its length, bytes."""
    places: Mapping[int, tuple[str, int]]
    """`id` of a leaf -> (new file, offset in it)."""
    members: Mapping[str, tuple[leaves.Leaf, ...]]
    """New file -> its leaves, in the order of their offsets."""
    parts: tuple[manifest.Part, ...]


def plan(source: Source, object_bytes: int | None) -> Plan:
    """
    Lay the leaves of a source into the files of a copy. Pure.

    Args:
        object_bytes: size at which files are cut; None: files stay as they are.
    """
    files: dict[str, int] = {}
    found: dict[int, tuple[str, int]] = {}
    members: dict[str, tuple[leaves.Leaf, ...]] = {}
    parts = []
    next_numbers: dict[int, int] = {}
    for part in source.parts:
        own_files: dict[str, int] = {}
        by_file: dict[str, list[leaves.Leaf]] = {name: [] for name in part.files}
        own_leaves: list[leaves.Leaf] = [*part.chunks, *part.opaque]
        for leaf in own_leaves:
            by_file.setdefault(leaf.file, []).append(leaf)
        for name, own in sorted(by_file.items()):
            parsed = names.parse_data_file(name)
            assert parsed is not None  # decode_part has checked it
            for group in _groups(sorted(own, key=lambda leaf: (leaf.offset, leaf.length)), object_bytes):
                rank = parsed[0]
                number = next_numbers.get(rank, 0)
                next_numbers[rank] = number + 1
                new = names.data_file(rank, number, source.generation)
                start = 0 if object_bytes is None else group[0].offset
                end = max(leaf.offset + leaf.length for leaf in group)
                own_files[new] = part.files.get(name, end) if object_bytes is None else end - start
                members[new] = tuple(group)
                found |= {id(leaf): (new, leaf.offset - start) for leaf in group}
        files |= own_files
        parts.append(
            dataclasses.replace(
                part,
                generation=source.generation,
                files=own_files,
                chunks=tuple(_moved(chunk, found) for chunk in part.chunks),
                opaque=tuple(_moved(leaf, found) for leaf in part.opaque),
            )
        )
    return Plan(files, found, members, tuple(parts))


def _groups(own: Sequence[leaves.Leaf], object_bytes: int | None) -> Iterable[list[leaves.Leaf]]:
    group: list[leaves.Leaf] = []
    for leaf in own:
        if group and object_bytes is not None and leaf.offset + leaf.length - group[0].offset > object_bytes:
            yield group
            group = []
        group.append(leaf)
    if group:
        yield group


Kind = TypeVar("Kind", manifest.StoredChunk, manifest.StoredBytes)


def _moved(leaf: Kind, found: Mapping[int, tuple[str, int]]) -> Kind:
    file, offset = found[id(leaf)]
    return dataclasses.replace(leaf, file=file, offset=offset)


def copy(source: Source, target: Folder, *, is_quiet: bool) -> tuple[int | None, float]:
    """
    Copy a checkpoint into a folder. It becomes visible in the end, when all is there.

    Returns:
        The number of bytes that were read, and their rate in bytes per second; None: the folder has this checkpoint already.

    Raises:
        Ended: the source is damaged, or the folder has another checkpoint.
        OSError: the storage failed. Nothing is visible, and a second call goes on from there.
    """
    existing = commit.committed_as(target)
    if existing == source.generation and commit.is_committed(target):
        return None, 0.0
    if existing is not None or commit.is_committed(target):
        raise Ended(Exit.FOUND, f"{target} holds another checkpoint already: remove it first, or copy to another root")
    laid = plan(source, target.object_bytes)
    there = target.files()
    missing = {name for name, length in laid.files.items() if name not in there or there[name].length != length}
    wanted = [leaf for name in missing for leaf in laid.members[name]]
    target.make()
    rate = output.Rate()
    with output.progress("copy", sum(leaf.length for leaf in wanted), is_quiet=is_quiet) as bar:
        writer = _DirectoryWriter(target.path, laid) if target.path is not None else _BucketWriter(target, laid)
        try:
            result = leaves.read(source.folder, wanted, sink=writer.take, moved=bar.moved, ends_at_damage=True)
            writer.end_file()
            writer.finish()
        except catalog.Damaged as err:
            writer.close()
            target.delete(missing)
            target.remove_if_empty()
            raise Ended(Exit.FOUND, f"nothing was copied, as the source is damaged: {err}") from err
        finally:
            writer.close()
    _publish(source, target, laid)
    return result.num_bytes, rate.since(result.num_bytes)[1]


def _publish(source: Source, target: Folder, laid: Plan) -> None:
    references, files = [], dict(laid.files)
    for part in laid.parts:
        encoded, name = part.encode(), names.part_file(part.ranks[0], source.generation)
        target.put(name, encoded)
        references.append(manifest.PartReference(name, part.ranks, digest.digest(encoded), len(encoded)))
        files[name] = len(encoded)
    metadata = commit.build_metadata(
        [chunk for part in laid.parts for chunk in part.chunks],
        [leaf for part in laid.parts for leaf in part.opaque],
        {fqn: path for part in laid.parts for fqn, path in part.paths.items()},
    )
    metadata = commit.identified(metadata, target, source.generation)
    made = dataclasses.replace(
        source.committed,
        generation=source.generation,
        metadata_digest=digest.digest(metadata),
        parts=tuple(sorted(references, key=lambda each: each.ranks)),
    )
    try:
        commit.publish(target, made, metadata, files)
    except CommitError as err:
        raise Ended(Exit.FOUND, f"nothing was copied: {err}") from err


class _Writer:
    """Writes the files of a copy one after the other. A file is ended when a leaf of the next one comes: all of its leaves are verified then."""

    def __init__(self, laid: Plan) -> None:
        self._laid = laid
        self._file = ""

    def take(self, leaf: leaves.Leaf, start: int, data: memoryview) -> None:
        file, offset = self._laid.places[id(leaf)]
        if file != self._file:
            self.end_file()
            self.begin(file, self._laid.files[file])
            self._file = file
        self.put(offset + start, data)

    def end_file(self) -> None:
        """Give the file that was begun its name, as it is whole."""
        if self._file:
            file, self._file = self._file, ""
            self.end(file)

    @abstractmethod
    def begin(self, file: str, num_bytes: int) -> None: ...

    @abstractmethod
    def put(self, offset: int, data: memoryview) -> None: ...

    @abstractmethod
    def end(self, file: str) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Wait until every file that was ended is durable."""

    @abstractmethod
    def close(self) -> None:
        """Let go of descriptors and threads. A file that is not whole gets no name."""


@final
class _DirectoryWriter(_Writer):
    def __init__(self, directory: str, laid: Plan) -> None:
        super().__init__(laid)
        self._directory = directory
        self._fd = -1
        self._temporary = ""

    def begin(self, file: str, num_bytes: int) -> None:
        self._temporary = os.path.join(self._directory, f".{file}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with durable.named(self._temporary):
            os.posix_fallocate(self._fd, 0, max(num_bytes, 1))
            os.ftruncate(self._fd, num_bytes)

    def put(self, offset: int, data: memoryview) -> None:
        with durable.named(self._temporary):
            while data:
                count = os.pwrite(self._fd, data, offset)
                offset, data = offset + count, data[count:]

    def end(self, file: str) -> None:
        with durable.named(self._temporary):
            os.fsync(self._fd)
        os.rename(self._temporary, os.path.join(self._directory, file))
        self._temporary = ""
        self.close()

    def finish(self) -> None:
        durable.fsync_directory(self._directory)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)
            self._temporary = ""


@final
class _BucketWriter(_Writer):
    def __init__(self, folder: Folder, laid: Plan) -> None:
        super().__init__(laid)
        self._folder = folder
        self._memory = memoryview(b"")
        self._pool = futures.ThreadPoolExecutor(UPLOADS, "pillion-send")
        self._pending: deque[futures.Future[None]] = deque()

    def begin(self, file: str, num_bytes: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, max(num_bytes, 1)))[:num_bytes]

    def put(self, offset: int, data: memoryview) -> None:
        self._memory[offset : offset + len(data)] = data

    def end(self, file: str) -> None:
        memory, self._memory = self._memory, memoryview(b"")
        while len(self._pending) >= UPLOADS:
            self._pending.popleft().result()

        def send() -> None:
            self._folder.write({file: [Run(0, len(memory))]}, memory, num_threads=1)

        self._pending.append(self._pool.submit(send))

    def finish(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
