"""
The contents of one committed checkpoint as commands look at them: its items, its leaves, and its manifest. Never writes to the folder.

Called from: the commands of `cli`.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pillion.wire import manifest
from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.storage import archive
from pillion_sidecar.storage.folder import Folder


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, with all of its chunks."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[manifest.StoredChunk, ...]

    @property
    def num_bytes(self) -> int | None:
        """Size of the values, bytes; None: this release does not know the dtype."""
        item = archive.SUPPORTED_DTYPES.get(self.dtype)
        return None if item is None else math.prod(self.shape) * item


def read(folder: Folder, step: int | None) -> catalog.Stored:
    """Return where everything in a checkpoint lies. Raises: catalog.Damaged; LoadError: the storage does not answer."""
    return catalog.read(folder, step if step is not None else 0, repair=False)


def tensors(stored: catalog.Stored, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Tensor]:
    """Return the tensors whose names match a pattern of `include` (empty: all) and none of `exclude`, sorted by name. Pure."""
    return [
        Tensor(fqn, chunks[0].dtype, chunks[0].size, tuple(sorted(chunks, key=lambda chunk: chunk.offsets)))
        for fqn, chunks in sorted(stored.chunks.items())
        if matches(fqn, include, exclude)
    ]


def matches(fqn: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether a name matches the patterns of shells (`*`, `?`, `[ab]`). Pure."""
    wanted = list(include)
    return (not wanted or any(fnmatch.fnmatchcase(fqn, each) for each in wanted)) and not any(
        fnmatch.fnmatchcase(fqn, each) for each in exclude
    )


def manifest_document(folder: Folder) -> Mapping[str, Any] | None:
    """Return the manifest's JSON with all of its fields, also those of newer releases; None: there is none that can be read. Raises: OSError."""
    try:
        document = json.loads(commit.read_manifest(folder))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
