"""
How long the trainings of a root ran and how often they failed: a small note, from which a later session knows the rate of failures.

Called from: `supervisor.pacing`, in the coordinator's sidecar, which alone writes it.

    a session begins    open = its id; one that is still open has failed
    while it runs       the time of training, the costs of saves
    it ends cleanly     open = ""

A note that is lost or damaged counts as none: the rate of failures is assumed again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Final

from pillion.wire import codec, names
from pillion_sidecar.interval import Costs, History
from pillion_sidecar.storage.folder import Folder

TRAININGS: Final = "trainings.json"
"""Name of the note below names.INTERNAL_DIR."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """See the module."""

    history: History = field(default_factory=History)
    open: str = ""
    """Session that trains, or ended without saying so. Empty: the last one ended cleanly."""
    costs: Costs | None = None
    """What saves cost at last. None: not measured."""
    world_size: int = 0
    """Number of ranks that the costs were measured with."""
    steps: int = 0
    """The last period in steps. 0: there was none."""


def read(root: Folder) -> Note:
    """
    Return the note of a root, an empty one if there is none.

    Raises:
        OSError: the storage failed.
    """
    try:
        note: Note = codec.read(Note, json.loads(root.below(names.INTERNAL_DIR).read(TRAININGS)))
    except (FileNotFoundError, ValueError, RecursionError, codec.Wrong):
        return Note()
    return note if _is_sound(note) else Note()


def write(root: Folder, note: Note) -> None:
    """
    Replace the note of a root.

    Raises:
        OSError: the storage failed.
    """
    folder = root.below(names.INTERNAL_DIR)
    folder.make()
    folder.put(TRAININGS, json.dumps(codec.write(note)).encode())


def _is_sound(note: Note) -> bool:
    """Whether no number in a note would spoil the arithmetic: it lies on a storage that others write to."""
    costs = (0.0, 0.0, 0.0) if note.costs is None else (note.costs.stall_s, note.costs.persist_s, note.costs.step_s)
    return all(math.isfinite(each) and each >= 0 for each in (note.history.observed_s, note.history.failures, *costs))
