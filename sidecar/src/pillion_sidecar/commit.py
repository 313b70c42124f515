"""
Making a checkpoint visible: `.metadata` from the parts, the manifest, and the publish. Called from: the executor.

The order is the whole point (aesthetics: manifest last): data durable and parts durable on every pod, then `manifest.json`, then
`.metadata`, each by temporary name, fsync, rename, fsync of the directory. A crash between any two leaves either the
checkpoint before, or a directory without `.metadata` that `finish` completes when every part is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pillion.errors import CommitError
from pillion.wire import manifest, names
from pillion_sidecar.storage import dcp_metadata, digest, directio


def build_metadata(
    chunks: Iterable[manifest.StoredChunk],
    opaque: Iterable[manifest.StoredBytes],
    paths: Mapping[str, tuple[str | int, ...]],
) -> bytes:
    """`.metadata` for these chunks. Pure; equal input gives equal bytes."""
    grouped: dict[str, list[manifest.StoredChunk]] = {}
    for chunk in chunks:
        grouped.setdefault(chunk.fqn, []).append(chunk)
    entries: dict[str, Any] = {
        fqn: dcp_metadata.TensorEntry(
            members[0].dtype,
            members[0].size,
            tuple(
                dcp_metadata.Chunk(c.offsets, c.sizes, c.file, c.offset, c.length)
                for c in sorted(members, key=lambda c: c.offsets)
            ),
        )
        for fqn, members in sorted(grouped.items())
    }
    for leaf in sorted(opaque, key=lambda leaf: leaf.fqn):
        entries[leaf.fqn] = dcp_metadata.BytesEntry(leaf.file, leaf.offset, leaf.length)
    return dcp_metadata.encode(
        dcp_metadata.Checkpoint(entries=entries, mappings={fqn: paths[fqn] for fqn in entries if fqn in paths})
    )


def publish(directory: str, of: manifest.Manifest, metadata: bytes) -> None:
    """
    Commit: from the return on the checkpoint exists, before it did not.

    Blocks: for four small durable writes.

    Raises:
        OSError: not committed; what was there before is still there.
    """
    directio.replace_file(os.path.join(directory, names.MANIFEST), of.encode())
    directio.replace_file(os.path.join(directory, names.COMMIT_MARKER), metadata)


def make_manifest(
    *,
    step: int,
    generation: str,
    run_id: str,
    world_size: int,
    plan_id: str,
    parts: Sequence[manifest.PartReference],
    size_bytes: int,
    metadata: bytes,
    started_ns: int = 0,
    cause: str = "",
) -> manifest.Manifest:
    return manifest.Manifest(
        step=step,
        generation=generation,
        run_id=run_id,
        world_size=world_size,
        plan_id=plan_id,
        started_ns=started_ns,
        created_ns=time.time_ns(),
        cause=cause,
        size_bytes=size_bytes,
        digest_algorithm=digest.ALGORITHM,
        metadata_digest=digest.digest(metadata),
        parts=tuple(sorted(parts, key=lambda p: p.ranks)),
    )


def finish(directory: str) -> manifest.Manifest | None:
    """
    Commit a save whose every part was written, and whose job, store or coordinator died before the commit.

    Storage is the truth: the parts say by themselves whether they are complete. Parts of several generations are kept
    apart, the newest complete one wins.

    Called from: the coordinator, before it looks for the newest checkpoint.

    Returns:
        The manifest now committed; None when no generation is complete.

    Raises:
        OSError: the storage failed.
    """
    found: dict[str, list[tuple[manifest.Part, manifest.PartReference]]] = {}
    for name in os.listdir(directory):
        parsed = names.parse_part_file(name)
        if parsed is None:
            continue
        with open(os.path.join(directory, name), "rb") as file:
            data = file.read()
        try:
            part = manifest.decode_part(data)
        except manifest.ManifestError:
            continue
        if all(_length(os.path.join(directory, f)) == length for f, length in part.files.items()):
            reference = manifest.PartReference(name, part.ranks, digest.digest(data), len(data))
            found.setdefault(part.generation, []).append((part, reference))
    for generation in sorted(found, key=generation_order, reverse=True):
        parts = [part for part, _ in found[generation]]
        first = parts[0]
        ranks = sorted(rank for part in parts for rank in part.ranks)
        if ranks != list(range(first.world_size)) or len({(p.plan_id, p.step, p.world_size) for p in parts}) != 1:
            continue
        metadata = build_metadata(
            [c for p in parts for c in p.chunks],
            [b for p in parts for b in p.opaque],
            {fqn: path for p in parts for fqn, path in p.paths.items()},
        )
        made = make_manifest(
            step=first.step,
            generation=generation,
            run_id=first.run_id,
            world_size=first.world_size,
            plan_id=first.plan_id,
            parts=[reference for _, reference in found[generation]],
            size_bytes=sum(length for p in parts for length in p.files.values()),
            metadata=metadata,
        )
        publish(directory, made, metadata)
        return made
    return None


def _length(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def generation_order(generation: str) -> tuple[int, ...]:
    """Generations are numbers, with a save's own number behind a dash where one directory is written again and again."""
    return tuple(int(part) if part.isdigit() else -1 for part in generation.split("-"))


# --- generations ---------------------------------------------------------------------------------------------------


def claim_generation(root: str) -> int:
    """
    The next generation of this root, claimed by an exclusive file: two attempts never get the same.

    Raises:
        OSError: the root cannot be written.
    """
    folder = os.path.join(root, names.INTERNAL_DIR, "generations")
    os.makedirs(folder, exist_ok=True)
    number = newest_generation(root) + 1
    while True:
        try:
            os.close(os.open(os.path.join(folder, str(number)), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            break
        except FileExistsError:
            number += 1
    directio.fsync_directory(folder)
    for name in os.listdir(folder):
        # Only the newest is needed; the one before stays for a claim that is looking right now.
        if name.isdigit() and int(name) < number - 1:
            os.unlink(os.path.join(folder, name))
    return number


def newest_generation(root: str) -> int:
    try:
        entries = os.listdir(os.path.join(root, names.INTERNAL_DIR, "generations"))
    except FileNotFoundError:
        return 0
    return max((int(name) for name in entries if name.isdigit()), default=0)


def fence(root: str, generation: int) -> None:
    """
    Refuse to commit for an attempt that is not the newest any more.

    Raises:
        CommitError: a newer attempt has begun.
    """
    newest = newest_generation(root)
    if newest > generation:
        raise CommitError(f"generation {generation} is fenced off: generation {newest} has begun on {root}")
