"""
`Checkpointer`: what a training script sees of Pillion.

Called from: the training thread. No collective runs after the constructor. `save` never raises into the training loop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, Final, SupportsIndex

import torch.distributed as dist

from pillion import (
    addresses,
    callbacks,
    exit_drain,
    group,
    load_notes,
    loading,
    policy_source,
    reading,
    remarking,
    renaming,
    saving,
    schedule,
    steps,
    store_mode,
    telling,
)
from pillion import leaves as leaves_module
from pillion.cadence import Due
from pillion.errors import SettingsError, SidecarUnavailable, UsageError
from pillion.handle import Checkpoint, Found, LoadReport, SaveHandle
from pillion.wire import control, events, names, remarks
from pillion.wire.message import Message

_log = logging.getLogger(__name__)

LATEST_TIMEOUT_S: Final = 60.0
"""Timeout for listing the storage. A shared file system under load takes seconds."""


class Checkpointer:
    """
    Saves and loads a job's state through the sidecar of its pod.

    Args:
        root: directory of the run's checkpoints, or the URL of a bucket and a prefix, such as s3://bucket/run-1 (gs://, az://). Leave it
            out in a pod, where the injected environment sets it.
        policy: a CheckpointPolicy for a run without a cluster: its `spec` as a mapping, or the path of a YAML or JSON file.
        process_group: the ranks that save together; None is the default group (or a single process).
        on_commit: called with the `Checkpoint` of each commit on storage, also of one that was rescued after a trainer died.
        on_failure: called with the step and the error of each save to storage that failed, or was dropped.
            Both are called on rank 0, once for each save, one call after another in a thread of callbacks. They may block and raise.

    Ranks: all of the process group construct it together. They construct several Checkpointers in the same order.

    Blocks: one collective on the process group, then up to session.CONNECT_TIMEOUT_S for the sidecar.

    Raises:
        SettingsError: the policy or an environment variable is wrong, or the root cannot be written. Lists all problems.
        SidecarUnavailable: there is no sidecar, and none could be started.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        policy: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_commit: telling.OnCommit | None = None,
        on_failure: telling.OnFailure | None = None,
    ) -> None:
        environ = os.environ
        self._closed = False
        self.last_load: LoadReport | None = None
        self._last_step = -1
        self._last: SaveHandle | None = None
        """The newest save. None after a load."""
        self._last_stored: SaveHandle | None = None
        """The newest save to storage."""
        self._has_begun = False
        """Whether this process has loaded or saved a state."""
        self._at_stake: SaveHandle | None = None
        """The newest save meant for storage, even if it was refused. It must not be lost unnoticed."""
        where = _root(root, environ)
        self._group = group.join(
            process_group,
            environ,
            root=where,
            read_policy=lambda environ: store_mode.policy_of_all(policy, environ),
        )
        # Behind the collective: every rank has the same root by now, so that all of them raise.
        addresses.check(where)
        self._session = store_mode.open_session(
            self._group,
            root=where,
            policy_document=policy_source.document(policy, environ),
            key=where,
            on_event=self._on_event,
            process_group=process_group,
            environ=environ,
        )
        self._collector = leaves_module.Collector()
        self._saver = saving.Saver(self._session, overlaps=True)
        self._schedule = schedule.Schedule(self._session)
        self._teller = telling.Teller(self._session, on_commit, on_failure)
        self._session.listen()
        self._teller.look()
        self._saver.prepare_load()
        exit_drain.drain_at_exit(self)

    @property
    def root(self) -> str:
        """Absolute directory, or URL, of the run's checkpoints. In a pod it is the sidecar's, which the trainer need not have."""
        return self._session.root

    # --- saving ----------------------------------------------------------------------------------------------------

    def due(self, step: SupportsIndex) -> bool:
        """
        Return whether a save is due at this step: by the policy's cadence, by a requested save, or because the pod ends.

        All ranks that call it at the same steps get the same answer, without communication. If the loop passes over steps, a save is
        due at the first step at or behind the one that was due.

        Raises:
            UsageError: `step` is not a whole number from 0 on (NumPy's and torch's integers are), or this process is a forked child.
        """
        self._session.check_process()
        return self._schedule.due(steps.whole(step))

    def save(
        self,
        state_dict: Mapping[str, Any],
        step: SupportsIndex,
        *,
        overlap: bool | None = None,
        persist: bool | None = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SaveHandle:
        """
        Copy the state into the arena, and return. The sidecar does the rest.

        Args:
            state_dict: nested mapping. Tensors, DTensors and ShardedTensors are copied; other values are pickled.
            step: the training step, anything with `__index__`. It may not decrease within a run, except after a load. Saving the
                newest step again returns the first save's handle.
            overlap: None copies weights and optimizer state beside the next forward and backward pass, once the script was seen to leave
                them alone from a save to the next optimizer step; that step waits for the copy. False copies all before it returns.
                True does not look first.
            persist: True saves to storage, False to the arena only. None decides by the policy's trigger for this step.
            metrics: name -> number, such as an evaluation's loss. Rank 0's count. They are in the manifest, in `find` and `latest`, and
                the policy's `retention.keepBest` judges by one of them.
            metadata: name -> value of JSON, up to remarks.MAX_METADATA_BYTES together, in the manifest, `find` and `latest`.

        Ranks: all, at the same steps. No collective.

        Blocks: for the copy of what does not wait (all, with `overlap=False`), and for a free slot under the policy's `overlap: Wait`.

        Raises:
            Nothing. The handle, the log and the sidecar's counters have a failure.
        """
        try:
            step, again = self._check_save(step, persist=persist)
        except UsageError as err:
            handle = SaveHandle(step)  # type: ignore[arg-type] # as the caller gave it
            _log.error("pillion: save of step %s refused: %s", step, err)
            if persist is not False:
                self._teller.watch(handle)
            handle.fail(err)
            if persist is not False:
                self._at_stake = handle
                if self._closed or self._session.inherited:
                    # Nothing closes this Checkpointer any more, so the lost save is recorded now.
                    exit_drain.closed(self, [handle])
            return handle
        if again is not None:
            if metrics or metadata:
                _log.warning(
                    "pillion: step %d is saved already, and keeps the metrics and metadata of its first save",
                    again.step,
                )
            return again
        for_disk = False
        if persist is None:
            tier = self._schedule.tier(step)
            persist, for_disk = tier is Due.PERSIST, tier is Due.LOCAL
        self._last_step = step
        self._has_begun = True
        said = remarking.checked(step, metrics, metadata)
        handle = self._last = self._saver.save(
            state_dict, step, persist=persist, for_disk=for_disk, overlap=overlap, remarks=said
        )
        if persist:
            self._last_stored = self._at_stake = handle
            self._teller.watch(handle)
            self._schedule.saved(step)
        return handle

    def _check_save(self, step: SupportsIndex, *, persist: bool | None) -> tuple[int, SaveHandle | None]:
        """Return the step as an int, and the handle of the save that already has this step."""
        self._session.check_process()
        if self._closed:
            raise UsageError("the Checkpointer is closed")
        step = steps.whole(step)
        last = self._last
        if last is not None and step == last.step:
            if persist and last is not self._last_stored:
                raise UsageError(
                    f"step {step} was saved to memory only: pass persist=True with the first save of a step"
                )
            return step, last
        if step <= self._last_step:
            # There was no save since the load. The loaded step itself may be saved again.
            raise UsageError(steps.too_old(step, self._last_step + (last is None), loaded=last is None))
        return step, None

    def wait(self, timeout_s: float) -> None:
        """
        Wait until no save is in flight, whatever their outcomes.

        Blocks: up to `timeout_s`.

        Raises:
            TimeoutError: some saves are still in flight. Names their steps.
        """
        self._session.check_process()
        deadline = time.monotonic() + timeout_s
        self._saver.wait_staged()
        for handle in self._session.pending():
            try:
                # Not 0 s: then `error` would not wait, and would return None for a save in flight.
                handle.error(max(0.001, deadline - time.monotonic()))
            except TimeoutError:
                left = sorted(each.step for each in self._session.pending())
                raise TimeoutError(f"saves of steps {left} are still in flight after {timeout_s} s") from None

    # --- loading ---------------------------------------------------------------------------------------------------

    def find(self, step: SupportsIndex | None = None, *, path: str | os.PathLike[str] | None = None) -> Found | None:
        """
        Return the checkpoint that `load` would take now, in memory or on storage. None if there is none. All ranks get the same answer.

        The next `load` takes this checkpoint, unless it does not fit the state dict. Use `find` before building a state dict that is
        expensive or has side effects (an optimizer creates its state in a step).

        Args:
            step: a committed step. None for the newest, or for what the policy's `restore` says.
            path: as for `load`.

        Ranks: all.

        Blocks: for saves in flight and for the listing of the storage; otherwise as `load`.

        Raises:
            LoadError: as `load`; `NoCheckpoint` if the policy demands a checkpoint. A missing `step` returns None instead.
            SidecarUnavailable: the sidecar went away and did not come back.
        """
        self._begin_load()
        return loading.find(self._session, steps.wanted(step), path=_source(path))

    def read(
        self,
        step: SupportsIndex | None = None,
        *,
        prefix: str | Sequence[str] | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """
        Return what a checkpoint holds, without a state dict to fill: whole tensors on the CPU, and all other values.

        Every tensor is whole, whatever ranks have saved it in parts. Where the ranks had different values under one name, it is the lowest
        rank's. The run does not change by a read: a later `load` takes what it would have taken before.

        Memory: every rank has all that it reads, in its own process. In the arena there is one part of it for each rank, of at most
        reading.PART_BYTES or the largest tensor. Name a `prefix` to read less.

        Args:
            step: a committed step. None for the newest, or for what the policy's `restore` says.
            prefix: dotted name, or several: read only the values of these names, and those below them. None for all.
            path: as for `load`.

        Returns:
            The values in nested dicts and lists, as they were saved. Keys of dicts are text. A list of which only a part was read is a dict
            by index. An empty dict was not saved, so it is missing.

        Ranks: all, with the same arguments.

        Blocks: as `load`.

        Raises:
            LoadError: `NoCheckpoint` if there is nothing to read; `CorruptCheckpoint`; `IncompatibleCheckpoint` if nothing is below a
                prefix, or a value's class cannot be imported here.
            SidecarUnavailable: the sidecar went away and did not come back.
        """
        self._begin_load()
        prefixes = () if prefix is None else (prefix,) if isinstance(prefix, str) else tuple(prefix)
        return reading.read(self._session, steps.wanted(step), prefixes=prefixes, path=_source(path))

    def load(
        self,
        state_dict: dict[str, Any],
        step: SupportsIndex | None = None,
        *,
        strict: bool = True,
        path: str | os.PathLike[str] | None = None,
        rename: renaming.Rename | None = None,
    ) -> int | None:
        """
        Fill `state_dict` in place from the newest checkpoint, from the fastest place where all ranks have it.

        The newest checkpoint is the one that was committed or sealed last. After a load of an older step and a save, it is that save.

        Args:
            state_dict: as for `save`. Tensors are filled in place, and other leaves are replaced. For a `Stateful` value the load calls
                `state_dict` once and `load_state_dict` once.
            step: a committed step. None for the newest, or for what the policy's `restore` says.
            strict: True raises if the checkpoint lacks a value; False leaves that value unchanged. Extra values in the checkpoint only
                cause a warning.
            path: load from here, and not from this run: the root of another run (its newest checkpoint, or `step`), or the directory of
                one checkpoint, of Pillion or of stock DCP; a directory or the URL of a bucket. This run goes on at its own step, and its
                next `load()` without `path` takes its own checkpoints. In a pod only what is below the job's own directory, or below
                that of the job in the policy's `restore.from`.
            rename: names in the state dict -> names in the checkpoint, as a mapping or a function. A mapping may also have dotted
                prefixes; the longest one counts.

        Returns:
            The step loaded. None if there has never been a checkpoint and the policy allows a fresh start.
            `last_load` has the tier, the time and every difference between state dict and checkpoint; one warning names them. One line of
            rank 0's log says what the run resumed from: for a load without `step` and `path`, and for the first load or save of a process.

        Ranks: all.

        Blocks: for the read; see loading.LOAD_SILENCE_S. If the sidecar dies meanwhile, the load waits for its successor and starts again.

        Raises:
            LoadError: `NoCheckpoint`, `CorruptCheckpoint`, `IncompatibleCheckpoint`, or some ranks did not call `load`.
            SidecarUnavailable: the sidecar went away and did not come back.
            UsageError: `rename` does not fit the state dict, or `path` is not allowed here.
        """
        if not isinstance(state_dict, dict):
            raise UsageError(f"load fills a dict in place, not a {type(state_dict).__name__}")
        self._begin_load()
        source = _source(path)
        report, leaves = loading.load(
            self._session,
            self._collector,
            state_dict,
            steps.wanted(step),
            path=source,
            below=source is not None,
            strict=strict,
            rename=rename,
        )
        self.last_load = report
        if report.step is not None:
            # The script chose nothing, or it begins. A step or path that it names later, such as that of the best weights, is no resume.
            if not self._has_begun or (step is None and source is None):
                self._say_resumed(report, given=source is not None)
            self._has_begun = True
        if source is not None:
            self._saver.prepare(leaves)
            return report.step
        # The loaded step may be saved again, as a loop that starts at it does. An older step may not.
        self._last_step = -1 if report.step is None else report.step - 1
        self._last = self._last_stored = self._at_stake = None
        self._teller.look()  # the load has finished commits that the run before has left
        if report.step is not None:
            self._schedule.loaded(report.step)
        self._saver.prepare(leaves)
        return report.step

    def _say_resumed(self, report: LoadReport, *, given: bool) -> None:
        """Say on rank 0 what the run goes on from. A warning, as Python shows no line of a lower level by itself."""
        if self._group.rank == 0:
            _log.warning("pillion: %s", load_notes.resumed(report, root=self.root, given=given))

    def _begin_load(self) -> None:
        """Check that this process may load now, and wait for an overlapped save."""
        self._session.check_process()
        if self._closed:
            raise UsageError("the Checkpointer is closed")
        self._saver.before_load()

    def latest(self) -> Checkpoint | None:
        """
        Return the newest committed checkpoint on storage. None if there is none.

        Blocks: up to LATEST_TIMEOUT_S.
        """
        answer = self._session.request(control.FindLatest(), LATEST_TIMEOUT_S)
        if answer.step is None:
            return None
        said = remarks.read(answer.remarks)
        return Checkpoint(
            step=answer.step,
            path=answer.path,
            size_bytes=answer.size_bytes,
            metrics=said.metrics,
            metadata=said.metadata,
        )

    # --- ending ----------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float | None = None) -> None:
        """
        Wait for the saves in flight, and end the session with the sidecar. Idempotent. Afterwards every handle is done.

        Blocks: up to `timeout_s` (None: the policy's drain.timeoutSeconds).
        """
        self._close(timeout_s, clean=not exit_drain.by_exception())

    def in_flight(self) -> list[SaveHandle]:
        """Return the handles of the saves whose outcome is not known yet."""
        pending = self._session.pending()
        # The session does not know an overlapped save that still waits for its slot.
        return pending + [
            each for each in (self._last,) if each is not None and each not in pending and not each.committed.done()
        ]

    def _close(self, timeout_s: float | None, *, clean: bool) -> None:
        if self._closed or self._session.inherited:
            return
        self._closed = True
        owed = self.in_flight()
        if self._at_stake is not None and self._at_stake not in owed:
            owed.append(self._at_stake)
        self._saver.close()
        begun = time.monotonic()
        try:
            drain_s = self._schedule.drain_timeout_s if timeout_s is None else timeout_s
            if self._teller.tells:
                # While the sidecar is there: it notes what the script was told.
                with contextlib.suppress(TimeoutError):
                    self.wait(drain_s)
                callbacks.drain()
                drain_s = max(0.0, drain_s - (time.monotonic() - begun))
            self._session.close(drain_s=drain_s, clean=clean)
        except SidecarUnavailable as err:
            _log.error("pillion: %s", err)
        finally:
            self._saver.join()
            exit_drain.closed(self, owed)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._close(None, clean=error is None or (isinstance(error, SystemExit) and exit_drain.is_success(error.code)))

    def _on_event(self, event: Message) -> None:
        if isinstance(event, events.Committed):
            self._teller.look()  # no handle of this process waits for it
            return
        take = self._schedule.events.get(type(event))
        if take is not None:
            take(event)


def _source(path: str | os.PathLike[str] | None) -> str | None:
    """
    Return where another run's checkpoint is, as the sidecar opens it.

    Raises:
        UsageError: it is neither a directory nor a bucket.
    """
    if path is None:
        return None
    source = addresses.absolute(path)
    try:
        addresses.check(source)
    except SettingsError as err:
        raise UsageError(str(err)) from err
    if not source:
        raise UsageError("path is empty: leave it out to load this run's own checkpoint")
    return source


def _root(root: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> str:
    """Return the absolute root. Empty if none is given: `group.join` then raises on every rank."""
    return addresses.absolute(root if root is not None else environ.get(names.ENV_ROOT, ""))
