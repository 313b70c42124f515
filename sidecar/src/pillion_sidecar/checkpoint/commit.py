"""
The commit, which makes a checkpoint visible: builds `.metadata` from the parts, then publishes the manifest and `.metadata`.

Called from: the executor.

The order of the steps makes a commit safe. First, data and parts are durable on every pod. Then the manifest is published, then `.metadata`.
In a file system each is published by temporary name, fsync, rename, fsync of the directory. In a bucket it is a conditional put.
After a crash between two steps the previous checkpoint is still there, or a directory without `.metadata`. `finish` completes such a
directory when every part is there.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, Final

from pillion import fault_points
from pillion.errors import CommitError
from pillion.wire import manifest, names
from pillion.wire.remarks import Remarks
from pillion_sidecar.storage import dcp_metadata, digest, late_names, temporary_names
from pillion_sidecar.storage import generation as generations
from pillion_sidecar.storage.folder import Document, Entry, Folder


def build_metadata(
    chunks: Iterable[manifest.StoredChunk],
    opaque: Iterable[manifest.StoredBytes],
    paths: Mapping[str, tuple[str | int, ...]],
) -> bytes:
    """Return the content of `.metadata` for these chunks. Equal input gives equal bytes. Pure."""
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


def identified(metadata: bytes, folder: Folder, generation: str) -> bytes:
    """
    Add the ids to `.metadata` that stock DCP writes: the checkpoint's path or URL, and a UUID of the save. Pure.

    Every process that commits the save gets the same bytes: the coordinator, its successor, or a later run that finds the save complete.
    """
    save_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{folder.name}/{generation}"))
    return dcp_metadata.identified(metadata, str(folder), save_id)


STRANGERS: Final = "holds a checkpoint that Pillion did not write: it stays as it is; move it away to save here"
_OUR_DATA: Final = re.compile(rb"__[0-9]+_[0-9]+\.([0-9a-z-]+)\.distcp")


def is_strangers(folder: Folder, listed: Collection[str] | None = None) -> bool:
    """
    Whether another program has committed the checkpoint in this folder.

    The checkpoint is Pillion's if its marker names data files of Pillion, also when its manifest was lost. The marker of a checkpoint without data
    is Pillion's if a manifest of Pillion has its digest.

    Args:
        listed: names of the folder's files by a listing; None: they are listed here. In a bucket each request for a missing file costs two.

    Raises: OSError.
    """
    if names.COMMIT_MARKER not in (folder.files() if listed is None else listed):
        return False
    try:
        marker = folder.read(names.COMMIT_MARKER)
    except FileNotFoundError:
        return False
    if _OUR_DATA.search(marker) is not None:
        return False
    try:
        return manifest.decode_manifest(read_manifest(folder)).metadata_digest != digest.digest(marker)
    except FileNotFoundError:
        return True
    except manifest.ManifestError:
        return False


def generation_of(document: bytes) -> str | None:
    """
    Return the generation of a manifest or a `.metadata`; None: no save of Pillion wrote the document. Pure.

    A `.metadata` has the generation in the names of its data files.
    """
    try:
        return manifest.decode_manifest(document).generation
    except manifest.ManifestError:
        named = _OUR_DATA.search(document)
        return named[1].decode() if named else None


def publish(
    folder: Folder,
    new_manifest: manifest.Manifest,
    metadata: bytes,
    files: Mapping[str, int],
    *,
    late_s: float = late_names.LATE_S,
    over_strangers: bool = False,
    is_new: bool = False,
    fence: Callable[[], None] = lambda: None,
) -> None:
    """
    Commit a save. The checkpoint does not exist before this call, and exists when it returns.

    `publish` checks every file before the checkpoint is visible. Each part, and each data file of the parts, must be in this folder with its length.
    So it finds pods that write elsewhere because they do not share the storage.

    An older attempt never commits over a newer one: see `Folder.publish`.

    Args:
        files: name -> length of every part and data file, bytes.
        late_s: timeout for a file to appear, seconds.
        over_strangers: whether the commit may replace a checkpoint of another program. `pillion.dcp` can ask for it.
        is_new: see `Folder.publish`.
        fence: raises a CommitError if a newer attempt has begun. It runs beside the listing.

    Blocks: for a few small durable writes and a listing; up to `late_s` more if a file is missing. In a bucket it takes two round trips if `is_new`.

    Raises:
        OSError: the save is not committed. The previous checkpoint is still there.
        CommitError: a newer attempt commits here or has committed, or the checkpoint here is another program's.
        FilesMissing: files are missing in the folder, or their lengths are not what their pod reported.
    """

    def look() -> None:
        with futures.ThreadPoolExecutor(1, "pillion-fence") as pool:
            fenced = pool.submit(fence)
            listed = folder.files()
            fenced.result()
        if not over_strangers and is_strangers(folder, listed):
            raise CommitError(f"{folder} {STRANGERS}")
        if names.OLD_MANIFEST in listed and names.MANIFEST not in listed:
            _refuse_older(folder, new_manifest.generation)
        _look_for(folder, listed, files, late_s)

    folder.publish(
        [Document(names.MANIFEST, new_manifest.encode()), Document(names.COMMIT_MARKER, metadata)],
        generation=new_manifest.generation,
        generation_of=generation_of,
        before=look,
        between=lambda: fault_points.reach(fault_points.FaultPoint.PUBLISH, path=folder.path or ""),
        is_new=is_new,
    )


def _refuse_older(folder: Folder, generation: str) -> None:
    """
    Refuse to commit over a newer attempt whose manifest has the name that older releases gave it.

    `Folder.publish` refuses for all other newer attempts.

    Raises:
        CommitError: a newer attempt has committed here.
    """
    committed = committed_as(folder)
    if committed is not None and generations.order(committed) > generations.order(generation):
        raise CommitError(f"generation {generation} is fenced off: generation {committed} commits in {folder}")


class FilesMissing(CommitError):
    """Files of a save are not in the folder of its checkpoint."""

    def __init__(self, folder: Folder, problems: Mapping[str, str]) -> None:
        self.folder = str(folder)
        self.files = dict(problems)
        """Name -> what is wrong with the file."""
        shown = [f"{name} {why}" for name, why in sorted(problems.items())[:SHOWN_FILES]]
        more = f" and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        super().__init__(
            f"{folder} does not hold what every pod reported: {', '.join(shown)}{more}; all pods of a job need one storage"
        )


SHOWN_FILES: Final = 4
"""Maximum of files that an error's text names."""


def _look_for(folder: Folder, listed: Mapping[str, Entry], files: Mapping[str, int], late_s: float) -> None:
    """
    Wait until the folder has all files in full length. List it again and again for `late_s`.

    Raises:
        FilesMissing: a file is missing or has a wrong length after `late_s`.
    """
    wrong: Mapping[str, str] = {}
    first: Mapping[str, Entry] | None = listed
    for _ in late_names.looks(late_s):
        wrong = _wrong(folder.files() if first is None else first, files)
        if not wrong:
            return
        first = None
    raise FilesMissing(folder, wrong)


def _wrong(listed: Mapping[str, Entry], files: Mapping[str, int]) -> dict[str, str]:
    """Return the files that are missing or have a wrong length, each with the problem. One listing is enough for all pods. Pure."""
    lengths = {name: listed[name].length for name in files if name in listed}
    return {
        name: f"has {lengths[name]} of {length} bytes" if name in lengths else "is not there"
        for name, length in files.items()
        if lengths.get(name) != length
    }


def committed_as(folder: Folder) -> str | None:
    """Return the generation in a folder's manifest; None: the folder has no readable manifest of Pillion."""
    try:
        return manifest.decode_manifest(read_manifest(folder)).generation
    except (OSError, manifest.ManifestError):
        return None


def read_manifest(folder: Folder) -> bytes:
    """
    Return the manifest of a folder.

    Raises:
        FileNotFoundError: the folder has none. A file with the manifest's old name counts only if it is a manifest.
        OSError: the storage failed.
    """
    try:
        return folder.read(names.MANIFEST)
    except FileNotFoundError:
        data = folder.read(names.OLD_MANIFEST)
        if not manifest.is_manifest(data):
            raise
        return data


def is_committed(folder: Folder) -> bool:
    """Whether a folder holds a checkpoint, of Pillion or of another program. Raises: OSError."""
    return folder.entry(names.COMMIT_MARKER) is not None


def is_committed_as(folder: Folder, generation: str) -> bool:
    """Whether this save is the one that the folder holds committed. Raises: OSError: it is not known."""
    try:
        committed = manifest.decode_manifest(read_manifest(folder)).generation
    except (FileNotFoundError, manifest.ManifestError):
        return False
    return committed == generation and is_committed(folder)


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
    remarks: Remarks | None = None,
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
        remarks=remarks or Remarks(),
    )


def finish(folder: Folder, *, generation: str | None = None, over_strangers: bool = False) -> manifest.Manifest | None:
    """
    Commit a save that is complete, after its job, its store or its coordinator died before the commit.

    The parts on storage show by themselves whether they are complete. Parts of different generations are not mixed. The newest complete
    generation is committed.

    Called from: the coordinator, before it looks for the newest checkpoint; any pod, when the coordinator is lost.

    Args:
        generation: the only generation that may be committed; None: the newest complete one.
        over_strangers: see `publish`.

    Returns:
        The manifest that is now committed. None: no generation is complete, or the checkpoint in the folder is another program's.

    Raises:
        OSError: the storage failed.
        CommitError: a newer attempt has committed in the meantime.
    """
    listed = folder.files()
    if not over_strangers and is_strangers(folder, listed):
        return None
    parts_by_generation = _whole_parts(folder, listed, generation)
    for each in sorted(parts_by_generation, key=generations.order, reverse=True):
        parts = [part for part, _ in parts_by_generation[each]]
        first = parts[0]
        ranks = sorted(rank for part in parts for rank in part.ranks)
        # Compare the length first: a part may name a world size whose list of ranks does not fit into memory.
        complete = len(ranks) == first.world_size and ranks == list(range(first.world_size))
        if not complete or len({(p.plan_id, p.step, p.world_size) for p in parts}) != 1:
            continue
        try:
            built = build_metadata(
                [c for p in parts for c in p.chunks],
                [b for p in parts for b in p.opaque],
                {fqn: path for p in parts for fqn, path in p.paths.items()},
            )
        except ValueError:  # this release does not know a dtype: it cannot commit this generation, and tries the others
            continue
        metadata = identified(built, folder, each)
        made = make_manifest(
            step=first.step,
            generation=each,
            run_id=first.run_id,
            world_size=first.world_size,
            plan_id=first.plan_id,
            parts=[reference for _, reference in parts_by_generation[each]],
            size_bytes=sum(length for p in parts for length in p.files.values()),
            metadata=metadata,
            remarks=next((p.remarks for p in parts if 0 in p.ranks), None),
        )
        files = {name: length for part in parts for name, length in part.files.items()}
        files |= {reference.name: reference.length for _, reference in parts_by_generation[each]}
        publish(folder, made, metadata, files, over_strangers=over_strangers)
        return made
    return None


def _whole_parts(
    folder: Folder, files: Mapping[str, Entry], generation: str | None
) -> dict[str, list[tuple[manifest.Part, manifest.PartReference]]]:
    """Return the parts by generation whose data files are all there in full length. If `generation` is given, return only its parts."""
    parts_by_generation: dict[str, list[tuple[manifest.Part, manifest.PartReference]]] = {}
    for name in files:
        parsed = names.parse_part_file(name)
        if parsed is None or generation not in (None, parsed[1]):
            continue
        data = folder.read(name)
        try:
            part = manifest.decode_part(data)
        except manifest.ManifestError:
            continue
        if part.generation != parsed[1]:
            continue
        if all(each in files and files[each].length == length for each, length in part.files.items()):
            reference = manifest.PartReference(name, part.ranks, digest.digest(data), len(data))
            parts_by_generation.setdefault(part.generation, []).append((part, reference))
    return parts_by_generation


# --- generations ---------------------------------------------------------------------------------------------------


GENERATIONS: Final = "generations"
"""Name of the folder below names.INTERNAL_DIR. It has a record for each session that has begun on the root (`checkpoint.ownership`)."""


def generations_folder(root: Folder) -> Folder:
    return root.below(f"{names.INTERNAL_DIR}/{GENERATIONS}")


def newest_generation(root: Folder) -> int:
    return max([0, *map(generations.number, generations_folder(root).files())])


def newest_written(folder: Folder) -> int:
    """
    Return the newest generation that has committed in a folder or has left files there. Return 0 if there is none, or no such folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    listed = folder.files()
    written = [committed_as(folder), *map(temporary_names.laid_down_by, listed)]
    written += [data[2] for name in listed if (data := names.parse_data_file(name))]
    written += [part[1] for name in listed if (part := names.parse_part_file(name))]
    return max([0, *(generations.order(each)[0] for each in written if each is not None)])


def fence(root: Folder, generation: int) -> None:
    """
    Refuse to commit for an attempt that is not the newest any more.

    Raises:
        CommitError: a newer attempt has begun.
    """
    newest = newest_generation(root)
    if newest > generation:
        raise CommitError(f"generation {generation} is fenced off: generation {newest} has begun on {root}")
