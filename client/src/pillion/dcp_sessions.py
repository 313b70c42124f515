"""
The session of each process group that DCP's calls name, and its saves and loads.

Called from: `dcp`, on the training thread. DCP's signatures have no object to keep a session in. The first call of a group opens the
session, which is a collective. Later calls use it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import traceback
import uuid
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from pillion import callbacks, dcp_failures, exit_drain, group, loading, policy_source, saving, store_mode
from pillion import leaves as leaves_module
from pillion import session as session_module
from pillion.errors import ErrorDocument, LoadError, RemoteFailure, SidecarError, SidecarUnavailable
from pillion.handle import Checkpoint, SaveHandle
from pillion.wire import events, names, save_messages
from pillion.wire.message import Message

_log = logging.getLogger(__name__)


GATHER_TIMEOUT_S: Final = 30.0
"""Timeout for the names of the other ranks that failed to stage the same save. The sidecars gather them within seconds. Only a caller
that waits for the future waits for them."""
REMEMBERED: Final = 64
"""Maximum saves whose failures are kept because they arrived before this rank failed itself."""

Failures = Mapping[int, RemoteFailure]


class Events:
    """Receives the sidecar's messages for a DCP session: the failures of all ranks, if one could not stage. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._early: dict[int, Failures] = {}
        self._waiting: dict[int, Callable[[Failures], None]] = {}

    def __call__(self, event: Message) -> None:
        if not isinstance(event, events.SaveFailures):
            return  # other messages are for `Checkpointer.due`
        step, failures = event.step, ErrorDocument.from_document(event.error).failures
        with self._lock:
            settle = self._waiting.pop(step, None)
            if settle is None:
                self._early[step] = failures
                while len(self._early) > REMEMBERED:
                    del self._early[next(iter(self._early))]
        if settle is not None:
            settle(failures)

    def when_gathered(self, step: int, settle: Callable[[Failures], None]) -> None:
        """Call `settle` once with the failures of all ranks; with none after GATHER_TIMEOUT_S."""
        with self._lock:
            failures = self._early.pop(step, None)
            if failures is None:
                self._waiting[step] = settle
        if failures is not None:
            settle(failures)
            return
        timer = threading.Timer(GATHER_TIMEOUT_S, self._give_up, [step])
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # the interpreter ends
            self._give_up(step)

    def _give_up(self, step: int) -> None:
        with self._lock:
            settle = self._waiting.pop(step, None)
        if settle is not None:
            settle({})

    def close(self) -> None:
        """Settle every save that still waits. No further messages come."""
        for step in list(self._waiting):
            self._give_up(step)


class Saves:
    """Saves and loads of one process group. The n-th save is step n of the session."""

    def __init__(self, session: session_module.Session, events: Events) -> None:
        self._session = session
        self._events = events
        self._saver = saving.Saver(session, overlaps=True, gathers=True)
        self._collector = leaves_module.Collector()
        self._calls = 0
        self._last: SaveHandle | None = None
        session.listen()
        exit_drain.drain_at_exit(self)

    def check_process(self) -> None:
        self._session.check_process()

    def save(
        self,
        stage: Callable[[], Mapping[str, Any]],
        destination: save_messages.Destination,
        *,
        overlap: bool = False,
    ) -> tuple[futures.Future[None], futures.Future[Checkpoint]]:
        """
        Save what `stage` returns. Returns two futures: the end of the staging, and the end of the save.

        Args:
            stage: called here. An error that it raises is this rank's failure.
            destination: see `dcp_options.destination`.
            overlap: copy beside the next forward and backward pass.

        Blocks: for the copy and a free slot.
        """
        step = self._calls
        self._calls += 1
        rank = self._session.group.rank
        try:
            state_dict = stage()
        except Exception as err:  # a boundary: the other ranks wait for this one's part
            handle = self._saver.give_up(step, err)
        else:
            handle = self._saver.save(state_dict, step, persist=True, overlap=overlap, destination=destination)
        self._last = handle
        future: futures.Future[Checkpoint] = callbacks.Outcome(handle.note_examined)

        def conclude(done: futures.Future[Checkpoint]) -> None:
            error = handle.error()
            if error is None:
                future.set_result(futures.Future.result(done))
                return

            def fail(others: Failures) -> None:
                future.set_exception(dcp_failures.checkpoint_exception(error, rank, others=others))

            if handle.incomplete:
                self._events.when_gathered(step, fail)
            else:
                fail({})

        # Not in the thread of callbacks: waiting for this future must not mean waiting for other callbacks.
        futures.Future.add_done_callback(handle.committed, conclude)
        return handle.staged, future

    def load(self, state_dict: dict[str, Any], path: str, *, strict: bool) -> None:
        """
        Fill `state_dict` in place from the checkpoint in a directory.

        Ranks: all. Blocks: as `loading.load`.

        Raises:
            CheckpointException: with the `LoadError` of this rank.
            UsageError: see `loading.load`.
        """
        self._saver.wait_staged()
        try:
            loading.load(self._session, self._collector, state_dict, None, path=path, strict=strict)
        except (LoadError, SidecarError) as err:
            raise dcp_failures.checkpoint_exception(err, self._session.group.rank, "load") from err

    def close(self, timeout_s: float | None = None) -> None:
        if self._session.inherited:
            return
        owed = self._session.pending()
        if self._last is not None and self._last not in owed:
            owed.append(self._last)
        self._saver.close()
        drain_s = self._session.policy.drain.timeout_seconds if timeout_s is None else timeout_s
        try:
            self._session.close(drain_s=drain_s, clean=not exit_drain.by_exception())
        except SidecarUnavailable as err:
            _log.error("pillion: %s", err)
        finally:
            self._saver.join()
            self._events.close()
            exit_drain.closed(self, owed)


_open: dict[object, Saves] = {}
"""Process group (None: this rank alone) -> its saves."""


def of_group(process_group: dist.ProcessGroup | None, *, no_dist: bool) -> Saves:
    """
    Return the saves of a process group. The first call opens a session on all ranks: a collective, and the sidecar's start.

    Raises:
        CheckpointException: the session cannot be opened; on every rank, with the failed ranks.
        UsageError: this process is a forked child of the trainer, or this rank is not in the group.
    """
    distributed = not no_dist and dist.is_available() and dist.is_initialized()
    key = (process_group or dist.group.WORLD) if distributed else None
    if key not in _open:
        events = Events()
        _open[key] = Saves(_open_session(process_group, events, distributed=distributed), events)
    _open[key].check_process()
    return _open[key]


def close(timeout_s: float | None) -> None:
    """See `dcp.close`."""
    for key in list(_open):
        _open.pop(key).close(timeout_s)


def _open_session(
    process_group: dist.ProcessGroup | None, events: Events, *, distributed: bool
) -> session_module.Session:
    """
    Open the session of a group, on all of its ranks or on none.

    Raises:
        CheckpointException: the session cannot be opened; on every rank, with the failed ranks.
    """
    members = (
        group.join(process_group, read_policy=lambda environ: store_mode.policy_of_all(None, environ))
        if distributed
        else _alone()
    )
    session = None
    mine: dict[str, object] | None = None
    try:
        session = store_mode.open_session(
            members,
            root="",
            policy_document=policy_source.document(None, os.environ),
            key=members.session,
            on_event=events,
            process_group=process_group,
            environ=os.environ,
        )
    except Exception as err:  # a boundary: the other ranks wait in the next line
        text = "".join(traceback.format_exception(err))
        mine = RemoteFailure.from_exception(err, pid=os.getpid(), traceback_text=text).to_document()
    # All or none: otherwise a rank that failed would open alone at its next call, in a collective that the others do not run.
    documents: list[dict[str, object] | None] = [mine] * members.world_size
    if members.world_size > 1:
        dist.all_gather_object(documents, mine, group=process_group)
    failures = {
        rank: RemoteFailure.from_document(document) for rank, document in enumerate(documents) if document is not None
    }
    if session is not None and not failures:
        return session
    if session is not None:
        with contextlib.suppress(SidecarUnavailable):
            session.close(drain_s=0.0, clean=True)
    raise CheckpointException("open", {rank: dcp_failures.wrapped(failure) for rank, failure in failures.items()})


def _alone() -> group.Group:
    return group.Group(
        rank=0,
        world_size=1,
        pods=((0,),),
        run_id=os.environ.get(names.ENV_RUN_ID) or os.environ.get("TORCHELASTIC_RUN_ID") or "default",
        session=uuid.uuid4().hex,
        store=None,
        store_problem="a group of one needs no store",
        attempt=0,
    )
