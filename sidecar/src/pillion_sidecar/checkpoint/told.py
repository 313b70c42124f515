"""
Which commits of a root a training script has been told of: a small note, so that each commit is told once, also after a restart.

Called from: `supervisor.dispatcher`, for rank 0 of a script that wants to be told (`Checkpointer(on_commit=...)`).

A commit is a step with its generation, so a step that was saved again is told again. The first look at a root counts all that is there as
told.
"""

from __future__ import annotations

import json
from typing import Final

from pillion.wire import names
from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.storage.folder import Folder

TOLD: Final = "told.json"
"""Name of the note below names.INTERNAL_DIR."""


def untold(root: Folder) -> list[int]:
    """
    Return the committed steps that nobody was told of, oldest commit first. Only Pillion's own checkpoints count.

    Raises:
        OSError: the storage failed.
        LoadError: a manifest cannot be read.
    """
    committed = {step: commit.committed_as(catalog.step_folder(root, step)) for step in _committed(root)}
    noted = _read(root)
    if noted is None:
        _write(root, {step: text for step, text in committed.items() if text is not None})
        return []
    left = [step for step, text in committed.items() if text is not None and noted.get(step) != text]
    orders = catalog.orders(root, dict.fromkeys(committed, True)) if left else {}
    return sorted(left, key=lambda step: (orders[step], step))


def note(root: Folder, step: int) -> None:
    """
    Note that a script was told of the commit of a step. The notes of steps that are gone are dropped.

    Raises:
        OSError: the storage failed.
    """
    generation = commit.committed_as(catalog.step_folder(root, step))
    if generation is None:
        return  # removed, or replaced by another program, meanwhile
    there = {names.parse_step_directory(name) for name in root.folders()}
    noted = {each: text for each, text in (_read(root) or {}).items() if each in there}
    _write(root, noted | {step: generation})


def _committed(root: Folder) -> list[int]:
    return [step for step, done in catalog.steps(root).items() if done]


def _read(root: Folder) -> dict[int, str] | None:
    """Return step -> generation of the commits that were told. None: nobody has looked yet, or the note is damaged."""
    try:
        document = json.loads(root.below(names.INTERNAL_DIR).read(TOLD))
        return {int(step): str(text) for step, text in document["told"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write(root: Folder, told: dict[int, str]) -> None:
    folder = root.below(names.INTERNAL_DIR)
    folder.make()
    folder.put(TOLD, json.dumps({"told": {str(step): text for step, text in sorted(told.items())}}).encode())
