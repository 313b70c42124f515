"""
One save, from the state dict to the seal.

Called from: `Checkpointer.save` and `pillion.dcp.async_save`, on the training thread. An overlapped save continues in a thread of its
own. Nothing here raises into the training loop: the handle has every error.

    collect the leaves -> claim a slot -> copy -> seal
                          |<------- overlapped: beside the next forward and backward ------->|
                                                  the optimizer's pre-hook waits for the end ^

An overlapped save copies tensors that no optimizer steps before it returns (`pillion.late`), because no hook delays their changes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook  # torch.optim hides the module

from pillion import beside, devices, fault_points, habits, late, modes, preparing, stateful
from pillion import leaves as leaves_module
from pillion import opaque as opaque_module
from pillion import overlap as overlap_module
from pillion.errors import ErrorDocument, PillionError, StagingError
from pillion.handle import SaveHandle, log_lost
from pillion.session import Session
from pillion.staging import Grant
from pillion.wire import arena, save_messages
from pillion.wire import layout as layout_module
from pillion.wire.remarks import NO_REMARKS, Remarks

_log = logging.getLogger(__name__)

NO_SLOT: Final = "pillion: no slot is free for step %d: training waits until an earlier save is on storage, or until every rank has sealed it (staging.overlap: Wait)"
"""Said some seconds into a wait, with the first notice of the sidecar."""

OPAQUE_SLACK_BYTES: Final = 256 * 1024
"""Extra room in a slot, for the trailer and for opaque leaves that grow a little from save to save."""


HURRIED_SWITCH_S: Final = 50e-6
"""Switch interval of the interpreter while a save holds up the training loop. Copy and claim release the GIL a dozen times. Beside a
thread that computes in Python, each reacquisition takes a whole interval, by default 5 ms."""


class _Hurry:
    """
    Context manager that speeds up the interpreter: quick hand-overs of the GIL, and no garbage collection.

    A collection amid 10,000 new tuples walks every object of the trainer (0.2 s with torch imported). Both settings apply to the whole
    interpreter: the first of several threads that enter changes them, and the last one restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hurrying = 0
        self._interval_s = 0.0
        self._collects = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the hurry while this thread waits for another process."""
        self._end()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        with self._lock:
            if not self._hurrying:
                self._interval_s, self._collects = sys.getswitchinterval(), gc.isenabled()
                sys.setswitchinterval(min(self._interval_s, HURRIED_SWITCH_S))
                gc.disable()
            self._hurrying += 1

    def _end(self) -> None:
        with self._lock:
            self._hurrying -= 1
            if not self._hurrying:
                if self._collects:
                    gc.enable()
                sys.setswitchinterval(self._interval_s)


_hurry = _Hurry()


@dataclass(frozen=True, slots=True)
class _Watched:
    """Tensors that are copied beside the training, with their versions and samples from the beginning of the save."""

    indexes: Sequence[int]
    versions: Sequence[int]
    sample: overlap_module.Sample


class Saver:
    """
    Stages saves of one session, one at a time.

    Args:
        overlaps: whether saves may overlap. Then the saver must see every optimizer step from the beginning.
        gathers: whether the caller waits for the failures of all ranks, if one rank cannot stage.

    Owns: the staging thread of an overlapped save, and the optimizer hook.
    """

    def __init__(self, session: Session, *, overlaps: bool, gathers: bool = False) -> None:
        self._session = session
        self._gathers = gathers and session.group.world_size > 1 and session.welcome.gathers
        self._collector = leaves_module.Collector()
        self._pickler = opaque_module.Pickler()
        self._looked_at: layout_module.Layout | None = None
        """The layout whose opaque leaves were last searched for stateful objects."""
        self._warned = False
        self._within: set[int] = set()
        """Idents of the threads that are within a save."""
        self._beside = beside.Beside()
        self._staging_handle: SaveHandle | None = None
        """The save that `_beside` finishes."""
        self._ahead = preparing.Preparer(session)
        self._habits = habits.Habits()
        self._hook: Any = register_optimizer_step_pre_hook(self._before_optimizer_step) if overlaps else None

    def save(
        self,
        state_dict: Mapping[str, Any],
        step: int,
        *,
        persist: bool,
        overlap: bool | None,
        for_disk: bool = False,
        destination: save_messages.Destination | None = None,
        remarks: Remarks = NO_REMARKS,
    ) -> SaveHandle:
        """
        Stage `state_dict`. The returned handle has the outcome.

        Args:
            overlap: True copies late what an optimizer holds; None does so for what the script was seen to leave alone (`pillion.habits`).

        Blocks: for the copy, and for a free slot under `overlap: Wait`. An overlapped save only for a large tensor that does not wait.
        """
        handle = SaveHandle(step, for_disk=for_disk)
        handle.remarks = remarks
        thread = threading.get_ident()
        if thread in self._within:
            # The interrupted save holds what this one would wait for, and continues only after this one returns.
            error = StagingError(
                "a signal handler cannot save while it interrupts another save: record the signal there, and save in the training loop",
                step=step,
            )
            _log.error("pillion: save of step %d failed: %s", step, error)
            handle.fail(error)
            return handle
        started = time.perf_counter()
        self._within.add(thread)
        try:
            with _hurry():
                self._save(
                    handle, state_dict, started=started, persist=persist, overlap=overlap, destination=destination
                )
        finally:
            self._within.discard(thread)
        handle.stall_s += time.perf_counter() - started
        return handle

    def _save(
        self,
        handle: SaveHandle,
        state_dict: Mapping[str, Any],
        *,
        started: float,
        persist: bool,
        overlap: bool | None,
        destination: save_messages.Destination | None,
    ) -> None:
        try:
            self.wait_staged()
            state_dict = leaves_module.materialize(state_dict)
            leaves = self._collector.collect(state_dict)
            self._look(leaves)
            opaque = self._pickler.pickled(dict(zip(leaves.layout.opaque, leaves.opaque, strict=True)))
            choice = None if overlap is False else self._habits.choose(leaves, forced=overlap is True)
            if choice is not None and (choice.late or (overlap and not choice.early)):
                self._stage_beside(
                    handle, leaves, opaque, choice, persist=persist, destination=destination, started=started
                )
            else:
                self._stage(handle, leaves, opaque, persist=persist, destination=destination, started=started)
            if choice is not None:
                self._habits.watch(leaves, choice.untried)
        except Exception as err:  # a boundary: no save raises into the training loop
            self._failed(handle, err, persist=persist)
        except BaseException as err:
            # Ctrl-C, or an error of a signal handler: it propagates. The slot is given up first, or it would stay taken until its timeout.
            self._failed(handle, err, persist=persist)
            raise

    def _look(self, leaves: leaves_module.Leaves) -> None:
        """Warn once about stateful objects that are pickled whole. Costs nothing while the layout stays the same."""
        if self._warned or leaves.layout is self._looked_at:
            return
        self._looked_at = leaves.layout
        names = [
            fqn
            for fqn, leaf in zip(leaves.layout.opaque, leaves.opaque, strict=True)
            if any(True for _ in stateful.within(leaf))
        ]
        if names:
            self._warned = True
            _log.warning(
                "pillion: these objects with a state_dict() are below the top level of the state dict, and are pickled whole (as stock DCP"
                " does): %s; move them to the top level, where their tensors are saved as tensors",
                ", ".join(names),
            )

    def _stage(
        self,
        handle: SaveHandle,
        leaves: leaves_module.Leaves,
        opaque: list[bytes],
        *,
        persist: bool,
        destination: save_messages.Destination | None,
        started: float,
    ) -> None:
        grant = self._claim(handle, leaves, opaque, persist=persist, destination=destination, hurried=True)
        grant.mapping.copy_in(grant.slot, leaves, capacity_bytes=grant.capacity_bytes)
        self._seal(handle, grant, leaves, opaque, stall_s=time.perf_counter() - started)

    def _claim(
        self,
        handle: SaveHandle,
        leaves: leaves_module.Leaves,
        opaque: list[bytes],
        *,
        persist: bool,
        destination: save_messages.Destination | None,
        hurried: bool,
    ) -> Grant:
        session = self._session
        _, image_bytes = leaves.layout.opaque_starts([len(data) for data in opaque])
        num_leaves = len(leaves.tensors) + len(opaque)
        slack_bytes = OPAQUE_SLACK_BYTES + handle.remarks.encoded_bytes()
        room = arena.room_bytes(image_bytes, len(leaves.layout.encoded), slack_bytes, num_leaves)
        # Tracked first: another rank's failure may arrive while this rank still waits for its slot.
        session.track(handle)
        with contextlib.ExitStack() as waiting:
            claim = save_messages.Claim(
                step=handle.step,
                room_bytes=room,
                persist=persist,
                local=handle.for_disk,
                destination=destination,
                notices=True,
            )

            def on_wait() -> None:
                handle.claiming = True
                if session.group.local_rank == 0:
                    _log.warning(NO_SLOT, handle.step)
                waiting.callback(setattr, handle, "claiming", False)
                if hurried:  # an overlapped claim does not hurry, so it has nothing to pause
                    waiting.enter_context(_hurry.paused())

            grant = session.claim(claim, on_wait)
        fault_points.reach(fault_points.FaultPoint.STAGE, rank=session.group.rank, step=handle.step)
        return grant

    def _seal(
        self, handle: SaveHandle, grant: Grant, leaves: leaves_module.Leaves, opaque: list[bytes], *, stall_s: float
    ) -> None:
        session = self._session
        fault_points.reach(fault_points.FaultPoint.SEAL, rank=session.group.rank, step=handle.step)
        grant.mapping.seal(
            grant.slot,
            leaves=leaves,
            opaque=opaque,
            step=handle.step,
            rank=session.group.rank,
            world_size=session.group.world_size,
            session=bytes.fromhex(session.group.session),
            remarks=handle.remarks,
        )
        session.sealed(handle.step, stall_s=stall_s)
        handle.resolve_staged()
        if grant.room_bytes > self._ahead.room_bytes:
            # With extra room, so that a state that grows a little does not need a preparation for every save.
            self._look_ahead(leaves, grant.room_bytes + OPAQUE_SLACK_BYTES)

    # --- overlapped --------------------------------------------------------------------------------------------------

    def _stage_beside(
        self,
        handle: SaveHandle,
        leaves: leaves_module.Leaves,
        opaque: list[bytes],
        choice: late.Choice,
        *,
        persist: bool,
        destination: save_messages.Destination | None,
        started: float,
    ) -> None:
        early = choice.early
        grant = None
        if early:
            grant = self._claim(handle, leaves, opaque, persist=persist, destination=destination, hurried=True)
            grant.mapping.copy_in(grant.slot, leaves, only=early, capacity_bytes=grant.capacity_bytes)
        with modes.off():
            # `detach`: what `p.data = other` puts in place of a weight is not what is saved.
            tensors = [tensor.clone() if late.is_small(tensor.nbytes) else tensor.detach() for tensor in leaves.tensors]
        frozen = leaves_module.Leaves(leaves.layout, tensors, leaves.opaque)
        waiting = [tensors[index] for index in choice.late]
        watched = _Watched(choice.late, leaves_module.versions(waiting), overlap_module.Sample(waiting))
        rest = sorted(set(range(len(tensors))).difference(early)) if early else None
        used = devices.used_by(tensors)
        ready = devices.marks(used)
        held_s = time.perf_counter() - started if early else 0.0

        def stage() -> None:
            try:
                devices.use(used)
                into = grant
                if into is None:
                    into = self._claim(handle, frozen, opaque, persist=persist, destination=destination, hurried=False)
                into.mapping.copy_in(into.slot, frozen, only=rest, ready=ready, capacity_bytes=into.capacity_bytes)
                self._check_unchanged(frozen, watched, ready)
                self._seal(handle, into, frozen, opaque, stall_s=held_s)
            except Exception as err:  # a boundary, as in save()
                self._failed(handle, err, persist=persist)

        self._staging_handle = handle
        self._beside.begin(stage)

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.wait_staged()
        self._habits.stepping(optimizer)

    def wait_staged(self) -> None:
        """
        Wait until an overlapped save is staged. Before that, its parameters may not change.

        Blocks: for the rest of the copy. The claim within it is bounded by session.OVERLAP_WAIT_S.
        """
        handle = self._staging_handle
        if handle is None:
            return
        started = time.perf_counter()
        with _hurry():
            self._beside.wait()
        handle.stall_s += time.perf_counter() - started
        self._staging_handle = None

    def before_load(self) -> None:
        """Finish an overlapped save, and do not take the load for a habit of the script. Blocks: see `wait_staged`."""
        self.wait_staged()
        self._habits.forget()

    def _check_unchanged(
        self, leaves: leaves_module.Leaves, watched: _Watched, ready: Mapping[torch.device, Any]
    ) -> None:
        """
        Check that no tensor changed during an overlapped copy. Otherwise the copy is torn, and must not be sealed.

        Raises:
            StagingError: a tensor changed; names it. From the next save on, `save` copies it before it returns.
        """
        now = leaves_module.versions([leaves.tensors[index] for index in watched.indexes])
        changed = [
            index for index, then, after in zip(watched.indexes, watched.versions, now, strict=True) if then != after
        ]
        if not changed:
            first = watched.sample.changed(ready=ready)
            changed = [] if first is None else [watched.indexes[first]]
        if changed:
            names = [leaves.layout.items[index].fqn for index in changed]
            self._habits.changed(names)
            raise StagingError(
                f"{names[0]!r} was changed while an overlapped save copied it, by something other than an optimizer's step();"
                " from the next save on it is copied before save() returns"
            )

    # --- failing -----------------------------------------------------------------------------------------------------

    def give_up(self, step: int, err: Exception) -> SaveHandle:
        """Fail a save for which this rank has no state, because of `err`, and report it to the other ranks. Never raises."""
        handle = SaveHandle(step)
        self._failed(handle, err, persist=True)
        return handle

    def _failed(self, handle: SaveHandle, err: BaseException, *, persist: bool) -> None:
        error = err if isinstance(err, PillionError) else StagingError(f"{type(err).__name__}: {err}", step=handle.step)
        error.__cause__ = err if error is not err else err.__cause__
        log_lost(handle.step, error)
        self._session.forget(handle)
        document = ErrorDocument.from_exception(error)
        if isinstance(err, SystemExit):
            # Reported as the death of a trainer, as if it was killed here. It is not a failure of saving.
            document = ErrorDocument("TrainerDied", "the trainer ended before its state was sealed")
        handle.incomplete = self._gathers
        self._session.abandon(handle.step, document, persist=persist, gathers=self._gathers)
        handle.fail(error)

    # --- ahead of saves ----------------------------------------------------------------------------------------------

    def prepare(self, leaves: leaves_module.Leaves) -> None:
        """Prepare the arena for saves of the size of `leaves`, beside the training. Never blocks."""
        layout = leaves.layout
        self._collector.adopt(leaves)
        num_leaves = len(layout.items) + len(layout.opaque)
        opaque_bytes = sum(opaque_module.estimated_bytes(leaf) for leaf in leaves.opaque)
        room = arena.room_bytes(
            layout.tensors_bytes + opaque_bytes, len(layout.encoded), OPAQUE_SLACK_BYTES, num_leaves
        )
        self._look_ahead(leaves, room)

    def prepare_load(self) -> None:
        """Map what earlier trainers have left in memory, beside what the script does before its load. Never blocks."""
        self._ahead.begin(preparing.WHAT_IS_THERE)

    def _look_ahead(self, leaves: leaves_module.Leaves, room_bytes: int) -> None:
        self._ahead.begin(preparing.Need(room_bytes, leaves.layout, devices.used_by(leaves.tensors)))

    def close(self) -> None:
        """Remove the optimizer hook, and start no further preparation. Blocks: until an overlapped save is staged."""
        self.wait_staged()
        self._ahead.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._habits.forget()
        self._beside.close()

    def join(self, timeout_s: float = preparing.END_TIMEOUT_S) -> None:
        """Wait for the current preparation. Called from: callers that have closed the session, and benchmarks. Blocks: up to `timeout_s`."""
        self._ahead.join(timeout_s)
