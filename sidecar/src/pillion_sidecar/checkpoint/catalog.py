"""
The catalog of a root: its committed steps, and where every chunk of a checkpoint lies. Called from: the executor, the supervisor.

Pillion's own checkpoints are read from the manifest and the parts (JSON, with digests). A checkpoint of stock `dcp.save` has neither.
Its `.metadata` is read by a restricted unpickler, which knows only DCP's own classes (docs/decisions/0004).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from pillion.errors import CommitError
from pillion.wire import manifest, names
from pillion.wire.remarks import Remarks
from pillion_sidecar.checkpoint import commit, milestones
from pillion_sidecar.storage import dcp_metadata, digest, generation, reading, stretches
from pillion_sidecar.storage.folder import Folder


class Damaged(ValueError):
    """A committed checkpoint that cannot be trusted. The text names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A readable checkpoint, and where each of its leaves lies."""

    folder: Folder
    step: int
    size_bytes: int
    chunks: Mapping[str, tuple[manifest.StoredChunk, ...]]
    """FQN -> its chunks. `digest` is empty in a checkpoint of stock DCP."""
    opaque: Mapping[str, manifest.StoredBytes]
    native: bool
    """Whether Pillion has written the checkpoint. Then the payload begins layout.HEAD_BYTES after a chunk's offset."""
    differing: tuple[str, ...] = ()
    """FQNs whose values differed between ranks at the save."""
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    """FQN -> its keys in the nested state dict, as far as the checkpoint says them."""


def step_folder(root: Folder, step: int) -> Folder:
    return root.below(names.step_directory(step))


def steps(root: Folder, known: Collection[int] = ()) -> dict[int, bool]:
    """
    Return the steps that have a folder, and whether each is committed.

    Args:
        known: steps that count as committed without a look at their folder, if they have one.

    Raises: OSError.
    """
    # A file with the name of a step's folder is no checkpoint.
    found = {names.parse_step_directory(name) for name in root.folders()}
    return {step: step in known or commit.is_committed(step_folder(root, step)) for step in found if step is not None}


def committed(root: Folder) -> dict[int, generation.Order]:
    """
    Return the committed steps, each with the order of its commit.

    A checkpoint of another program has no generation. It gets the order of the newest of Pillion's checkpoints with a smaller step.

    Raises:
        OSError: the root cannot be listed.
        LoadError: a manifest cannot be read. A damaged manifest counts as missing.
    """
    return orders(root, steps(root))


def orders(root: Folder, committed_by_step: Mapping[int, bool]) -> dict[int, generation.Order]:
    """Return the same as `committed`, for steps that a listing has already found."""
    own_orders: dict[int, generation.Order | None] = {}
    for step, done in committed_by_step.items():
        if done:
            text = _generation(step_folder(root, step))
            if text is None and (noted := milestones.written(root, step)) is not None:
                text = noted[0]
            own_orders[step] = None if text is None else generation.order_of(text)
    return ordered(own_orders)


def _generation(folder: Folder) -> str | None:
    """Return the generation in a folder's manifest; None: the manifest is missing or damaged."""
    try:
        return manifest.decode_manifest(reading.retried(folder, lambda: commit.read_manifest(folder))).generation
    except (FileNotFoundError, manifest.ManifestError):
        return None


def remarks(folder: Folder) -> Remarks:
    """
    Return what the script said about the save of a checkpoint. Nothing, if its manifest is missing or damaged.

    Raises:
        LoadError: the storage does not answer.
    """
    described = manifest_of(folder)
    return Remarks() if described is None else described.remarks


def manifest_of(folder: Folder) -> manifest.Manifest | None:
    """
    Return the manifest of a checkpoint. None, if it is missing or damaged.

    Raises:
        LoadError: the storage does not answer.
    """
    try:
        return manifest.decode_manifest(reading.retried(folder, lambda: commit.read_manifest(folder)))
    except (FileNotFoundError, manifest.ManifestError):
        return None


def ordered(own_orders: Mapping[int, generation.Order | None]) -> dict[int, generation.Order]:
    """Return an order for every step. A step without its own gets the newest order of the smaller steps. Pure."""
    step_orders: dict[int, generation.Order] = {}
    newest_below = generation.OLDEST
    for step in sorted(own_orders):
        own = own_orders[step]
        step_orders[step] = newest_below if own is None else own
        newest_below = max(newest_below, step_orders[step])
    return step_orders


def newest(root: Folder) -> tuple[int, str, int] | None:
    """Return the step, the path or URL, and the size of the last committed checkpoint. Its data is not read."""
    step_orders = committed(root)
    if not step_orders:
        return None
    step = max(step_orders, key=lambda each: (step_orders[each], each))
    folder = step_folder(root, step)
    return step, str(folder), size_bytes(folder)


def size_bytes(folder: Folder) -> int:
    return sum(entry.length for entry in folder.files().values())


def finish_interrupted(root: Folder) -> list[int]:
    """Commit every save whose parts are complete, and return the steps. A folder that cannot be read stays as it is."""
    finished = []
    for step, done in sorted(steps(root).items()):
        if done or (made := commit.finish(step_folder(root, step))) is None:
            continue
        finished.append(step)
        milestones.remember(root, step, made.generation)
    return finished


def read(folder: Folder, step: int, *, repair: bool = True) -> Stored:
    """
    Return where everything in a committed checkpoint lies.

    Args:
        repair: whether a commit that was interrupted between its two files is completed. Otherwise nothing is written, and the
            checkpoint counts as damaged.

    Raises:
            Damaged: the manifest, a part or `.metadata` is missing, or does not match its digest.
            LoadError: the storage does not answer. See `storage.reading`.
    """
    with damage(folder):
        return _read_any(folder, step, repair)


@contextlib.contextmanager
def damage(path: object) -> Iterator[None]:
    """Raise `Damaged` for an error that shows that a file is missing, too short, or has wrong content."""
    try:
        yield
    except (FileNotFoundError, stretches.TruncatedFile, manifest.ManifestError, CommitError) as err:
        raise Damaged(f"{path}: {err}") from err


def _read_any(folder: Folder, step: int, repair: bool) -> Stored:
    metadata = _read(folder, names.COMMIT_MARKER)
    try:
        encoded = reading.retried(folder, lambda: commit.read_manifest(folder))
    except FileNotFoundError:
        if reading.retried(folder, lambda: commit.is_strangers(folder)):
            return _read_stock(folder, step, metadata)
        # Pillion wrote the checkpoint, and its manifest is lost. `finish` makes the manifest again from complete parts.
        if not repair or reading.retried(folder, lambda: commit.finish(folder)) is None:
            raise Damaged(f"{folder}/{names.MANIFEST}: {_LOST if repair else _INTERRUPTED}") from None
        encoded = reading.retried(folder, lambda: commit.read_manifest(folder))
        metadata = _read(folder, names.COMMIT_MARKER)
    return _read_native(folder, encoded, metadata, repair)


_LOST: Final = "is missing, and the parts do not make it again"
_INTERRUPTED: Final = "is missing; the next load of the job makes it again if the parts are whole"


def _read(folder: Folder, name: str) -> bytes:
    return reading.retried(f"{folder}/{name}", lambda: folder.read(name))


def _read_native(folder: Folder, encoded: bytes, metadata: bytes, repair: bool) -> Stored:
    try:
        decoded = manifest.decode_manifest(encoded)
    except manifest.ManifestError as err:
        raise Damaged(f"{folder}/{names.MANIFEST}: {err}") from err
    if decoded.digest_algorithm != digest.ALGORITHM:
        raise Damaged(f"{folder}: digests are {decoded.digest_algorithm}, this release knows {digest.ALGORITHM}")
    if digest.digest(metadata) != decoded.metadata_digest:
        finished = reading.retried(folder, lambda: commit.finish(folder)) if repair else None
        # It does not matter which attempts the two files come from: the newest complete attempt is committed now.
        if finished is None:
            raise Damaged(f"{folder}/{names.COMMIT_MARKER}: expected digest {decoded.metadata_digest}, found another")
        decoded = finished
    chunks: dict[str, list[manifest.StoredChunk]] = {}
    opaque: dict[str, manifest.StoredBytes] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for reference in decoded.parts:
        data = _read(folder, reference.name)
        if digest.digest(data) != reference.digest:
            raise Damaged(f"{folder}/{reference.name}: expected digest {reference.digest}, found {digest.digest(data)}")
        part = manifest.decode_part(data)
        for chunk in part.chunks:
            chunks.setdefault(chunk.fqn, []).append(chunk)
        for leaf in part.opaque:
            opaque[leaf.fqn] = leaf
        paths |= part.paths
    return Stored(
        folder,
        decoded.step,
        decoded.size_bytes,
        {f: tuple(c) for f, c in chunks.items()},
        opaque,
        native=True,
        differing=decoded.differing,
        paths=paths,
    )


def _read_stock(folder: Folder, step: int, metadata: bytes) -> Stored:
    try:
        decoded = dcp_metadata.decode(metadata)
    except ValueError as err:
        raise Damaged(f"{folder}/{names.COMMIT_MARKER}: {err}") from err
    chunks: dict[str, tuple[manifest.StoredChunk, ...]] = {}
    opaque: dict[str, manifest.StoredBytes] = {}
    for fqn, entry in decoded.entries.items():
        if isinstance(entry, dcp_metadata.BytesEntry):
            opaque[fqn] = manifest.StoredBytes(fqn, entry.relative_path, entry.offset, entry.length, "")
        else:
            chunks[fqn] = tuple(
                manifest.StoredChunk(
                    fqn, entry.dtype, entry.size, c.offsets, c.sizes, c.relative_path, c.offset, c.length, ""
                )
                for c in entry.chunks
            )
    return Stored(folder, step, size_bytes(folder), chunks, opaque, native=False, paths=decoded.mappings)
