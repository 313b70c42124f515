"""
The pins of a root: small files that keep a step from every sidecar's retention.

Called from: `checkpoint.retention`, `executor.save.dcp_writer`.

    <root>/.pillion/pins/step-<n>.<holder>.json     one file for each holder: a holder removes its own pin only

A pin keeps the step, whatever the policy says. It does not keep training from saving the step again after a rollback, which replaces the checkpoint.
Only the name of the file counts. So a pin with damaged content still holds.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pillion.wire import names
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.storage.folder import Folder

PINS: Final = "pins"
"""Name of the folder below names.INTERNAL_DIR that has the pins."""
PEOPLE: Final = "people"
"""Holder of the pins that people set with `pillion pin`."""
_HOLDER: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_REASON_CHARS: Final = 1024
"""Maximum of characters of a pin's reason."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One pin of a step."""

    step: int
    holder: str
    reason: str = ""
    """Why, for people. Empty: not said, or not readable."""
    created_ns: int = 0
    """Wall clock time of the pin. 0: not readable."""


def _folder(root: Folder) -> Folder:
    return root.below(f"{names.INTERNAL_DIR}/{PINS}")


def _file(step: int, holder: str) -> str:
    if not _HOLDER.fullmatch(holder):
        raise ValueError(
            f"holder {holder!r}: at most 63 lower-case letters, digits and dashes are allowed, a letter first"
        )
    return f"{names.step_directory(step)}.{holder}.json"


def _parse(name: str) -> tuple[int, str] | None:
    directory, _, rest = name.partition(".")
    holder, _, extension = rest.partition(".")
    step = names.parse_step_directory(directory)
    return (step, holder) if step is not None and extension == "json" and _HOLDER.fullmatch(holder) else None


def pin(root: Folder, step: int, *, holder: str = PEOPLE, reason: str = "") -> bool:
    """
    Pin a committed step. After that no retention removes it.

    Retention looks for pins before and after it makes a checkpoint invisible. So either retention sees this pin, or this call sees that the
    checkpoint is gone.

    Returns:
        True: this call has pinned the step. False: the holder had pinned it already.

    Raises:
        FileNotFoundError: the root has no committed checkpoint of this step, or retention has just removed it. No pin is left.
        ValueError: the holder's name is wrong.
        OSError: the storage failed. The pin may be there.
    """
    name, folder = _file(step, holder), _folder(root)
    checkpoint = root.below(names.step_directory(step))
    if commit.is_committed(checkpoint):
        document = {"reason": reason[:MAX_REASON_CHARS], "created_ns": time.time_ns()}
        folder.make()
        made = folder.entry(name) is None and folder.create(name, json.dumps(document).encode())
        if commit.is_committed(checkpoint):
            return made
        folder.delete([name])
    raise FileNotFoundError(f"{checkpoint} holds no committed checkpoint")


def unpin(root: Folder, step: int, *, holder: str = PEOPLE) -> bool:
    """Remove a holder's pin of a step. Return whether there was one. Raises: ValueError: the holder's name is wrong; OSError."""
    name, folder = _file(step, holder), _folder(root)
    if folder.entry(name) is None:
        return False
    folder.delete([name])
    return True


def pinned(root: Folder) -> dict[int, tuple[str, ...]]:
    """Return the pinned steps, each with the holders of its pins. Reads names only. Raises: OSError."""
    holders: dict[int, tuple[str, ...]] = {}
    for name in sorted(_folder(root).files()):
        parsed = _parse(name)
        if parsed is not None:
            holders[parsed[0]] = (*holders.get(parsed[0], ()), parsed[1])
    return holders


def read(root: Folder) -> Mapping[int, tuple[Pin, ...]]:
    """Return the pins by step, with reason and time. Raises: OSError."""
    return {step: tuple(_read(root, step, each) for each in holders) for step, holders in pinned(root).items()}


def _read(root: Folder, step: int, holder: str) -> Pin:
    try:
        document = json.loads(_folder(root).read(_file(step, holder)))
        return Pin(step, holder, str(document["reason"]), int(document["created_ns"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Pin(step, holder)
