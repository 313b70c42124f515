"""
The JSON files beside the data of a checkpoint: a part file for each pod, and the manifest that the commit writes. Pure.

Producer: the executor (parts: every pod; manifest: the coordinator). Consumer: the loader, a later run that finishes a commit,
`pillion-sidecar` tools. JSON, UTF-8. Nothing here is a pickle. Stock DCP reads `.metadata` beside these files.

    part-<first rank>.<generation>.json   what the ranks of one pod wrote: every chunk, its location and its digest
    pillion-manifest.json                 which parts make the checkpoint. It has names and digests only, so that the cost of a
                                          commit does not depend on the number of tensors
    .metadata                             the commit marker

Breaking (increase FORMAT_VERSION; readers keep reading older formats): removing a field, or changing its meaning.
Not breaking: a new field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pillion.wire import names, remarks
from pillion.wire.remarks import Remarks

FORMAT_VERSION: Final = 1


_INT64_MAX: Final = 2**63 - 1
_DAMAGE: Final = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""Errors of reading a malformed document: a field is missing, mistyped, infinite, or nested too deep."""


class ManifestError(ValueError):
    """A manifest or part file is damaged, or has a format that this release cannot read."""


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One chunk of a tensor on storage, as one archive."""

    fqn: str
    dtype: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int
    digest: str

    def with_digest(self, digest: str) -> StoredChunk:
        return dataclasses.replace(self, digest=digest)


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """One opaque leaf on storage."""

    fqn: str
    file: str
    offset: int
    length: int
    digest: str

    def with_digest(self, digest: str) -> StoredBytes:
        return dataclasses.replace(self, digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The record of what the ranks of one pod wrote for one save."""

    step: int
    generation: str
    run_id: str
    world_size: int
    plan_id: str
    """Id of the plan. All parts of a checkpoint have the same one."""
    ranks: tuple[int, ...]
    files: Mapping[str, int]
    """File name -> length in bytes."""
    chunks: tuple[StoredChunk, ...]
    opaque: tuple[StoredBytes, ...]
    paths: Mapping[str, tuple[str | int, ...]]
    remarks: Remarks = field(default_factory=Remarks)
    """What rank 0's script said about the save. Optional; only in the part of rank 0's pod."""

    def encode(self) -> bytes:
        return json.dumps(
            {
                "format": FORMAT_VERSION,
                "step": self.step,
                "generation": self.generation,
                "run_id": self.run_id,
                "world_size": self.world_size,
                "plan_id": self.plan_id,
                "ranks": self.ranks,
                "files": dict(self.files),
                "chunks": [
                    [c.fqn, c.dtype, c.size, c.offsets, c.sizes, c.file, c.offset, c.length, c.digest]
                    for c in self.chunks
                ],
                "opaque": [[b.fqn, b.file, b.offset, b.length, b.digest] for b in self.opaque],
                "paths": self.paths,
                **self.remarks.to_document(),
            },
            separators=(",", ":"),
        ).encode()


def decode_part(data: bytes) -> Part:
    """
    Read a part file.

    Raises:
        ManifestError: damaged, or of another format.
    """
    document = _document(data, "part")
    try:
        part = Part(
            step=int(document["step"]),
            generation=_text(document["generation"]),
            run_id=_text(document["run_id"]),
            world_size=int(document["world_size"]),
            plan_id=_text(document["plan_id"]),
            ranks=tuple(map(int, document["ranks"])),
            files={_text(name): int(length) for name, length in document["files"].items()},
            chunks=tuple(
                StoredChunk(
                    _text(fqn), _text(dtype), tuple(map(int, size)), tuple(map(int, offsets)), tuple(map(int, sizes)),
                    _text(file), int(offset), int(length), _text(digest),
                )
                for fqn, dtype, size, offsets, sizes, file, offset, length, digest in document["chunks"]
            ),
            opaque=tuple(
                StoredBytes(_text(fqn), _text(file), int(offset), int(length), _text(digest))
                for fqn, file, offset, length, digest in document["opaque"]
            ),
            paths={
                _text(fqn): tuple(key if isinstance(key, int) else _text(key) for key in path)
                for fqn, path in document["paths"].items()
            },
            remarks=remarks.read(document),
        )  # fmt: skip
    except _DAMAGE as err:
        raise ManifestError(f"a part file is damaged: {type(err).__name__}: {err!s:.200}") from err
    if problem := _impossible(part):
        raise ManifestError(f"a part file is damaged: {problem}")
    return part


def _impossible(part: Part) -> str:
    """Return what makes a part invalid, so that a reader would leave the checkpoint's data. Empty: the part is valid."""
    leaves: list[StoredChunk | StoredBytes] = [*part.chunks, *part.opaque]
    for name in {*part.files, *(leaf.file for leaf in leaves)}:
        if names.parse_data_file(name) is None:
            return f"{name!r:.80} is not the name of a data file"
    if not _are_counts([part.step, part.world_size, *part.ranks, *part.files.values()]):
        return "a number is negative, or larger than 2**63 - 1"
    for leaf in leaves:
        if not _are_counts((leaf.offset, leaf.length)):
            return f"{leaf.fqn!r:.80} lies at {leaf.offset}+{leaf.length}"
    for chunk in part.chunks:
        if not len(chunk.size) == len(chunk.offsets) == len(chunk.sizes) or not _are_counts(chunk.size):
            return f"{chunk.fqn!r:.80} has an impossible shape, or a chunk of another number of dimensions"
        if any(o < 0 or n < 0 or o + n > s for s, o, n in zip(chunk.size, chunk.offsets, chunk.sizes, strict=True)):
            return f"a chunk of {chunk.fqn!r:.80} does not fit into its tensor"
    return ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text is expected")
    return value


def _are_counts(numbers: Iterable[int]) -> bool:
    return all(0 <= number <= _INT64_MAX for number in numbers)


@dataclass(frozen=True, slots=True)
class PartReference:
    name: str
    ranks: tuple[int, ...]
    digest: str
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Which parts make the checkpoint."""

    step: int
    generation: str
    run_id: str
    world_size: int
    plan_id: str
    created_ns: int
    """Wall clock, for people."""
    size_bytes: int
    digest_algorithm: str
    metadata_digest: str
    """Digest of `.metadata`. If the two do not match, the commit was interrupted."""
    parts: tuple[PartReference, ...]
    started_ns: int = 0
    """Wall clock time at which the save began, for people. 0: not known, as a later run finished the commit."""
    cause: str = ""
    """What made the save due, a `pillion.wire.home.Cause`. Empty: not known."""
    differing: tuple[str, ...] = ()
    """Names whose values differed from rank to rank. The checkpoint has the lowest rank's value. Optional; at most 256."""
    owner: str = ""
    """In a cluster: kind, name and UID of the object whose pods saved it. Optional, for people."""
    remarks: Remarks = field(default_factory=Remarks)
    """What rank 0's script said about the save. Optional."""

    def encode(self) -> bytes:
        return json.dumps(
            {
                "format": FORMAT_VERSION,
                "step": self.step,
                "generation": self.generation,
                "run_id": self.run_id,
                "world_size": self.world_size,
                "plan_id": self.plan_id,
                "started_ns": self.started_ns,
                "created_ns": self.created_ns,
                "cause": self.cause,
                "size_bytes": self.size_bytes,
                "digest_algorithm": self.digest_algorithm,
                "metadata_digest": self.metadata_digest,
                "parts": [
                    {"name": p.name, "ranks": p.ranks, "digest": p.digest, "length": p.length} for p in self.parts
                ],
                **({"differing": self.differing} if self.differing else {}),
                **({"owner": self.owner} if self.owner else {}),
                **self.remarks.to_document(),
            },
            separators=(",", ":"),
        ).encode()


def is_manifest(data: bytes) -> bool:
    """Whether these bytes are a manifest of any release, even a damaged one, and not a user's file of that name."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"format", "generation", "parts"} <= document.keys()


def decode_manifest(data: bytes) -> Manifest:
    """
    Read a manifest.

    Raises:
        ManifestError: damaged, or of another format.
    """
    document = _document(data, "manifest")
    try:
        made = Manifest(
            step=int(document["step"]),
            generation=_text(document["generation"]),
            run_id=_text(document["run_id"]),
            world_size=int(document["world_size"]),
            plan_id=_text(document["plan_id"]),
            started_ns=int(document.get("started_ns", 0)),
            created_ns=int(document["created_ns"]),
            cause=_text(document.get("cause", "")),
            differing=tuple(_text(fqn) for fqn in document.get("differing", ())),
            owner=_text(document.get("owner", "")),
            remarks=remarks.read(document),
            size_bytes=int(document["size_bytes"]),
            digest_algorithm=_text(document["digest_algorithm"]),
            metadata_digest=_text(document["metadata_digest"]),
            parts=tuple(
                PartReference(_text(p["name"]), tuple(map(int, p["ranks"])), _text(p["digest"]), int(p["length"]))
                for p in document["parts"]
            ),
        )
    except _DAMAGE as err:
        raise ManifestError(f"the manifest is damaged: {type(err).__name__}: {err!s:.200}") from err
    for part in made.parts:
        if names.parse_part_file(part.name) is None:
            raise ManifestError(f"the manifest is damaged: {part.name!r:.80} is not the name of a part file")
    return made


def _document(data: bytes, what: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as err:  # ValueError: not UTF-8, not JSON, or a number of too many digits
        raise ManifestError(f"the {what} is not JSON: {err!s:.200}") from err
    if not isinstance(document, dict):
        raise ManifestError(f"the {what} must be an object")
    version = document.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise ManifestError(f"the {what} has format {version!r}; this release reads 1 to {FORMAT_VERSION}")
    return document
