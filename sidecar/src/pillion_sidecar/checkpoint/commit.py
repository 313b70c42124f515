"""
Making a checkpoint visible: `.metadata` from the parts, the manifest, and the publish. Called from: the executor.

The order is the whole point (aesthetics: manifest last): data durable and parts durable on every pod, then the manifest, then
`.metadata`, each by temporary name, fsync, rename, fsync of the directory. A crash between any two leaves either the
checkpoint before, or a directory without `.metadata` that `finish` completes when every part is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pillion import fault_points
from pillion.errors import CommitError
from pillion.wire import manifest, names
from pillion_sidecar.storage import dcp_metadata, digest, durable

TEMPORARY_SUFFIX: Final = ".commit"
"""Of what `publish` lays down. What a killed attempt leaves is removed by the next commit in that directory, or with it."""
_DIGITS_MOST: Final = 19
"""Of a generation, which is a count, or a time in nanoseconds. A longer one is none of ours."""
LATE_NAMES_S: Final = 3.0
"""How long `publish` looks for a file that a pod has reported and that is not in the directory. A network file system may show another
client's file late; our own new file in the directory has made the client ask the server before the first look."""
LATE_NAMES_PAUSE_S: Final = 0.05
"""Between the first two looks; doubled from then on."""

Order = tuple[int, int]
"""When a checkpoint was committed, for comparing: (generation, epoch). The generation counts the sessions of a root, the epoch counts the
loads of a session. Of two checkpoints with one order the larger step is the newer one: within an epoch steps only grow."""
OLDEST: Final[Order] = (0, 0)


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


def identified(metadata: bytes, directory: str, generation: str) -> bytes:
    """
    `.metadata` with the ids that stock DCP writes: the checkpoint's directory, and a UUID of the save. Pure.

    The same from every process that commits the save: the coordinator, its successor, or a later run that finds it complete.
    """
    save_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{os.path.basename(directory)}/{generation}"))
    return dcp_metadata.identified(metadata, directory, save_id)


STRANGERS: Final = "holds a checkpoint that Pillion did not write: it stays as it is; move it away to save here"
_OUR_DATA: Final = re.compile(rb"__[0-9]+_[0-9]+\.[0-9a-z-]+\.distcp")


def is_strangers(directory: str) -> bool:
    """
    Whether another program has committed a checkpoint in this directory: its marker names no data file of Pillion, whose manifest is not
    there. Where only the manifest was lost, the marker still names them.
    """
    try:
        read_manifest(directory)
        return False
    except FileNotFoundError:
        pass
    try:
        with open(os.path.join(directory, names.COMMIT_MARKER), "rb") as file:
            return _OUR_DATA.search(file.read()) is None
    except FileNotFoundError:
        return False


def publish(
    directory: str,
    new_manifest: manifest.Manifest,
    metadata: bytes,
    files: Mapping[str, int],
    *,
    late_s: float = LATE_NAMES_S,
    over_strangers: bool = False,
) -> None:
    """
    Commit: from the return on the checkpoint exists, before it did not.

    A commit is looked at, not believed: every file that the manifest names, and every data file of its parts, is in this very directory
    with its length, before anything is renamed. Pods that write elsewhere, because they do not share the storage, are found here.

    An older attempt never commits over a newer one, wherever it was stopped in between, and without a lock. Each attempt first lays
    down what it is about to rename, under names that hold its generation; then looks for a newer one's; then removes what
    older ones have laid down. Whoever is older and was too early to see the newer one's files has lost its own by the time that the
    newer one renames, so that its rename fails.

    Args:
        files: name -> length, bytes, of every part and data file.
        late_s: how long a file may take to appear.
        over_strangers: whether a checkpoint of another program may be written over, as `pillion.dcp` is asked to.

    Blocks: for four small durable writes and a listing; `late_s` more when a file is not there.

    Raises:
        OSError: not committed; what was there before is still there.
        CommitError: a newer attempt commits here, or has; or another program has.
        FilesMissing: files are not in the directory, or shorter or longer than their pod said.
    """
    if not over_strangers and is_strangers(directory):
        raise CommitError(f"{directory} {STRANGERS}")
    ready: dict[str, str] = {}
    try:
        for name, data in ((names.MANIFEST, new_manifest.encode()), (names.COMMIT_MARKER, metadata)):
            ready[name] = _lay_down(directory, name, new_manifest.generation, data)
        _refuse_older(directory, new_manifest.generation)
        _look_for(directory, files, late_s)
        for name, temporary in ready.items():
            if name == names.COMMIT_MARKER:
                fault_points.reach(fault_points.FaultPoint.PUBLISH, path=directory)
            try:
                os.rename(temporary, os.path.join(directory, name))
            except FileNotFoundError as err:
                raise CommitError(
                    f"generation {new_manifest.generation} is fenced off: a newer one commits in {directory}"
                ) from err
            durable.fsync_directory(directory)
    finally:
        for temporary in ready.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)


class FilesMissing(CommitError):
    """Files that a save needs are not where its checkpoint would be."""

    def __init__(self, directory: str, problems: Mapping[str, str]) -> None:
        self.directory = directory
        self.files = dict(problems)
        """Name -> what is wrong with it."""
        shown = [f"{name} {why}" for name, why in sorted(problems.items())[:SHOWN_FILES]]
        more = f" and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        super().__init__(
            f"{directory} does not hold what every pod reported: {', '.join(shown)}{more}; all pods of a job need one storage"
        )


SHOWN_FILES: Final = 4
"""Files named in an error's text."""


def _look_for(directory: str, files: Mapping[str, int], late_s: float) -> None:
    """
    Raises:
        FilesMissing: after `late_s`.
    """
    deadline = time.monotonic() + late_s
    pause_s = LATE_NAMES_PAUSE_S
    while wrong := _wrong(directory, files):
        if time.monotonic() > deadline:
            raise FilesMissing(directory, wrong)
        time.sleep(pause_s)
        pause_s *= 2


def _wrong(directory: str, files: Mapping[str, int]) -> dict[str, str]:
    """Name -> what is wrong with it. One listing, however many pods there are."""
    with os.scandir(directory) as entries:
        lengths = {entry.name: entry.stat().st_size for entry in entries if entry.name in files}
    return {
        name: f"has {lengths[name]} of {length} bytes" if name in lengths else "is not there"
        for name, length in files.items()
        if lengths.get(name) != length
    }


def _lay_down(directory: str, name: str, generation: str, data: bytes) -> str:
    """A durable file with the generation in its name; its path."""
    path = os.path.join(directory, f".{name}.{generation}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    durable.write_new(path, data)
    return path


def _refuse_older(directory: str, generation: str) -> None:
    """
    Give way to a newer attempt; make older ones give way.

    Raises:
        CommitError: a newer one has committed here, or is about to.
    """
    ours = generation_order(generation)
    laid_down = [(name, laid_down_by(name)) for name in os.listdir(directory)]
    seen = [committed_as(directory), *(theirs for _, theirs in laid_down)]
    newer = [theirs for theirs in seen if theirs is not None and generation_order(theirs) > ours]
    if newer:
        raise CommitError(f"generation {generation} is fenced off: generation {newer[0]} commits in {directory}")
    for name, theirs in laid_down:
        if theirs is not None and generation_order(theirs) < ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, name))


_LAID_DOWN: Final = tuple(f".{name}" for name in (names.MANIFEST, names.OLD_MANIFEST, names.COMMIT_MARKER))


def laid_down_by(name: str) -> str | None:
    """The generation in the name of a file that is about to be renamed; None: it is no such file."""
    parts = name.removesuffix(TEMPORARY_SUFFIX).rsplit(".", 2)
    is_one = name.endswith(TEMPORARY_SUFFIX) and len(parts) == 3
    return parts[1] if is_one and parts[0] in _LAID_DOWN else None


def committed_as(directory: str) -> str | None:
    """Generation that the manifest of a directory names; None where Pillion has none there."""
    try:
        return manifest.decode_manifest(read_manifest(directory)).generation
    except (OSError, manifest.ManifestError):
        return None


def read_manifest(directory: str) -> bytes:
    """
    The manifest of a directory.

    Raises:
        FileNotFoundError: there is none; a file of its old name that is no manifest does not count.
        OSError.
    """
    try:
        with open(os.path.join(directory, names.MANIFEST), "rb") as file:
            return file.read()
    except FileNotFoundError:
        with open(os.path.join(directory, names.OLD_MANIFEST), "rb") as file:
            data = file.read()
        if not manifest.is_manifest(data):
            raise
        return data


def is_committed_as(directory: str, generation: str) -> bool:
    """Whether this very save is what the directory holds committed."""
    return committed_as(directory) == generation and os.path.exists(os.path.join(directory, names.COMMIT_MARKER))


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
    differing: Sequence[str] = (),
    owner: str = "",
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
        differing=tuple(differing),
        owner=owner,
    )


def finish(directory: str, *, generation: str | None = None, over_strangers: bool = False) -> manifest.Manifest | None:
    """
    Commit a save whose every part was written, and whose job, store or coordinator died before the commit.

    Storage is the truth: the parts say by themselves whether they are complete. Parts of several generations are kept
    apart, the newest complete one wins.

    Called from: the coordinator, before it looks for the newest checkpoint; any pod, when the coordinator is lost.

    Args:
        generation: the only one to look at; None: the newest complete one.
        over_strangers: see `publish`.

    Returns:
        The manifest now committed; None when no generation is complete, or the checkpoint there is another program's.

    Raises:
        OSError: the storage failed.
        CommitError: a newer attempt committed meanwhile.
    """
    if not over_strangers and is_strangers(directory):
        return None
    parts_by_generation = _whole_parts(directory, generation)
    for each in sorted(parts_by_generation, key=generation_order, reverse=True):
        parts = [part for part, _ in parts_by_generation[each]]
        first = parts[0]
        ranks = sorted(rank for part in parts for rank in part.ranks)
        # The length first: a list of as many as a part says may not fit into memory.
        complete = len(ranks) == first.world_size and ranks == list(range(first.world_size))
        if not complete or len({(p.plan_id, p.step, p.world_size) for p in parts}) != 1:
            continue
        try:
            built = build_metadata(
                [c for p in parts for c in p.chunks],
                [b for p in parts for b in p.opaque],
                {fqn: path for p in parts for fqn, path in p.paths.items()},
            )
        except ValueError:  # a dtype that this release does not know: nothing to commit, and nothing to stop at
            continue
        metadata = identified(built, directory, each)
        made = make_manifest(
            step=first.step,
            generation=each,
            run_id=first.run_id,
            world_size=first.world_size,
            plan_id=first.plan_id,
            parts=[reference for _, reference in parts_by_generation[each]],
            size_bytes=sum(length for p in parts for length in p.files.values()),
            metadata=metadata,
        )
        files = {name: length for part in parts for name, length in part.files.items()}
        files |= {reference.name: reference.length for _, reference in parts_by_generation[each]}
        publish(directory, made, metadata, files, over_strangers=over_strangers)
        return made
    return None


def _whole_parts(
    directory: str, generation: str | None
) -> dict[str, list[tuple[manifest.Part, manifest.PartReference]]]:
    """Generation -> its parts whose every data file is there in full; only of `generation`, if one is given."""
    parts_by_generation: dict[str, list[tuple[manifest.Part, manifest.PartReference]]] = {}
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
            parts_by_generation.setdefault(part.generation, []).append((part, reference))
    return parts_by_generation


def _length(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def generation_text(generation: int, number: int) -> str:
    """
    What every file name of a save carries, so that no name is ever written twice: the session's generation, and the save's own number
    within it (see `save_number`; 0 is left out).
    """
    return f"{generation}-{number}" if number else str(generation)


def save_number(epoch: int, *, rescued: bool) -> int:
    """
    The number of a save within its session and step. Steps only grow between two loads, so that the loads tell apart what is saved again
    after a rollback. A snapshot that was rescued may be saved again by its trainers within the same epoch: it has a number of its own,
    the smaller one, as it comes first.
    """
    return 2 * epoch + (0 if rescued else 1)


def order_of(generation: str) -> Order:
    """The order of a checkpoint, from the generation in its manifest. Pure."""
    first, *rest = generation_order(generation)
    return max(first, 0), max(rest[0], 0) // 2 if rest else 0


def generation_order(generation: str) -> tuple[int, ...]:
    """Generations are numbers, with a save's own number behind a dash where one directory is written again and again."""
    return tuple(_number(part) for part in generation.split("-"))


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) <= _DIGITS_MOST else -1


# --- generations ---------------------------------------------------------------------------------------------------


GENERATIONS: Final = "generations"
"""Below names.INTERNAL_DIR: a record for each session that has begun on the root, by its number (`checkpoint.ownership`)."""


def newest_generation(root: str) -> int:
    try:
        entries = os.listdir(os.path.join(root, names.INTERNAL_DIR, GENERATIONS))
    except FileNotFoundError:
        return 0
    return max([0, *map(_number, entries)])


def newest_written(directory: str) -> int:
    """
    The newest generation that has committed in a directory, or has left files there; 0: none has, or there is no such directory.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return 0
    generations = [committed_as(directory), *map(laid_down_by, entries)]
    generations += [data[2] for name in entries if (data := names.parse_data_file(name))]
    generations += [part[1] for name in entries if (part := names.parse_part_file(name))]
    return max([0, *(generation_order(each)[0] for each in generations if each is not None)])


def fence(root: str, generation: int) -> None:
    """
    Refuse to commit for an attempt that is not the newest any more.

    Raises:
        CommitError: a newer attempt has begun.
    """
    newest = newest_generation(root)
    if newest > generation:
        raise CommitError(f"generation {generation} is fenced off: generation {newest} has begun on {root}")
