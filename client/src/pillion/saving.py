"""
One save, from the state dict to the seal.

Called from: `Checkpointer.save` and `pillion.dcp.async_save`, on the training thread; an overlapped save goes on in a thread
of its own. Nothing here raises into the training loop: whatever goes wrong is on the handle.

    collect the leaves -> claim a slot -> copy -> seal
                          |<------- overlapped: beside the next forward and backward ------->|
                                                  the optimizer's pre-hook waits for the end ^
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook  # torch.optim hides the module

from pillion import leaves as leaves_module
from pillion import opaque as opaque_module
from pillion import phases
from pillion.errors import ErrorDocument, PillionError, StagingError
from pillion.handle import SaveHandle
from pillion.session import Session
from pillion.wire import arena

_log = logging.getLogger(__name__)

SMALL_LEAF_BYTES: Final = 64 * 1024
"""An overlapped save copies leaves up to this size at once: buffers that a forward pass changes (BatchNorm's statistics, step
counters) are of this size, and are then safe without the optimizer hook."""
OPAQUE_SLACK_BYTES: Final = 256 * 1024
"""Room beside the layout for the manifest and for opaque leaves that grow a little from save to save."""


HURRIED_SWITCH_S: Final = 50e-6
"""sys.setswitchinterval while a save holds the training loop up. The copy and the claim give the GIL up a dozen times; beside a
thread that computes in Python each way back takes a whole interval, by default 5 ms."""


class _Hurry:
    """
    The interpreter stays out of the way: quick hand-overs of the GIL, and no garbage collection.

    A collection in the midst of 10,000 fresh tuples walks every object of the trainer (0.2 s with torch imported). Both settings are the
    whole interpreter's: the first of several threads that hurry changes them, and the last one changes them back.
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
        """Of a thread that hurries, and waits for another process now."""
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


class Saver:
    """
    Stages saves of one session, one at a time.

    Owns: the staging thread of an overlapped save, and the optimizer hook (from the first overlapped save on).
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._collector = leaves_module.Collector()
        self._pickler = opaque_module.Pickler()
        self._staging: threading.Thread | None = None
        self._staging_handle: SaveHandle | None = None
        self._hook: Any = None

    def save(
        self,
        state_dict: Mapping[str, Any],
        step: int,
        *,
        persist: bool,
        overlap: bool,
        destination: Mapping[str, Any] | None = None,
    ) -> SaveHandle:
        """
        Stage `state_dict`; the handle says what became of it.

        Blocks: for the copy and, under `overlap: Wait`, for a free slot. With `overlap`, neither.
        """
        handle = SaveHandle(step)
        started = time.perf_counter()
        with _hurry():
            self._save(handle, state_dict, started=started, persist=persist, overlap=overlap, destination=destination)
        handle.stall_s += time.perf_counter() - started
        return handle

    def _save(
        self,
        handle: SaveHandle,
        state_dict: Mapping[str, Any],
        *,
        started: float,
        persist: bool,
        overlap: bool,
        destination: Mapping[str, Any] | None,
    ) -> None:
        try:
            self.wait_staged()
            state_dict = leaves_module.materialize(state_dict)
            leaves = self._collector.collect(state_dict)
            opaque = self._pickler.pickled(dict(zip(leaves.layout.opaque, leaves.opaque, strict=True)))
            if overlap:
                self._stage_beside(handle, leaves, opaque, persist=persist, destination=destination)
            else:
                self._stage(handle, leaves, opaque, persist=persist, destination=destination, started=started)
        except Exception as err:  # a boundary: no save raises into the training loop (design.md, what must hold, 2)
            self._failed(handle, err, persist=persist)
        except BaseException as err:
            # Ctrl-C, or whatever a signal's handler raises: it goes on, and the slot is given up, or it would be kept for its bound.
            self._failed(handle, err, persist=persist)
            raise

    def _stage(
        self,
        handle: SaveHandle,
        leaves: leaves_module.Leaves,
        opaque: list[bytes],
        *,
        persist: bool,
        destination: Mapping[str, Any] | None,
        ready: object = None,
        started: float | None = None,
    ) -> None:
        session, mapping = self._session, self._session.mapping
        if mapping is None:
            raise StagingError("the session has no arena")
        _, image_bytes = leaves.layout.opaque_starts([len(data) for data in opaque])
        num_leaves = len(leaves.tensors) + len(opaque)
        room = arena.room_bytes(image_bytes, len(leaves.layout.encoded), OPAQUE_SLACK_BYTES, num_leaves)
        # Tracked first: another rank's failure may be told while this one still waits for its slot.
        session.track(handle)
        with contextlib.ExitStack() as waiting:
            grant = session.claim(
                handle.step,
                room_bytes=room,
                persist=persist,
                destination=destination,
                # Beside the training loop nobody hurries.
                on_wait=lambda: None if started is None else waiting.enter_context(_hurry.paused()),
            )
        phases.reach(phases.Phase.STAGE, rank=session.group.rank, step=handle.step)
        mapping.copy_in(grant.slot, leaves, ready=ready)
        self._check_unchanged(leaves)
        phases.reach(phases.Phase.SEAL, rank=session.group.rank, step=handle.step)
        mapping.seal(
            grant.slot,
            leaves=leaves,
            opaque=opaque,
            step=handle.step,
            rank=session.group.rank,
            world_size=session.group.world_size,
            session=bytes.fromhex(session.group.session),
        )
        session.sealed(handle.step, stall_s=0.0 if started is None else time.perf_counter() - started)
        handle.resolve_staged()

    # --- overlapped --------------------------------------------------------------------------------------------------

    def _stage_beside(
        self,
        handle: SaveHandle,
        leaves: leaves_module.Leaves,
        opaque: list[bytes],
        *,
        persist: bool,
        destination: Mapping[str, Any] | None,
    ) -> None:
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(self._before_optimizer_step)
        tensors = [
            tensor.detach().clone() if tensor.numel() * tensor.element_size() <= SMALL_LEAF_BYTES else tensor
            for tensor in leaves.tensors
        ]
        frozen = leaves_module.Leaves(leaves.layout, tensors, leaves.opaque, leaves_module.versions(tensors))
        ready = None
        if any(tensor.is_cuda for tensor in tensors):
            ready = torch.cuda.Event()
            ready.record()

        def stage() -> None:
            try:
                self._stage(handle, frozen, opaque, persist=persist, destination=destination, ready=ready)
            except Exception as err:  # a boundary, as in save()
                self._failed(handle, err, persist=persist)

        self._staging_handle = handle
        self._staging = threading.Thread(target=stage, name="pillion-staging", daemon=True)
        self._staging.start()

    def _before_optimizer_step(self, *_: object) -> None:
        self.wait_staged()

    def wait_staged(self) -> None:
        """
        Wait for an overlapped save to be staged; its parameters may not change before.

        Blocks: for the rest of the copy; the claim within it has session.OVERLAP_WAIT_S as its bound.
        """
        staging, handle = self._staging, self._staging_handle
        if staging is None or handle is None:
            return
        started = time.perf_counter()
        with _hurry():
            staging.join()
        handle.stall_s += time.perf_counter() - started
        self._staging = self._staging_handle = None

    def _check_unchanged(self, leaves: leaves_module.Leaves) -> None:
        """
        An overlapped save whose tensors were changed during the copy is torn, and must not be sealed.

        The optimizer hook prevents it; what changes parameters by other means is found by their version counters.
        """
        if leaves.versions is None:
            return
        for item, then, now in zip(
            leaves.layout.items, leaves.versions, leaves_module.versions(leaves.tensors), strict=True
        ):
            if then != now:
                raise StagingError(
                    f"{item.fqn!r} was changed in place while an overlapped save copied it; something other than an"
                    " optimizer's step changes it: save it with overlap=False"
                )

    # --- failing -----------------------------------------------------------------------------------------------------

    def _failed(self, handle: SaveHandle, err: BaseException, *, persist: bool) -> None:
        error = err if isinstance(err, PillionError) else StagingError(f"{type(err).__name__}: {err}", step=handle.step)
        error.__cause__ = err if error is not err else err.__cause__
        _log.error("pillion: save of step %d failed: %s", handle.step, error)
        self._session.forget(handle)
        self._session.abandon(handle.step, ErrorDocument.from_exception(error), persist=persist)
        handle.fail(error)

    def prepare(self, layout_of: leaves_module.Leaves) -> None:
        """
        Have the arena ready for saves of this layout: allocated, touched, mapped, registered.

        Called from: a thread of the client, ahead of the first save. Failing is not an error: the first save then
        does it, and reports.
        """
        mapping = self._session.mapping
        of = layout_of.layout
        self._collector.adopt(layout_of)
        num_leaves = len(of.items) + len(of.opaque)
        opaque_bytes = sum(opaque_module.estimated_bytes(leaf) for leaf in layout_of.opaque)
        room = arena.room_bytes(of.tensors_bytes + opaque_bytes, len(of.encoded), OPAQUE_SLACK_BYTES, num_leaves)
        for slot, capacity_bytes in enumerate(self._session.reserve(room)):
            if mapping is not None:
                mapping.populate(slot, capacity_bytes)
                mapping.warm(slot, of)

    def close(self) -> None:
        """Remove the optimizer hook. Blocks: until an overlapped save is staged."""
        self.wait_staged()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
