"""
Making a checkpoint visible: `.metadata` from the parts, the manifest, and the publish. Called from: the executor.

The order is the whole point (aesthetics: manifest last): data durable and parts durable on every pod, then `manifest.json`, then
`.metadata`, each by temporary name, fsync, rename, fsync of the directory. A crash between any two leaves either the
checkpoint before, or a directory without `.metadata` that `finish` completes when every part is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pillion import phases
from pillion.errors import CommitError
from pillion.wire import manifest, names
from pillion_sidecar.storage import dcp_metadata, digest, directio

TEMPORARY_SUFFIX: Final = ".commit"
"""Of what `publish` lays down. What a killed attempt leaves is removed by the next commit in that directory, or with it."""
_DIGITS_MOST: Final = 19
"""Of a generation, which is a count, or a time in nanoseconds. A longer one is none of ours."""


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

    An older attempt never commits over a newer one, wherever it was stopped in between, and without a lock. Each attempt first lays
    down what it is about to rename, under names that hold its generation; then looks for a newer one's; then removes what
    older ones have laid down. Whoever is older and was too early to see the newer one's files has lost its own by the time that the
    newer one renames, so that its rename fails.

    Blocks: for four small durable writes.

    Raises:
        OSError: not committed; what was there before is still there.
        CommitError: a newer attempt commits here, or has.
    """
    ready = {
        name: _lay_down(directory, name, of.generation, data)
        for name, data in ((names.MANIFEST, of.encode()), (names.COMMIT_MARKER, metadata))
    }
    try:
        _refuse_older(directory, of.generation)
        for name, temporary in ready.items():
            if name == names.COMMIT_MARKER:
                phases.reach(phases.Phase.PUBLISH, path=directory)
            try:
                os.rename(temporary, os.path.join(directory, name))
            except FileNotFoundError as err:
                raise CommitError(
                    f"generation {of.generation} is fenced off: a newer one commits in {directory}"
                ) from err
            directio.fsync_directory(directory)
    finally:
        for temporary in ready.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _lay_down(directory: str, name: str, generation: str, data: bytes) -> str:
    """A durable file with the generation in its name; its path."""
    path = os.path.join(directory, f".{name}.{generation}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def _refuse_older(directory: str, generation: str) -> None:
    """
    Give way to a newer attempt; make older ones give way.

    Raises:
        CommitError: a newer one has committed here, or is about to.
    """
    ours = generation_order(generation)
    laid_down = [(name, _laid_down_by(name)) for name in os.listdir(directory)]
    seen = [committed_as(directory), *(theirs for _, theirs in laid_down)]
    newer = [theirs for theirs in seen if theirs is not None and generation_order(theirs) > ours]
    if newer:
        raise CommitError(f"generation {generation} is fenced off: generation {newer[0]} commits in {directory}")
    for name, theirs in laid_down:
        if theirs is not None and generation_order(theirs) < ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))


def _laid_down_by(name: str) -> str | None:
    """The generation in the name of a file that is about to be renamed; None: it is no such file."""
    parts = name.removesuffix(TEMPORARY_SUFFIX).rsplit(".", 2)
    is_one = name.endswith(TEMPORARY_SUFFIX) and len(parts) == 3
    return parts[1] if is_one and parts[0] in (f".{names.MANIFEST}", f".{names.COMMIT_MARKER}") else None


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
        if part.generation != parsed[1]:
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
    return tuple(_number(part) for part in generation.split("-"))


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) <= _DIGITS_MOST else -1


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
        if 0 <= _number(name) < number - 1:
            os.unlink(os.path.join(folder, name))
    return number


def newest_generation(root: str) -> int:
    try:
        entries = os.listdir(os.path.join(root, names.INTERNAL_DIR, "generations"))
    except FileNotFoundError:
        return 0
    return max([0, *map(_number, entries)])


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
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
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
