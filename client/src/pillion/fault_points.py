"""
The named phases of a save and a load, and the points in the code where each phase begins.

Called from: client and sidecar, once a phase. A point costs one comparison. Without PILLION_FAULTS nothing observes the points; with it,
`pillion.testing.faults` does, and must be installed.
Must never: do anything by itself.

    trainer      claim (requests)   stage   seal
    supervisor   claim (grants)
    executor     plan   write   fsync   report   load   rescue
    coordinator  commit   publish   retain
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Final

from pillion.wire import names


class FaultPoint(StrEnum):
    """Phases in the order of a save. `LOAD` belongs to a load, `RESCUE` to the recovery after a trainer's death."""

    CLAIM = "claim"
    """A rank requests a slot."""
    STAGE = "stage"
    """The slot is granted. Nothing is copied yet."""
    SEAL = "seal"
    """Everything is copied. The slot's header is not sealed yet."""
    PLAN = "plan"
    """The pods agree on who writes what."""
    WRITE = "write"
    """A block of a data file was passed to the kernel."""
    FSYNC = "fsync"
    """All blocks were passed to the kernel. Nothing is durable yet."""
    REPORT = "report"
    """Data and part file of this pod are durable. The coordinator does not know it yet."""
    COMMIT = "commit"
    """Every pod has reported. The manifest is not written yet."""
    PUBLISH = "publish"
    """The manifest is in place. The commit marker is not."""
    RETAIN = "retain"
    """The checkpoint is committed. Older checkpoints are about to be removed."""
    LOAD = "load"
    """The pods agree on the checkpoint to load. It is not read yet."""
    RESCUE = "rescue"
    """A trainer is dead. The pods are about to agree on the snapshot that all of them persist."""


Observer = Callable[[FaultPoint, int | None, int | None, str], None]
"""Function that every point calls, with phase, rank, step and path."""

_observer: Observer | None = None
_ranks: Collection[int] = ()
_step: int | None = None

NOBODY: Final = -1


def observe(observer: Observer | None) -> None:
    """Set the observer that every point calls. None removes it."""
    global _observer
    _observer = observer


def serving(ranks: Collection[int]) -> None:
    """Set the ranks that this process works for. Points without a rank use them."""
    global _ranks
    _ranks = ranks


def working_on(step: int | None) -> None:
    """Set the step that this process works on. Points without a step use it."""
    global _step
    _step = step


def ranks() -> Collection[int]:
    return _ranks


def reach(phase: FaultPoint, *, rank: int | None = None, step: int | None = None, path: str = "") -> None:
    """
    Report that this process has reached a fault point.

    Args:
        phase: the point.
        rank: the rank that it works for. None: all ranks that this process serves.
        step: the step of the save or load. None: the step that this process works on.
        path: the file or directory in use, if any.

    Raises: the error of an injected fault; otherwise nothing.
    """
    if _observer is not None:
        _observer(phase, rank, _step if step is None else step, path)


if os.environ.get(names.ENV_FAULTS):
    importlib.import_module("pillion.testing.faults").arm()
