"""
What `save` and `load` return: the handle of a save with its two futures, and the report of a load.

Called from: the trainer. A handle never raises by itself. Its `result` raises when the caller calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from pillion.callbacks import Outcome
from pillion.errors import PillionError, SaveSkipped, UsageError
from pillion.wire.load_messages import Tier
from pillion.wire.remarks import NO_REMARKS

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint."""

    step: int
    path: str | None
    """Its directory on storage, or its URL. None for a snapshot that stays in memory, or on the nodes' disks. That of `latest` and of `on_commit`
    is never None."""
    size_bytes: int = 0
    """Bytes on storage, all ranks."""
    persist_s: float = 0.0
    """Seconds from the seal of the last local rank until all bytes were durable."""
    commit_s: float = 0.0
    """Seconds from the last durable byte until the checkpoint was visible."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics of its save."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The metadata of its save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did."""

    step: int | None
    """The loaded step. None if there was no checkpoint and the policy allows a fresh start."""
    tier: Tier
    """``arena``, ``local``, ``storage`` or ``fresh``."""
    path: str | None
    """Directory on storage, or URL, of the loaded checkpoint. None for a snapshot in memory, and without a checkpoint."""
    elapsed_s: float
    size_bytes: int
    refused: Mapping[str, str]
    """Corrupt checkpoints that the load skipped: where -> why."""
    missing: tuple[str, ...] = ()
    """Names in the state dict that the checkpoint lacks. Their values are unchanged. Only with ``strict=False``; otherwise an error."""
    unexpected: tuple[str, ...] = ()
    """Names in the checkpoint that no rank requested, as the shortest dotted prefixes; at most 256."""
    narrowed: Mapping[str, str] = field(default_factory=dict)
    """Name -> conversion to a dtype that cannot hold every stored value: ``int64 -> int16``."""
    replaced: tuple[str, ...] = ()
    """Tensors and stateful objects that could not be filled in place. The state dict holds new objects instead."""
    differing: tuple[str, ...] = ()
    """Names whose values differed from rank to rank at the save. Every rank now has the lowest rank's value. Only from storage."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Newer snapshots in memory that lack a requested value: ``arena:15`` -> why."""
    set_aside: tuple[int, ...] = ()
    """Committed steps ahead of the loaded one. They stay on storage, and only a load by number takes them. For a load with ``path``: the
    steps that this run has itself."""
    conflicting: tuple[str, ...] = ()
    """Names whose tensors share memory here and have different values in the checkpoint. One value overwrote the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The checkpoint that a load would take."""

    step: int
    tier: Tier
    """``arena``, ``local`` or ``storage``."""
    path: str | None
    """Its directory on storage, or its URL. None for a snapshot in memory."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The metrics of its save, as rank 0 gave them."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The metadata of its save, as rank 0 gave it."""


class SaveHandle:
    """
    One save, from the copy to the commit.

    Attributes:
        step: the training step.
        staged: resolves with None when the state is in the arena. From then on the trainer may change its tensors.
        held: resolves with None when every pod has the state on its node's disk (the policy's `storage.local`), and at the commit if it
            does not go there. From then on the save outlives the trainers. Its error is that of `committed`.
        committed: resolves with the `Checkpoint` on every rank, or with the error that names the failed ranks.
            Callbacks of both futures run one after another in a thread of their own. They may block, save, load and raise.
        stall_s: seconds that `save` held up the training loop. For an overlapped save it includes the optimizer hook.
    """

    def __init__(self, step: int, *, for_disk: bool = False) -> None:
        self._pid = os.getpid()
        self.step = step
        self.for_disk = for_disk
        """Whether a save that stays in memory goes to the nodes' disks as well."""
        self.staged: Future[None] = Outcome()
        self.held: Future[None] = Outcome()
        self.committed: Outcome[Checkpoint] = Outcome(self.note_examined)
        self.stall_s = 0.0
        self.claiming = False
        """Whether the save waits for a slot."""
        self.remarks = NO_REMARKS
        """The metrics and the metadata of this save on this rank."""
        self.examined = False
        """True once the script has looked at the outcome. Then the end of the process does not report a loss again."""
        self.incomplete = False
        """True if other ranks may have failed as well. The sidecar names them later than it reports the loss."""

    def result(self, timeout_s: float | None = None) -> Checkpoint:
        """
        Wait for the commit.

        Blocks: up to `timeout_s`. Without a limit if it is None; every phase of a save has its own bound.

        Raises:
            PillionError: there is no checkpoint. Mostly a `SaveError`, whose `.failures` has each failed rank and its cause. An error
                of this rank alone keeps its class: `SidecarUnavailable`, `ArenaExhausted`, `UnsupportedLeaf`, `UsageError`.
            UsageError: this process is a forked child of the trainer.
            TimeoutError: the save did not end within `timeout_s`.
        """
        if self.inherited:
            raise UsageError(
                f"process {os.getpid()} is a forked child: only the trainer, process {self._pid}, knows the outcome of the save of"
                f" step {self.step}"
            )
        return self.committed.result(timeout_s)

    @property
    def awaited(self) -> bool:
        """Whether a thread of the script waits now: for the commit, or for a slot, which earlier saves take."""
        return self.claiming or self.committed.waiting > 0

    @property
    def inherited(self) -> bool:
        """Whether this process is a forked child of the trainer."""
        return os.getpid() != self._pid

    def note_examined(self) -> None:
        self.examined = True

    def error(self, timeout_s: float | None = 0.0) -> BaseException | None:
        """
        Return the error of the save without setting `examined`. None if the save is committed, or in flight and `timeout_s` is 0.

        Blocks: up to `timeout_s`.

        Raises:
            TimeoutError: the save did not end within `timeout_s`, if that is not 0.
        """
        if timeout_s == 0.0 and not self.committed.done():
            return None
        return Future.exception(self.committed, timeout_s)

    # Both the staging thread and the listening thread may end a handle, even at the same moment when the sidecar dies. The first
    # result stays. Checking `done()` before would leave a gap between check and set.

    def resolve_staged(self) -> None:
        with contextlib.suppress(InvalidStateError):
            self.staged.set_result(None)

    def resolve_held(self) -> None:
        self.resolve_staged()
        with contextlib.suppress(InvalidStateError):
            self.held.set_result(None)

    def resolve(self, checkpoint: Checkpoint) -> None:
        self.resolve_held()
        if self.remarks != NO_REMARKS:
            said = self.remarks
            checkpoint = dataclasses.replace(checkpoint, metrics=said.metrics, metadata=said.metadata)
        with contextlib.suppress(InvalidStateError):
            self.committed.set_result(checkpoint)

    def fail(self, error: PillionError) -> None:
        """End the handle with an error, in whatever phase the save is."""
        with contextlib.suppress(InvalidStateError):
            self.staged.set_exception(error)
        with contextlib.suppress(InvalidStateError):
            self.held.set_exception(error)
        with contextlib.suppress(InvalidStateError):
            self.committed.set_exception(error)

    def __repr__(self) -> str:
        if not self.committed.done():
            state = "staged" if self.staged.done() else "staging"
        else:
            state = "failed" if self.error() else "committed"
        return f"<SaveHandle step={self.step} {state} stall_s={self.stall_s:.4f}>"


def log_lost(step: int, error: BaseException) -> None:
    """Log that a save made no checkpoint. A save that the policy's `overlap` dropped is no error."""
    if isinstance(error, SaveSkipped):
        _log.info("pillion: save of step %d was dropped: %s", step, error)
    else:
        _log.error("pillion: save of step %d failed: %s", step, error)
