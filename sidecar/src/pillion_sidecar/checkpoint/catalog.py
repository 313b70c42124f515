"""
What is on storage: the committed steps of a root, and where every chunk of one lies. Called from: the executor, the supervisor.

Our own checkpoints are read from manifest and parts (JSON, digests). What stock `dcp.save` wrote has neither; its `.metadata` is
read by a restricted unpickler that knows DCP's own classes only (docs/decisions/0004).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pillion.errors import CommitError
from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import commit, milestones
from pillion_sidecar.storage import dcp_metadata, digest, directio, reading


class Damaged(ValueError):
    """A checkpoint that is committed and cannot be trusted; the text names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One readable checkpoint."""

    path: str
    step: int
    size_bytes: int
    chunks: Mapping[str, tuple[manifest.StoredChunk, ...]]
    """FQN -> its chunks. `digest` is empty for what stock DCP wrote."""
    opaque: Mapping[str, manifest.StoredBytes]
    native: bool
    """Written by us: the payload begins layout.HEAD_BYTES behind a chunk's offset."""
    differing: tuple[str, ...] = ()
    """Names that several ranks had with other values when it was saved."""


def steps(root: str) -> dict[int, bool]:
    """Steps that have a directory -> whether they are committed."""
    committed_by_step: dict[int, bool] = {}
    try:
        with os.scandir(root) as entries:
            # A file of such a name is nobody's checkpoint.
            directories = [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return committed_by_step
    for name in directories:
        step = names.parse_step_directory(name)
        if step is not None:
            committed_by_step[step] = os.path.exists(os.path.join(root, name, names.COMMIT_MARKER))
    return committed_by_step


def committed(root: str) -> dict[int, commit.Order]:
    """
    Committed steps -> when each was committed, for comparing.

    What another program wrote has no generation: it counts as committed together with the newest of ours of a smaller step.

    Raises:
        OSError: the root cannot be listed.
        LoadError: a manifest cannot be read; one that is damaged counts as none.
    """
    return orders(root, steps(root))


def orders(root: str, committed_by_step: Mapping[int, bool]) -> dict[int, commit.Order]:
    """`committed`, of the steps that one listing has found."""
    own_orders: dict[int, commit.Order | None] = {}
    for step, done in committed_by_step.items():
        if done:
            generation = _generation(os.path.join(root, names.step_directory(step)))
            if generation is None and (noted := milestones.written(root, step)) is not None:
                generation = noted[0]
            own_orders[step] = None if generation is None else commit.order_of(generation)
    return ordered(own_orders)


def _generation(path: str) -> str | None:
    """Of the manifest in a directory; None where there is none, or a damaged one."""
    try:
        return manifest.decode_manifest(reading.retried(path, lambda: commit.read_manifest(path))).generation
    except (FileNotFoundError, manifest.ManifestError):
        return None


def ordered(own_orders: Mapping[int, commit.Order | None]) -> dict[int, commit.Order]:
    """The order of every step, where some have none of their own. Pure."""
    step_orders: dict[int, commit.Order] = {}
    newest_below = commit.OLDEST
    for step in sorted(own_orders):
        own = own_orders[step]
        step_orders[step] = newest_below if own is None else own
        newest_below = max(newest_below, step_orders[step])
    return step_orders


def newest(root: str) -> tuple[int, str, int] | None:
    """Step, path and size of the checkpoint that was committed last, without reading its data."""
    step_orders = committed(root)
    if not step_orders:
        return None
    step = max(step_orders, key=lambda each: (step_orders[each], each))
    path = os.path.join(root, names.step_directory(step))
    return step, path, size_bytes(path)


def size_bytes(path: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())


def finish_interrupted(root: str) -> list[int]:
    """Commit every save whose parts are all there; the steps. A directory that cannot be read is left as it is."""
    finished = []
    for step, done in sorted(steps(root).items()):
        path = os.path.join(root, names.step_directory(step))
        if done or (made := commit.finish(path)) is None:
            continue
        finished.append(step)
        milestones.remember(root, step, made.generation)
    return finished


def read(path: str, step: int) -> Stored:
    """
    Where everything in a committed checkpoint lies.

    Raises:
        Damaged: manifest, a part or `.metadata` is missing or does not match its digest.
        LoadError: the storage does not answer: see `storage.reading`.
    """
    with damage(path):
        return _read_any(path, step)


@contextlib.contextmanager
def damage(path: str) -> Iterator[None]:
    """What a file says of itself by its absence, its length or its content, as `Damaged`."""
    try:
        yield
    except (FileNotFoundError, directio.TruncatedFile, manifest.ManifestError, CommitError) as err:
        raise Damaged(f"{path}: {err}") from err


def _read_any(path: str, step: int) -> Stored:
    metadata = _read(os.path.join(path, names.COMMIT_MARKER))
    try:
        encoded = reading.retried(path, lambda: commit.read_manifest(path))
    except FileNotFoundError:
        if reading.retried(path, lambda: commit.is_strangers(path)):
            return _read_stock(path, step, metadata)
        # Ours, without its manifest: the parts have the digests, and make it again when they are complete.
        if reading.retried(path, lambda: commit.finish(path)) is None:
            raise Damaged(f"{path}/{names.MANIFEST}: is missing, and the parts do not make it again") from None
        encoded = reading.retried(path, lambda: commit.read_manifest(path))
        metadata = _read(os.path.join(path, names.COMMIT_MARKER))
    return _read_native(path, encoded, metadata)


def _read(path: str) -> bytes:
    return reading.read_whole(path)


def _read_native(path: str, encoded: bytes, metadata: bytes) -> Stored:
    try:
        decoded = manifest.decode_manifest(encoded)
    except manifest.ManifestError as err:
        raise Damaged(f"{path}/{names.MANIFEST}: {err}") from err
    if decoded.digest_algorithm != digest.ALGORITHM:
        raise Damaged(f"{path}: digests are {decoded.digest_algorithm}, this release knows {digest.ALGORITHM}")
    if digest.digest(metadata) != decoded.metadata_digest:
        finished = reading.retried(path, lambda: commit.finish(path))
        # Of which attempt the two are does not matter: what is committed now is the newest complete one.
        if finished is None:
            raise Damaged(f"{path}/{names.COMMIT_MARKER}: expected digest {decoded.metadata_digest}, found another")
        decoded = finished
    chunks: dict[str, list[manifest.StoredChunk]] = {}
    opaque: dict[str, manifest.StoredBytes] = {}
    for reference in decoded.parts:
        data = _read(os.path.join(path, reference.name))
        if digest.digest(data) != reference.digest:
            raise Damaged(f"{path}/{reference.name}: expected digest {reference.digest}, found {digest.digest(data)}")
        part = manifest.decode_part(data)
        for chunk in part.chunks:
            chunks.setdefault(chunk.fqn, []).append(chunk)
        for leaf in part.opaque:
            opaque[leaf.fqn] = leaf
    return Stored(
        path,
        decoded.step,
        decoded.size_bytes,
        {f: tuple(c) for f, c in chunks.items()},
        opaque,
        native=True,
        differing=decoded.differing,
    )


def _read_stock(path: str, step: int, metadata: bytes) -> Stored:
    try:
        decoded = dcp_metadata.decode(metadata)
    except ValueError as err:
        raise Damaged(f"{path}/{names.COMMIT_MARKER}: {err}") from err
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
    return Stored(path, step, size_bytes(path), chunks, opaque, native=False)
