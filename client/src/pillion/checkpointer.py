"""
`Checkpointer`: what a training script sees of Pillion.

Called from: the training thread. No collective runs after the constructor, and `save` never raises into the training loop.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
import time
import types
from collections.abc import Mapping
from typing import Any, Final, SupportsIndex

import torch.distributed as dist

from pillion import cadence, exit_drain, group, loading, policy_source, rule_timeline, saving, store_mode
from pillion import leaves as leaves_module
from pillion.errors import SidecarUnavailable, UsageError
from pillion.handle import Checkpoint, Found, LoadReport, SaveHandle
from pillion.wire import messages, names, policy

_log = logging.getLogger(__name__)

LATEST_TIMEOUT_S: Final = 60.0
"""Bound for listing the storage; a shared file system under load takes seconds."""
LEAD_LOCAL_S: Final = 0.25
LEAD_PODS_S: Final = 2.0
"""How far ahead a time-based save is announced, so that it reaches every rank before its step; within a pod, and across."""


STEP_MOST: Final = 2**63 - 1
"""The arena keeps it in 64 bits."""


class Checkpointer:
    """
    Saves and loads a job's state through the sidecar of its pod.

    Args:
        root: directory of the run's checkpoints. In a pod the injected environment says it, and it may be left out.
        policy: a CheckpointPolicy (the `spec` as a mapping, or a YAML or JSON file's path); for a run without a cluster.
        process_group: the ranks that save together; None is the default group (or a single process).

    Ranks: all of the process group construct it together, and construct several in the same order.

    Blocks: one collective on the process group, then up to session.CONNECT_TIMEOUT_S for the sidecar.

    Raises:
        SettingsError: the policy or an environment variable is wrong, or the root cannot be written; lists all problems.
        SidecarUnavailable: no sidecar, and none could be started.
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
        """The newest save; None behind a load."""
        self._last_stored: SaveHandle | None = None
        """The newest save to storage."""
        self._at_stake: SaveHandle | None = None
        """The newest save that was to reach storage, also one that was refused: it must not be lost unseen."""
        where = _root(root, environ)
        self._group = group.join(
            process_group,
            environ,
            root=where,
            ask_policy=lambda environ: store_mode.policy_of_all(policy, environ),
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
        self._session.listen()
        exit_drain.drain_at_exit(self)

    # --- saving ----------------------------------------------------------------------------------------------------

    def due(self, step: SupportsIndex) -> bool:
        """
        Whether the policy wants a save at this step: its cadence, a save asked for from outside, or the pod's end.

        The answer is the same on all ranks that ask at the same steps, and costs no communication. A loop that passes steps over is answered
        at the first step at or behind the one that was due.

        Raises:
            UsageError: `step` is no whole number from 0 on (NumPy's and torch's integers are), or this process is a forked child.
        """
        self._session.check_process()
        step, now_s = _whole(step), time.monotonic()
        answer = self._cadence.due(step, now_s)
        proposal = self._cadence.proposal(step, now_s)
        if proposal is not None:
            self._session.send({"type": "announce", "step": proposal})
        recalled = self._cadence.recalled(step)
        if recalled is not None:
            self._session.send({"type": "decline", "step": recalled})
        change = self._cadence.change_proposal(step, now_s)
        if change is not None:
            self._session.send({"type": "announce_change", "step": change[0], "policy": _rule_document(change[1])})
        return answer is not cadence.Due.NOT_DUE

    def save(
        self, state_dict: Mapping[str, Any], step: SupportsIndex, *, overlap: bool = False, persist: bool | None = None
    ) -> SaveHandle:
        """
        Copy the state into the arena and go on training; the sidecar does the rest.

        Args:
            state_dict: nested mapping of anything; tensors (also DTensor, ShardedTensor) are copied, the rest is pickled.
            step: the training step, anything with `__index__`; it may not go backwards within a run. The newest one again is no other
                save: the first one's handle comes back.
            overlap: return at once and copy beside the next forward and backward pass; the next optimizer step waits for it.
            persist: True to storage, False only to the arena, None as the policy's trigger says for this step.

        Ranks: all, at the same steps. No collective.

        Blocks: for the copy (with `overlap`: not), and under the policy's `overlap: Wait` for a free slot.

        Raises:
            Nothing: a failure is on the handle, in the log and in the sidecar's counters.
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
                    # Nobody closes it here any more, and looks at what it owes.
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
        """The step, and the handle of the save that has it already."""
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
            # Behind a load no save has been; the loaded step itself may come again.
            raise UsageError(_too_old(step, self._last_step + (last is None), loaded=last is None))
        return step, None

    def wait(self, timeout_s: float) -> None:
        """
        Wait until no save is in flight, whatever became of each.

        Raises:
            TimeoutError: some are still in flight; names their steps.
        """
        self._session.check_process()
        deadline = time.monotonic() + timeout_s
        self._saver.wait_staged()
        for handle in self._session.pending():
            try:
                # At least a moment: 0 s is no wait, which says nothing of one that is on its way.
                handle.error(max(0.001, deadline - time.monotonic()))
            except TimeoutError:
                steps = sorted(each.step for each in self._session.pending())
                raise TimeoutError(f"saves of steps {steps} are still in flight after {timeout_s} s") from None

    # --- loading ---------------------------------------------------------------------------------------------------

    def find(self, step: SupportsIndex | None = None) -> Found | None:
        """
        What `load` would take now, in memory or on storage; None when there is nothing. The answer is the same on all ranks.

        A load that follows takes the same, unless it does not fit the state dict. So a template that costs something, or changes
        something (an optimizer's state is made by a step), is built only where there is something to load.

        Args:
            step: a committed step; None for the newest (or what the policy's `restore` says).

        Ranks: all.

        Blocks: for saves in flight and the listing of the storage; else as `load`.

        Raises:
            LoadError: as `load`, `NoCheckpoint` where the policy demands one; but for a `step` that is not there the answer is None.
            SidecarUnavailable: it went away, and did not come back.
        """
        if self._closed:
            raise UsageError("the Checkpointer is closed")
        self._saver.wait_staged()
        return loading.find(self._session, None if step is None else _whole(step))

    def load(self, state_dict: dict[str, Any], step: SupportsIndex | None = None, *, strict: bool = True) -> int | None:
        """
        Fill `state_dict` in place from the newest checkpoint, from the fastest place where all ranks have it.

        The newest is the one that was committed or sealed last: after a load of an older step and a save, that save.

        Args:
            state_dict: as for `save`; tensors are filled in place, other leaves replaced, `Stateful` values get theirs. Each of these is
                asked for its `state_dict` once, and given the loaded one once.
            step: a committed step; None for the newest (or what the policy's `restore` says).
            strict: what the checkpoint does not have is an error; False leaves it as it is. What it has besides is only warned of.

        Returns:
            The step loaded, or None when there has never been a checkpoint and the policy allows a fresh start.
            `last_load` tells the tier and the time, and all that was not restored as it was asked; one warning names it.

        Ranks: all.

        Blocks: for the read; see loading.LOAD_SILENCE_S. A sidecar that dies meanwhile is waited for, and the load begun anew.

        Raises:
            LoadError: `NoCheckpoint`, `CorruptCheckpoint`, `IncompatibleCheckpoint`, or other ranks did not come.
            SidecarUnavailable: it went away, and did not come back.
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
        # The step loaded may be saved again (a loop that starts at it does); an older one may not.
        self._last_step = -1 if report.step is None else report.step - 1
        self._last = self._last_stored = self._at_stake = None
        if report.step is not None:
            self._cadence.loaded(report.step, time.monotonic())
        self._saver.prepare(leaves)
        return report.step

    def latest(self) -> Checkpoint | None:
        """
        The newest committed checkpoint on storage; None when there is none.

        Blocks: up to LATEST_TIMEOUT_S.
        """
        answer = self._session.request({"type": "latest"}, LATEST_TIMEOUT_S)
        step = messages.optional_field(answer, "step", int)
        if step is None:
            return None
        return Checkpoint(
            step=step, path=messages.field(answer, "path", str), size_bytes=messages.field(answer, "size_bytes", int, 0)
        )

    # --- ending ----------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float | None = None) -> None:
        """
        Drain what is in flight and part from the sidecar. Idempotent; after it every handle is done.

        Blocks: up to `timeout_s` (None: the policy's drain.timeoutSeconds).
        """
        self._close(timeout_s, clean=not exit_drain.by_exception())

    def in_flight(self) -> list[SaveHandle]:
        """The handles of saves whose outcome is not known yet."""
        pending = self._session.pending()
        # One that still waits for its slot, beside the training loop, is not known to the session.
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

    def _on_event(self, message: messages.Message) -> None:
        if message["type"] == "announced":
            step = messages.field(message, "step", int)
            if not self._cadence.announce(step):
                self._session.send({"type": "decline", "step": step})
        elif message["type"] == "declined":
            target = messages.field(message, "step", int)
            if self._group.rank == 0:
                self._cadence.declined(target)
            else:
                self._cadence.withdraw(target)
        elif message["type"] == "save_now":
            self._cadence.request_save()
        elif message["type"] == "policy":
            self._policy_changed(message)
        elif message["type"] == "change_announced":
            step = messages.field(message, "step", int)
            rule = _rule(messages.field(message, "policy", dict))
            # One that a newer release knows and this one does not is declined: then no rank goes by it.
            if rule is None or not self._cadence.announce_change(step, rule):
                self._session.send({"type": "decline_change", "step": step})
        elif message["type"] == "change_declined":
            target = messages.field(message, "step", int)
            if self._group.rank == 0:
                self._cadence.declined_change(target)
            else:
                self._cadence.withdraw_change(target)

    def _policy_changed(self, message: messages.Message) -> None:
        """The sidecar goes by another policy now; when saves are due changes at a step that rank 0 announces."""
        now = _read(messages.field(message, "policy", dict))
        if now is None:
            return
        self._policy = dataclasses.replace(self._policy, drain=now.drain)
        if self._group.rank == 0:
            self._cadence.request_change(rule_timeline.Rule(now.trigger, now.suspend))


def _whole(step: object) -> int:
    """
    The step as a number of Python's own: NumPy and torch have others.

    Raises:
        UsageError: it is none, or too large for a slot's header.
    """
    try:
        if not isinstance(step, bool) and 0 <= (whole := operator.index(step)) <= STEP_MOST:  # type: ignore[arg-type] # tried
            return whole
    except TypeError:
        pass
    raise UsageError(f"step must be a whole number from 0 to {STEP_MOST}, not {step!r}")


def _too_old(step: int, newest: int, *, loaded: bool) -> str:
    """Why a step is refused, where the newest one was loaded, or saved."""
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
    """Absolute; empty where nobody said it, which `group.join` raises on every rank."""
    given = os.fspath(root) if root is not None else environ.get(names.ENV_ROOT, "")
    return os.path.abspath(given) if given else ""
