"""
The named phases of a save and a load, and the points in the code where each of them is entered.

Called from: client and sidecar, once a phase. A point costs one comparison: nothing looks at it unless PILLION_FAULTS asks for faults
(`pillion.testing.faults`, which then must be installed).
Must never: do anything by itself.

    trainer      claim (asks)   stage   seal
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
    """See the module. In the order of a save; `LOAD` is of a load, `RESCUE` of what follows a trainer's death."""

    CLAIM = "claim"
    """A rank asks for a slot."""
    STAGE = "stage"
    """The slot is granted, nothing is copied yet."""
    SEAL = "seal"
    """Everything is copied, the header does not say so yet."""
    PLAN = "plan"
    """The pods agree on who writes what."""
    WRITE = "write"
    """A block of a data file was handed to the kernel."""
    FSYNC = "fsync"
    """All blocks were, nothing is durable yet."""
    REPORT = "report"
    """Data and part file of this pod are durable, the coordinator does not know."""
    COMMIT = "commit"
    """Every pod has reported, nothing is written yet."""
    PUBLISH = "publish"
    """The manifest is in place, the commit marker is not."""
    RETAIN = "retain"
    """Committed; older checkpoints go."""
    LOAD = "load"
    """The pods agree on what to load; it is not read yet."""
    RESCUE = "rescue"
    """A trainer is dead; the pods are about to agree on the snapshot that all of them persist."""


Observer = Callable[[FaultPoint, int | None, int | None, str], None]
"""Called with phase, rank, step and path."""

_observer: Observer | None = None
_ranks: Collection[int] = ()
_step: int | None = None

NOBODY: Final = -1


def observe(observer: Observer | None) -> None:
    """Have every point call `observer`; None: nobody."""
    global _observer
    _observer = observer


def serving(ranks: Collection[int]) -> None:
    """Which ranks this process works for, at points that do not say."""
    global _ranks
    _ranks = ranks


def working_on(step: int | None) -> None:
    """Which step this process works on, at points that do not say."""
    global _step
    _step = step


def ranks() -> Collection[int]:
    return _ranks


def reach(phase: FaultPoint, *, rank: int | None = None, step: int | None = None, path: str = "") -> None:
    """
    The code is here now.

    Args:
        rank: for which rank; None: for all that this process serves.
        step: of which save or load; None: the one that this process works on.
        path: of the file or folder at hand.

    Raises: whatever a fault that was asked for raises, and otherwise nothing.
    """
    if _observer is not None:
        _observer(phase, rank, _step if step is None else step, path)


if os.environ.get(names.ENV_FAULTS):
    importlib.import_module("pillion.testing.faults").arm()
