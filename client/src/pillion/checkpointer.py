"""
`Checkpointer`: what a training script sees of Pillion.

Called from: the training thread. No collective runs after the constructor. `save` never raises into the training loop.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, SupportsIndex

import torch.distributed as dist

from pillion import cadence, exit_drain, group, loading, policy_source, rule_timeline, saving, store_mode
from pillion import leaves as leaves_module
from pillion.errors import SidecarUnavailable, UsageError
from pillion.handle import Checkpoint, Found, LoadReport, SaveHandle
from pillion.wire import control, events, names, policy, save_messages
from pillion.wire.message import Message

_log = logging.getLogger(__name__)

LATEST_TIMEOUT_S: Final = 60.0
"""Timeout for listing the storage. A shared file system under load takes seconds."""
LEAD_LOCAL_S: Final = 0.25
LEAD_PODS_S: Final = 2.0
"""Lead of an announced save, within a pod and across pods. The announcement must reach every rank before the step."""


MAX_STEP: Final = 2**63 - 1
"""Largest step. The arena stores a step in 64 bits."""


class Checkpointer:
    """
    Saves and loads a job's state through the sidecar of its pod.

    Args:
        root: directory of the run's checkpoints. Leave it out in a pod, where the injected environment sets it.
        policy: a CheckpointPolicy for a run without a cluster: its `spec` as a mapping, or the path of a YAML or JSON file.
        process_group: the ranks that save together; None is the default group (or a single process).

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
    ) -> None:
        environ = os.environ
        self._closed = False
        self.last_load: LoadReport | None = None
        self._last_step = -1
        self._last: SaveHandle | None = None
        """The newest save. None after a load."""
        self._last_stored: SaveHandle | None = None
        """The newest save to storage."""
        self._at_stake: SaveHandle | None = None
        """The newest save meant for storage, even if it was refused. It must not be lost unnoticed."""
        where = _root(root, environ)
        self._group = group.join(
            process_group,
            environ,
            root=where,
            read_policy=lambda environ: store_mode.policy_of_all(policy, environ),
        )
        self._session = store_mode.open_session(
            self._group,
            root=where,
            policy_document=policy_source.document(policy, environ),
            key=where,
            on_event=self._on_event,
            process_group=process_group,
            environ=environ,
        )
        self._policy = self._session.policy
        self._collector = leaves_module.Collector()
        self._saver = saving.Saver(self._session, overlaps=True)
        self._cadence = cadence.Cadence(
            rule_timeline.Rule(self._policy.trigger, self._policy.suspend),
            decides=self._group.rank == 0,
            lead_s=LEAD_LOCAL_S if len(self._group.pods) == 1 else LEAD_PODS_S,
        )
        self._events: Mapping[type[Message], Callable[[Any], None]] = {
            events.Announced: self._announced,
            events.Declined: self._declined,
            events.SaveNow: lambda _: self._cadence.request_save(),
            events.PolicyChanged: self._policy_changed,
            events.ChangeAnnounced: self._change_announced,
            events.ChangeDeclined: self._change_declined,
        }
        self._session.listen()
        exit_drain.drain_at_exit(self)

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
        step, now_s = _whole(step), time.monotonic()
        answer = self._cadence.due(step, now_s)
        proposal = self._cadence.proposal(step, now_s)
        if proposal is not None:
            self._session.send(save_messages.Announce(step=proposal))
        recalled = self._cadence.recalled(step)
        if recalled is not None:
            self._session.send(save_messages.Decline(step=recalled))
        change = self._cadence.change_proposal(step, now_s)
        if change is not None:
            self._session.send(save_messages.AnnounceChange(step=change[0], policy=_rule_document(change[1])))
        return answer is not cadence.Due.NOT_DUE

    def save(
        self, state_dict: Mapping[str, Any], step: SupportsIndex, *, overlap: bool = False, persist: bool | None = None
    ) -> SaveHandle:
        """
        Copy the state into the arena, and return. The sidecar does the rest.

        Args:
            state_dict: nested mapping. Tensors, DTensors and ShardedTensors are copied; other values are pickled.
            step: the training step, anything with `__index__`. It may not decrease within a run, except after a load. Saving the
                newest step again returns the first save's handle.
            overlap: return at once, and copy beside the next forward and backward pass. The next optimizer step waits for the copy.
            persist: True saves to storage, False to the arena only. None decides by the policy's trigger for this step.

        Ranks: all, at the same steps. No collective.

        Blocks: for the copy (not with `overlap`), and for a free slot under the policy's `overlap: Wait`.

        Raises:
            Nothing. The handle, the log and the sidecar's counters have a failure.
        """
        try:
            step, again = self._check_save(step, persist=persist)
        except UsageError as err:
            handle = SaveHandle(step)  # type: ignore[arg-type] # as the caller gave it
            _log.error("pillion: save of step %s refused: %s", step, err)
            handle.fail(err)
            if persist is not False:
                self._at_stake = handle
                if self._closed or self._session.inherited:
                    # Nothing closes this Checkpointer any more, so the lost save is recorded now.
                    exit_drain.closed(self, [handle])
            return handle
        if again is not None:
            return again
        if persist is None:
            persist = self._cadence.due(step, time.monotonic()) is not cadence.Due.SNAPSHOT
        self._last_step = step
        handle = self._last = self._saver.save(state_dict, step, persist=persist, overlap=overlap)
        if persist:
            self._last_stored = self._at_stake = handle
            self._cadence.saved(step, time.monotonic())
        return handle

    def _check_save(self, step: SupportsIndex, *, persist: bool | None) -> tuple[int, SaveHandle | None]:
        """Return the step as an int, and the handle of the save that already has this step."""
        self._session.check_process()
        if self._closed:
            raise UsageError("the Checkpointer is closed")
        step = _whole(step)
        last = self._last
        if last is not None and step == last.step:
            if persist and last is not self._last_stored:
                raise UsageError(
                    f"step {step} was saved to memory only: pass persist=True with the first save of a step"
                )
            return step, last
        if step <= self._last_step:
            # There was no save since the load. The loaded step itself may be saved again.
            raise UsageError(_too_old(step, self._last_step + (last is None), loaded=last is None))
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
                steps = sorted(each.step for each in self._session.pending())
                raise TimeoutError(f"saves of steps {steps} are still in flight after {timeout_s} s") from None

    # --- loading ---------------------------------------------------------------------------------------------------

    def find(self, step: SupportsIndex | None = None) -> Found | None:
        """
        Return the checkpoint that `load` would take now, in memory or on storage. None if there is none. All ranks get the same answer.

        The next `load` takes this checkpoint, unless it does not fit the state dict. Use `find` before building a state dict that is
        expensive or has side effects (an optimizer creates its state in a step).

        Args:
            step: a committed step. None for the newest, or for what the policy's `restore` says.

        Ranks: all.

        Blocks: for saves in flight and for the listing of the storage; otherwise as `load`.

        Raises:
            LoadError: as `load`; `NoCheckpoint` if the policy demands a checkpoint. A missing `step` returns None instead.
            SidecarUnavailable: the sidecar went away and did not come back.
        """
        if self._closed:
            raise UsageError("the Checkpointer is closed")
        self._saver.wait_staged()
        return loading.find(self._session, None if step is None else _whole(step))

    def load(self, state_dict: dict[str, Any], step: SupportsIndex | None = None, *, strict: bool = True) -> int | None:
        """
        Fill `state_dict` in place from the newest checkpoint, from the fastest place where all ranks have it.

        The newest checkpoint is the one that was committed or sealed last. After a load of an older step and a save, it is that save.

        Args:
            state_dict: as for `save`. Tensors are filled in place, and other leaves are replaced. For a `Stateful` value the load calls
                `state_dict` once and `load_state_dict` once.
            step: a committed step. None for the newest, or for what the policy's `restore` says.
            strict: True raises if the checkpoint lacks a value; False leaves that value unchanged. Extra values in the checkpoint only
                cause a warning.

        Returns:
            The step loaded. None if there has never been a checkpoint and the policy allows a fresh start.
            `last_load` has the tier, the time and every difference between state dict and checkpoint; one warning names them.

        Ranks: all.

        Blocks: for the read; see loading.LOAD_SILENCE_S. If the sidecar dies meanwhile, the load waits for its successor and starts again.

        Raises:
            LoadError: `NoCheckpoint`, `CorruptCheckpoint`, `IncompatibleCheckpoint`, or some ranks did not call `load`.
            SidecarUnavailable: the sidecar went away and did not come back.
        """
        self._session.check_process()
        if self._closed:
            raise UsageError("the Checkpointer is closed")
        if not isinstance(state_dict, dict):
            raise UsageError(f"load fills a dict in place, not a {type(state_dict).__name__}")
        self._saver.wait_staged()
        wanted = None if step is None else _whole(step)
        report, leaves = loading.load(self._session, self._collector, state_dict, wanted, path=None, strict=strict)
        self.last_load = report
        # The loaded step may be saved again, as a loop that starts at it does. An older step may not.
        self._last_step = -1 if report.step is None else report.step - 1
        self._last = self._last_stored = self._at_stake = None
        if report.step is not None:
            self._cadence.loaded(report.step, time.monotonic())
        self._saver.prepare(leaves)
        return report.step

    def latest(self) -> Checkpoint | None:
        """
        Return the newest committed checkpoint on storage. None if there is none.

        Blocks: up to LATEST_TIMEOUT_S.
        """
        answer = self._session.request(control.FindLatest(), LATEST_TIMEOUT_S)
        if answer.step is None:
            return None
        return Checkpoint(step=answer.step, path=answer.path, size_bytes=answer.size_bytes)

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
        try:
            drain_s = self._policy.drain.timeout_seconds if timeout_s is None else timeout_s
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
        take = self._events.get(type(event))
        if take is not None:
            take(event)

    def _announced(self, event: events.Announced) -> None:
        if not self._cadence.announce(event.step):
            self._session.send(save_messages.Decline(step=event.step))

    def _declined(self, event: events.Declined) -> None:
        if self._group.rank == 0:
            self._cadence.declined(event.step)
        else:
            self._cadence.withdraw(event.step)

    def _change_announced(self, event: events.ChangeAnnounced) -> None:
        rule = _rule(event.policy)
        # A rule that this release cannot read is declined, so that no rank follows it.
        if rule is None or not self._cadence.announce_change(event.step, rule):
            self._session.send(save_messages.DeclineChange(step=event.step))

    def _change_declined(self, event: events.ChangeDeclined) -> None:
        if self._group.rank == 0:
            self._cadence.declined_change(event.step)
        else:
            self._cadence.withdraw_change(event.step)

    def _policy_changed(self, event: events.PolicyChanged) -> None:
        """Take over the sidecar's new policy. A new trigger holds from a step that rank 0 announces."""
        now = _read(event.policy)
        if now is None:
            return
        self._policy = dataclasses.replace(self._policy, drain=now.drain)
        if self._group.rank == 0:
            self._cadence.request_change(rule_timeline.Rule(now.trigger, now.suspend))


def _whole(step: object) -> int:
    """
    Return the step as a Python int. NumPy and torch have integers of their own.

    Raises:
        UsageError: the step is not a whole number, or does not fit into a slot's header.
    """
    try:
        if not isinstance(step, bool) and 0 <= (whole := operator.index(step)) <= MAX_STEP:  # type: ignore[arg-type] # tried
            return whole
    except TypeError:
        pass
    raise UsageError(f"step must be a whole number from 0 to {MAX_STEP}, not {step!r}")


def _too_old(step: int, newest: int, *, loaded: bool) -> str:
    """Say why a step is refused. `loaded`: the newest step was loaded, not saved."""
    why = (
        f"is older than step {newest}, which was loaded"
        if loaded
        else f"comes after step {newest}: steps must increase"
    )
    return f"step {step} {why}; load() an older step to go back to it"


def _read(document: Mapping[str, Any]) -> policy.Policy | None:
    try:
        return policy.parse(document, embedded=True)
    except policy.PolicyError as err:
        _log.warning("pillion: ignored a policy change that this release cannot use: %s", err)
        return None


def _rule(document: Mapping[str, Any]) -> rule_timeline.Rule | None:
    changed = _read(document)
    return None if changed is None else rule_timeline.Rule(changed.trigger, changed.suspend)


def _rule_document(rule: rule_timeline.Rule) -> dict[str, object]:
    whole = policy.dump(policy.Policy(trigger=rule.trigger, suspend=rule.suspended))
    return {name: whole[name] for name in ("trigger", "suspend")}


def _root(root: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> str:
    """Return the absolute root. Empty if none is given: `group.join` then raises on every rank."""
    given = os.fspath(root) if root is not None else environ.get(names.ENV_ROOT, "")
    return os.path.abspath(given) if given else ""
