"""
What a root remembers besides its checkpoints: which one was committed last, which one a load has verified last, and what a `StorageWriter`
by name has written. Called from: the executor, `checkpoint.catalog`, `checkpoint.retention`.

Small files below names.INTERNAL_DIR. None of them is needed to load a checkpoint: one that is lost forgets what it said.
"""

from __future__ import annotations

import json
import os
import time
from typing import Final

from pillion.wire import names
from pillion_sidecar.checkpoint.commit import Order, committed_as, order_of
from pillion_sidecar.storage import durable

NEWEST: Final = "newest.json"
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
    durable.replace_file(path, text.encode())


def remembered(root: str) -> tuple[int, Order] | None:
    """The step that was committed last, and its order, as far as anybody wrote it down."""
    try:
        with open(os.path.join(root, names.INTERNAL_DIR, NEWEST), "rb") as file:
            document = json.loads(file.read())
        return int(document["step"]), order_of(str(document["generation"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


VERIFIED: Final = "verified.json"
"""Below names.INTERNAL_DIR: which checkpoint a load has read and verified last."""


def note_verified(root: str, step: int) -> None:
    """
    Write down that every byte of `step` was read from storage and matched its digest: retention keeps it.

    Raises:
        OSError.
    """
    text = json.dumps({"step": step, "generation": committed_as(os.path.join(root, names.step_directory(step)))})
    path = os.path.join(root, names.INTERNAL_DIR, VERIFIED)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    durable.replace_file(path, text.encode())


def verified(root: str) -> set[int]:
    """The step that a load has verified last, while it is still the checkpoint that it was then; else none."""
    try:
        with open(os.path.join(root, names.INTERNAL_DIR, VERIFIED), "rb") as file:
            document = json.loads(file.read())
        step, generation = int(document["step"]), document["generation"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return set()
    return {step} if committed_as(os.path.join(root, names.step_directory(step))) == generation else set()


WRITTEN: Final = "written"
"""Below names.INTERNAL_DIR: which files a `StorageWriter` by name has left of each step; it leaves no manifest."""


def written_record(root: str, step: int) -> str:
    return os.path.join(root, names.INTERNAL_DIR, WRITTEN, f"{step}.json")


def written(root: str, step: int) -> tuple[str, list[str]] | None:
    """Generation and files of a step that a `StorageWriter` by name has written; None: not noted."""
    try:
        with open(written_record(root, step), "rb") as file:
            document = json.loads(file.read())
        files = [os.path.basename(str(name)) for name in document["files"]]
        return str(document["generation"]), [name for name in files if name not in ("", ".", "..")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
