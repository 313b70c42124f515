"""
Making a checkpoint visible: `.metadata` from the parts, the manifest, and the publish. Called from: the executor.

The order is the whole point (aesthetics: manifest last): data durable and parts durable on every pod, then `manifest.json`, then
`.metadata`, each by temporary name, fsync, rename, fsync of the directory. A crash between any two leaves either the
checkpoint before, or a directory without `.metadata` that `finish` completes when every part is there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pillion import phases
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

    Where no checkpoint was, the commit marker is made only if there is still none: an older attempt that was stopped between its
    look and its commit finds the newer one's, and gives up. Where one was, it is replaced only by the same attempt or a newer one.

    Blocks: for four small durable writes.

    Raises:
        OSError: not committed; what was there before is still there.
        CommitError: a newer attempt has committed here.
    """
    marker = os.path.join(directory, names.COMMIT_MARKER)
    there = os.path.exists(marker)
    if there:
        _refuse_older(directory, of.generation)
    directio.replace_file(os.path.join(directory, names.MANIFEST), of.encode())
    phases.reach(phases.Phase.PUBLISH, path=directory)
    if there:
        directio.replace_file(marker, metadata)
        return
    try:
        directio.create_file(marker, metadata)
    except FileExistsError:
        # Whoever found the save complete has committed it; or a newer attempt has.
        _refuse_older(directory, of.generation)


def _refuse_older(directory: str, generation: str) -> None:
    found = committed_as(directory)
    if found is not None and generation_order(found) > generation_order(generation):
        raise CommitError(f"generation {generation} is fenced off: generation {found} has committed in {directory}")


def committed_as(directory: str) -> str | None:
    """Generation that the manifest of a directory names; None where it is not one of ours."""
    try:
        with open(os.path.join(directory, names.MANIFEST), "rb") as file:
            return manifest.decode_manifest(file.read()).generation
    except (OSError, manifest.ManifestError):
        return None


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


def finish(directory: str, *, generation: str | None = None) -> manifest.Manifest | None:
    """
    Commit a save whose every part was written, and whose job, store or coordinator died before the commit.

    Storage is the truth: the parts say by themselves whether they are complete. Parts of several generations are kept
    apart, the newest complete one wins.

    Called from: the coordinator, before it looks for the newest checkpoint; any pod, when the coordinator is lost.

    Args:
        generation: the only one to look at; None: the newest complete one.

    Returns:
        The manifest now committed; None when no generation is complete.

    Raises:
        OSError: the storage failed.
        CommitError: a newer attempt committed meanwhile.
    """
    found: dict[str, list[tuple[manifest.Part, manifest.PartReference]]] = {}
    for name in os.listdir(directory):
        parsed = names.parse_part_file(name)
        if parsed is None or generation not in (None, parsed[1]):
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
    for each in sorted(found, key=generation_order, reverse=True):
        parts = [part for part, _ in found[each]]
        first = parts[0]
        ranks = sorted(rank for part in parts for rank in part.ranks)
        # The length first: a list of as many as a part says may not fit into memory.
        complete = len(ranks) == first.world_size and ranks == list(range(first.world_size))
        if not complete or len({(p.plan_id, p.step, p.world_size) for p in parts}) != 1:
            continue
        try:
            metadata = build_metadata(
                [c for p in parts for c in p.chunks],
                [b for p in parts for b in p.opaque],
                {fqn: path for p in parts for fqn, path in p.paths.items()},
            )
        except ValueError:  # a dtype that this release does not know: nothing to commit, and nothing to stop at
            continue
        made = make_manifest(
            step=first.step,
            generation=each,
            run_id=first.run_id,
            world_size=first.world_size,
            plan_id=first.plan_id,
            parts=[reference for _, reference in found[each]],
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


NEWEST: str = "newest.json"
"""Below names.INTERNAL_DIR: which step was committed last, so that its loss is noticed."""


def remember(root: str, step: int, generation: str) -> None:
    """
    Write down that `step` is the newest commit. Behind the commit: a crash between the two only forgets the newest.

    Raises:
        OSError.
    """
    text = json.dumps({"step": step, "generation": generation, "time_ns": time.time_ns()})
    path = os.path.join(root, names.INTERNAL_DIR, NEWEST)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    directio.replace_file(path, text.encode())


def remembered(root: str) -> int | None:
    """The step that was committed last, as far as anybody wrote it down."""
    try:
        with open(os.path.join(root, names.INTERNAL_DIR, NEWEST), "rb") as file:
            return int(json.loads(file.read())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fence(root: str, generation: int) -> None:
    """
    Refuse to commit for an attempt that is not the newest any more.

    Raises:
        CommitError: a newer attempt has begun.
    """
    newest = newest_generation(root)
    if newest > generation:
        raise CommitError(f"generation {generation} is fenced off: generation {newest} has begun on {root}")
