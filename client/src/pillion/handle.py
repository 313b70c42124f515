"""
What `save` and `load` tell: a handle with two futures and what the save cost, and the report of a load.

Called from: the trainer. A handle never raises by itself: `result` does, when the caller asks for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from pillion.callbacks import Outcome
from pillion.errors import PillionError, SaveSkipped, UsageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint."""

    step: int
    path: str
    """Its directory on storage; empty for a snapshot that stays in the arena."""
    size_bytes: int = 0
    """Bytes on storage, all ranks."""
    persist_s: float = 0.0
    """From the seal of the last local rank until all bytes were durable."""
    commit_s: float = 0.0
    """From the last durable byte until the checkpoint was visible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did."""

    step: int | None
    """The step loaded; None when there was no checkpoint and the policy allows a fresh start."""
    tier: str
    """``arena``, ``storage`` or ``fresh``."""
    path: str
    elapsed_s: float
    size_bytes: int
    refused: Mapping[str, str]
    """Checkpoints that were found corrupt and skipped: where -> why."""
    missing: tuple[str, ...] = ()
    """Names that were asked for and are not in the checkpoint: left as they were. Only with ``strict=False``, else it is an error."""
    unexpected: tuple[str, ...] = ()
    """What the checkpoint has and no rank asked for: the shortest dotted prefixes under which nothing was asked for, at most 256."""
    narrowed: Mapping[str, str] = field(default_factory=dict)
    """Name -> how it was converted, where the type here cannot hold every value of the one there: ``int64 -> int16``."""
    replaced: tuple[str, ...] = ()
    """Tensors, and objects with a state, that could not be filled in place: the dict has new objects in their place."""
    differing: tuple[str, ...] = ()
    """Names whose value differed from rank to rank when it was saved; every rank has the lowest rank's now. Only from storage."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Snapshots in memory that are newer and do not hold what was asked for: ``arena:15`` -> why."""
    set_aside: tuple[int, ...] = ()
    """Committed steps ahead of the one loaded. They stay on storage, and are loaded by their number only."""
    conflicting: tuple[str, ...] = ()
    """Names whose tensors share memory here, and whose values in the checkpoint differ: one of them was written over the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a load would take."""

    step: int
    tier: str
    """``arena`` or ``storage``."""
    path: str
    """Its directory on storage; empty for a snapshot in the arena."""


class SaveHandle:
    """
    One save on its way.

    Attributes:
        step: the training step.
        staged: resolves with None once the state is in the arena and the trainer's tensors may change.
        committed: resolves with the `Checkpoint` on every rank, or with the error that names the failed ranks.
            Callbacks of both run one after another in a thread of their own; they may block, save, load and raise.
        stall_s: seconds that `save` (and the optimizer hook, for an overlapped one) held up the training loop.
    """

    def __init__(self, step: int) -> None:
        self._pid = os.getpid()
        self.step = step
        self.staged: Future[None] = Outcome()
        self.committed: Future[Checkpoint] = Outcome(self.note_asked)
        self.stall_s = 0.0
        self.asked = False
        """Somebody has learned what became of it: nobody else has to be told at the end."""
        self.incomplete = False
        """Other ranks may have failed, too: the sidecar says which, later than it says that the save is lost."""

    def result(self, timeout_s: float | None = None) -> Checkpoint:
        """
        Wait for the commit.

        Blocks: up to `timeout_s`; for ever when it is None (every phase behind it has a bound of its own).

        Raises:
            PillionError: there is no checkpoint. Mostly a `SaveError`, whose `.failures` say on which ranks and why; what ended
                the save on this rank alone is what it is: `SidecarUnavailable`, `ArenaExhausted`, `UnsupportedLeaf`, `UsageError`.
            UsageError: this process is a forked child of the one that saves.
            TimeoutError: not within `timeout_s`.
        """
        if self.inherited:
            raise UsageError(
                f"process {os.getpid()} is a forked child: only the trainer, process {self._pid}, knows the outcome of the save of"
                f" step {self.step}"
            )
        return self.committed.result(timeout_s)

    @property
    def inherited(self) -> bool:
        """Whether this process is a forked child of the one that saves."""
        return os.getpid() != self._pid

    def note_asked(self) -> None:
        self.asked = True

    def error(self, timeout_s: float | None = 0.0) -> BaseException | None:
        """
        What `committed.exception` says, in nobody's name: `asked` stays as it is. None also while it is on its way and `timeout_s` is 0.

        Raises:
            TimeoutError: not within `timeout_s`, if that is not 0.
        """
        if timeout_s == 0.0 and not self.committed.done():
            return None
        return Future.exception(self.committed, timeout_s)

    # The thread that stages and the one that listens to the sidecar may both end a handle, at once when the sidecar dies: the first
    # end stays. A look before would leave a moment between look and end.

    def resolve_staged(self) -> None:
        with contextlib.suppress(InvalidStateError):
            self.staged.set_result(None)

    def resolve(self, checkpoint: Checkpoint) -> None:
        self.resolve_staged()
        with contextlib.suppress(InvalidStateError):
            self.committed.set_result(checkpoint)

    def fail(self, error: PillionError) -> None:
        """The save is lost, whatever phase it was in."""
        with contextlib.suppress(InvalidStateError):
            self.staged.set_exception(error)
        with contextlib.suppress(InvalidStateError):
            self.committed.set_exception(error)

    def __repr__(self) -> str:
        if not self.committed.done():
            state = "staged" if self.staged.done() else "staging"
        else:
            state = "failed" if self.error() else "committed"
        return f"<SaveHandle step={self.step} {state} stall_s={self.stall_s:.4f}>"


def log_lost(step: int, error: BaseException) -> None:
    """Say in the log that a save made no checkpoint. One that the policy's `overlap` dropped, as it was declared, is no error."""
    if isinstance(error, SaveSkipped):
        _log.info("pillion: save of step %d was dropped: %s", step, error)
    else:
        _log.error("pillion: save of step %d failed: %s", step, error)
