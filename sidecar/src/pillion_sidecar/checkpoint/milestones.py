"""
The notes of a root besides its checkpoints: the last committed step, the last verified step, and the files of a named `StorageWriter`.

Called from: the executor, `checkpoint.catalog`, `checkpoint.retention`.

The notes are small files below names.INTERNAL_DIR. No load needs them: if a note is lost, only its fact is forgotten.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pillion.wire import names
from pillion_sidecar.checkpoint.commit import committed_as
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.generation import Order, order_of

NEWEST: Final = "newest.json"
"""Name of the file below names.INTERNAL_DIR that has the last committed step. With it a load notices the loss of that checkpoint. It has the run's
journal too."""


def _internal(root: Folder) -> Folder:
    return root.below(names.INTERNAL_DIR)


def remember(root: Folder, step: int, generation: str, run: Mapping[str, Any] | None = None) -> None:
    """
    Note that `step` is the newest commit. This follows the commit: a crash between the two loses only the note.

    Args:
        run: the run's journal (`run.journal`), which is in the same file, so that it costs no request of its own. None: the one on the root stays.

    Raises:
        OSError: the storage failed.
    """
    document: dict[str, Any] = {"step": step, "generation": generation, "time_ns": time.time_ns()}
    kept = run if run is not None else journal_of(root)
    if kept is not None:
        document["run"] = kept
    _internal(root).make()
    _internal(root).put(NEWEST, json.dumps(document).encode())


def journal_of(root: Folder) -> Mapping[str, Any] | None:
    """Return the run's journal as the last commit has left it; None: there is no readable one."""
    try:
        document = json.loads(_internal(root).read(NEWEST))["run"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def remembered(root: Folder) -> tuple[int, Order] | None:
    """Return the last committed step and its order; None: there is no readable note of it."""
    try:
        document = json.loads(_internal(root).read(NEWEST))
        return int(document["step"]), order_of(str(document["generation"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


VERIFIED: Final = "verified.json"
"""Name of the file below names.INTERNAL_DIR that has the checkpoint that a load has verified last."""


def note_verified(root: Folder, step: int) -> None:
    """
    Note that a load has read every byte of `step` from storage, and that all digests matched. Retention keeps this step.

    Raises:
        OSError: the storage failed.
    """
    text = json.dumps({"step": step, "generation": committed_as(root.below(names.step_directory(step)))})
    _internal(root).make()
    _internal(root).put(VERIFIED, text.encode())


def verified(root: Folder) -> set[int]:
    """Return the step that a load has verified last. Return nothing if another checkpoint has replaced it since."""
    try:
        document = json.loads(_internal(root).read(VERIFIED))
        step, generation = int(document["step"]), document["generation"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return set()
    return {step} if committed_as(root.below(names.step_directory(step))) == generation else set()


WRITTEN: Final = "written"
"""Name of the folder below names.INTERNAL_DIR that has the files of each step that a named `StorageWriter` has written. Such a writer leaves
no manifest."""


def note_written(root: Folder, step: int, generation: str, files: Iterable[str]) -> None:
    """
    Note which files a named `StorageWriter` has left of a step. Retention later removes only these.

    Raises:
        OSError: the storage failed.
    """
    text = json.dumps({"generation": generation, "files": sorted(files)})
    _internal(root).below(WRITTEN).make()
    _internal(root).below(WRITTEN).put(f"{step}.json", text.encode())


def forget_written(root: Folder, step: int) -> None:
    """Remove the note that `note_written` made for a step that retention has removed. Raises: OSError."""
    _internal(root).below(WRITTEN).delete([f"{step}.json"])


def written(root: Folder, step: int) -> tuple[str, list[str]] | None:
    """Return the generation and the files of a step that a named `StorageWriter` has written; None: there is no note."""
    try:
        document = json.loads(_internal(root).below(WRITTEN).read(f"{step}.json"))
        files = [os.path.basename(str(name)) for name in document["files"]]
        return str(document["generation"]), [name for name in files if name not in ("", ".", "..")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
