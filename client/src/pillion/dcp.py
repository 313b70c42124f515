"""
`async_save` with the signature of `torch.distributed.checkpoint.async_save`, through the sidecar.

Called from: the training thread of whoever has DCP calls already: one import changes. The first call of a process group opens a
session (a collective); later calls run none. Never reads or writes storage itself: the sidecar does.

    DCP                                       | here
    ------------------------------------------|---------------------------------------------------------------
    storage_writer=None, FileSystemWriter     | Pillion's own writer: stock DCP files, committed atomically
    any other StorageWriter                   | `Writer("package.module:Class", {...})`: made in the sidecar's executor
    CheckpointException(failures)             | the same class, on every rank; exactly the ranks that could not write. Of ranks that cannot stage
                                              | their own state, each names itself, and the others name the first of them
    what a Stateful or a pickling raises, two | DCP raises it at the call on that rank, and the others hang: here it is in every rank's future,
    values of one name, a state_dict that is  | with that rank
    no mapping                                |
    AsyncSaveResponse, async_stager           | never: staged is what the return says. Callers that assert the response keep torch's own
    AsyncCheckpointerType, both               | accepted: the writing is in another process in any case
    a tensor of another shape or type under   | DCP saves one of them in silence: here it is the failure of both ranks. Give values that differ
    the same name on another rank             | from rank to rank (random states, a loader's) names that do, too
    an OSError that says something of a place | fails at once, as with DCP (EACCES, ENOTDIR, EROFS, ...); others are tried again for 20 s
    checkpoint_id that differs between ranks  | one checkpoint has one: of the ranks of a pod the lowest one's counts, and pods that write to
                                              | different folders fail at the commit
    overwrite=False on one rank               | holds for all
    a group without a backend for the CPU     | works; DCP asserts one
    no_dist                                   | as DCP, without its warning: two ranks with one path leave the checkpoint of the last one
    a writer's instance                       | made for each rank and save: what it keeps from save to save is lost
    DCP_DISABLE_AUTOMATIC_GC, .._MANUAL_GC    | not read: they are about DCP's own process
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import json
import logging
import os
import re
import traceback
import uuid
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlanner, StorageWriter
from torch.distributed.checkpoint.api import CheckpointException

try:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
except ImportError:  # torch 2.6 has no choice to name; can go with the last release that supports it

    class AsyncCheckpointerType(enum.Enum):  # type: ignore[no-redef]
        """The enum that torch has since 2.7."""

        THREAD = "thread"
        PROCESS = "process"


from pillion import callbacks, ending, group, policy_source, saving, storing
from pillion import session as session_module
from pillion.errors import PillionError, RemoteFailure, SidecarUnavailable, UsageError
from pillion.handle import Checkpoint, SaveHandle
from pillion.wire import messages, names, policy

__all__ = ["AsyncCheckpointerType", "CheckpointException", "RemoteError", "Writer", "async_save", "close"]

_log = logging.getLogger(__name__)

_FRAME: Final = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+), in (?P<name>.*)$')
_ERRNO: Final = re.compile(r"\[Errno (\d+)\] (.*)", re.DOTALL)
_TRACEBACK_HEAD: Final = "Traceback (most recent call last):"


class RemoteError(Exception):
    """
    An error of another process whose class cannot be built here; its text begins with the name of that class.

    It is also the `__cause__` of the errors that were built again, with the remote traceback as its text, as
    `concurrent.futures` does it.
    """

    def __init__(self, text: str, failure: RemoteFailure) -> None:
        self.failure = failure
        super().__init__(text)


@dataclass(frozen=True)
class Writer:
    """
    A DCP `StorageWriter` by name: the executor imports it and makes one for each rank and save as ``Class(**arguments)``.

    The sidecar must be able to import the module: without a cluster it looks where the trainer does (`sys.path`, so also beside the
    script), in a pod where its own image and PYTHONPATH have it. The writer object itself cannot be sent: no pickle
    crosses a process boundary.

    Raises:
        UsageError: the name is no ``package.module:Class``, or an argument is no JSON value.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        document = {"storage": {"writer": {"name": self.name, "arguments": self.arguments}}}
        try:
            policy.parse(document, embedded=True)
            json.dumps(self.arguments, allow_nan=False)
        except (policy.PolicyError, TypeError, ValueError) as err:
            raise UsageError(f"Writer({self.name!r}): {err}") from err


def async_save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | Writer | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: object = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> futures.Future[Checkpoint]:
    """
    Copy the state into the arena and go on training; the sidecar writes and commits it.

    Args:
        state_dict: as for DCP; `Stateful` values are asked for theirs.
        checkpoint_id: the checkpoint's directory (for a `Writer` also what its `reset` understands, such as a URL). A
            relative path is made absolute here.
        storage_writer: see the module. A `FileSystemWriter` gives its path and its `overwrite`; its options for speed
            have no effect.
        planner: None or a `DefaultSavePlanner` with its default flags.
        process_group: the ranks that save together; None is the default group.
        async_checkpointer_type: both are accepted, and mean the same.
        async_stager: None; staging into the arena is what Pillion does.
        no_dist: save this rank's state as a checkpoint of its own.
        use_collectives: True; the ranks agree through the sidecars, not by collectives.

    Returns:
        A future of the `Checkpoint`, whose callbacks run one after another in a thread of their own (DCP's future has the `Metadata`, which stays on storage). Its error is a
        `CheckpointException`; note that DCP derives that from BaseException.

    Ranks: all of the process group, in the same order.

    Blocks: for the copy, and while no slot is free (the policy's `staging.overlap`); the first call also for a collective
        and the sidecar's start.

    Raises:
        UsageError: the call asks for what cannot be had, or this rank is not in the group; the text says what to do instead. Where DCP
            raises RuntimeError (no checkpoint_id, an address that no storage has), it is this one as well.

    Source: torch 2.15, torch/distributed/checkpoint/state_dict_saver.py.
    """
    destination = _destination(checkpoint_id, storage_writer)
    _check_options(planner, async_stager, async_checkpointer_type, use_collectives=use_collectives)
    try:
        saves = _saves_of(process_group, distributed=not no_dist and dist.is_available() and dist.is_initialized())
    except CheckpointException as err:
        failed: futures.Future[Checkpoint] = futures.Future()
        failed.set_exception(err)
        return failed
    return saves.save(state_dict, destination)


def close(timeout_s: float | None = None) -> None:
    """
    Drain what is in flight and part from the sidecars; the interpreter's end does it too. A later save opens anew.

    Blocks: up to `timeout_s` for each process group (None: the policy's drain.timeoutSeconds).
    """
    for key in list(_open):
        _open.pop(key).close(timeout_s)


# --- what the call means ---------------------------------------------------------------------------------------------


def _destination(
    checkpoint_id: str | os.PathLike[str] | None, writer: StorageWriter | Writer | None
) -> dict[str, object]:
    """The destination document of a claim: path, and writer or overwrite."""
    where = None if checkpoint_id is None else os.fspath(checkpoint_id)
    if isinstance(writer, Writer):
        if names.ENV_RUNTIME_DIR not in os.environ:
            policy_source.require_module(writer.name)
        path = where if where is None or "://" in where else os.path.abspath(where)
        return {"path": path, "writer": {"name": writer.name, "arguments": dict(writer.arguments)}}
    if writer is not None and type(writer) is not FileSystemWriter:
        kind = type(writer)
        raise UsageError(
            f"a {kind.__qualname__} object cannot be sent to the sidecar: name it, as"
            f' pillion.dcp.Writer("{kind.__module__}:{kind.__qualname__}", {{its arguments}})'
        )
    overwrite = True
    if isinstance(writer, FileSystemWriter):
        _check_file_system_writer(writer)
        overwrite = bool(writer.overwrite)
        where = where or os.fspath(writer.path)
    if not where:
        raise UsageError("checkpoint_id must be given when storage_writer is None")
    if "://" in where:
        raise UsageError(f"{where} is no directory: give a pillion.dcp.Writer that writes to it")
    return {"path": os.path.abspath(where), "overwrite": overwrite}


def _check_file_system_writer(writer: FileSystemWriter) -> None:
    # Both are younger than torch 2.6.
    form = getattr(getattr(writer, "serialization_format", None), "name", "TORCH_SAVE")
    extensions = getattr(getattr(writer, "transforms", None), "extensions", ())
    if form != "TORCH_SAVE" or extensions:
        what = "stream extensions" if extensions else f"serialization_format={form}"
        raise UsageError(
            f"FileSystemWriter with {what} changes the format: leave it out, or name the writer as"
            ' pillion.dcp.Writer("torch.distributed.checkpoint:FileSystemWriter", {its arguments})'
        )


def _check_options(planner: object, stager: object, checkpointer_type: object, *, use_collectives: bool) -> None:
    if planner is not None and not _is_default(planner):
        raise UsageError(
            f"planner={type(planner).__qualname__}: the sidecar plans as DefaultSavePlanner does with its default flags;"
            " change the state dict before the call instead, and leave the planner out"
        )
    if stager is not None:
        raise UsageError("async_stager: Pillion stages into the sidecar's arena itself; leave it out")
    if not use_collectives:
        raise UsageError(
            "use_collectives=False: Pillion runs no collectives in a save, and its checkpoints are whole; leave it out"
        )
    if not isinstance(checkpointer_type, AsyncCheckpointerType):
        raise UsageError(f"async_checkpointer_type must be an AsyncCheckpointerType, not {checkpointer_type!r}")


def _is_default(planner: object) -> bool:
    # enable_plan_caching asks for what the executor does anyway.
    return (
        type(planner) is DefaultSavePlanner
        and planner.flatten_state_dict
        and planner.flatten_sharded_tensors
        and not planner.dedup_save_to_lowest_rank
    )


# --- sessions --------------------------------------------------------------------------------------------------------


class _Saves:
    """The saves of one process group; the n-th call is step n of the session."""

    def __init__(self, session: session_module.Session) -> None:
        self._session = session
        self._saver = saving.Saver(session, overlaps=False)
        self._calls = 0
        self._last: SaveHandle | None = None
        session.listen()
        ending.drain_at_exit(self)

    def check_process(self) -> None:
        self._session.check_process()

    def save(self, state_dict: Mapping[str, Any], destination: Mapping[str, Any]) -> futures.Future[Checkpoint]:
        step = self._calls
        self._calls += 1
        rank = self._session.group.rank
        handle = self._last = self._saver.save(state_dict, step, persist=True, overlap=False, destination=destination)
        future: futures.Future[Checkpoint] = callbacks.Outcome(handle.note_asked)

        def conclude(done: futures.Future[Checkpoint]) -> None:
            error = handle.error()
            if error is None:
                future.set_result(futures.Future.result(done))
            else:
                future.set_exception(_checkpoint_exception(error, rank))

        # Not in the thread of callbacks: whoever waits for the future would wait for what others do there.
        futures.Future.add_done_callback(handle.committed, conclude)
        return future

    def close(self, timeout_s: float | None = None) -> None:
        if self._session.inherited:
            return
        owed = self._session.pending()
        if self._last is not None and self._last not in owed:
            owed.append(self._last)
        self._saver.close()
        drain_s = self._session.policy.drain.timeout_seconds if timeout_s is None else timeout_s
        try:
            self._session.close(drain_s=drain_s, clean=not ending.by_exception())
        except SidecarUnavailable as err:
            _log.error("pillion: %s", err)
        finally:
            ending.closed(self, owed)


_open: dict[object, _Saves] = {}
"""Process group (None: this rank alone) -> its saves. DCP's signature has no object to keep them in."""


def _saves_of(process_group: dist.ProcessGroup | None, *, distributed: bool) -> _Saves:
    key = (process_group or dist.group.WORLD) if distributed else None
    if key not in _open:
        _open[key] = _Saves(_open_session(process_group, distributed=distributed))
    _open[key].check_process()
    return _open[key]


def _open_session(process_group: dist.ProcessGroup | None, *, distributed: bool) -> session_module.Session:
    """
    Open the session of a group, on all of its ranks or on none.

    Raises:
        CheckpointException: on every rank, with the ranks that could not.
    """
    members = (
        group.join(process_group, ask_policy=lambda environ: storing.policy_of_all(None, environ))
        if distributed
        else _alone()
    )
    session = None
    mine: dict[str, object] | None = None
    try:
        session = storing.open_session(
            members,
            root="",
            policy_document=policy_source.document(None, os.environ),
            key=members.session,
            on_event=_ignore,
            process_group=process_group,
            environ=os.environ,
        )
    except Exception as err:  # a boundary: the other ranks wait in the next line
        text = "".join(traceback.format_exception(err))
        mine = RemoteFailure.from_exception(err, pid=os.getpid(), traceback_text=text).to_document()
    # All or none: a rank that would open alone at its next call would run a collective that the others do not.
    told: list[dict[str, object] | None] = [mine] * members.world_size
    if members.world_size > 1:
        dist.all_gather_object(told, mine, group=process_group)
    failures = {rank: RemoteFailure.from_document(each) for rank, each in enumerate(told) if each is not None}
    if session is not None and not failures:
        return session
    if session is not None:
        with contextlib.suppress(SidecarUnavailable):
            session.close(drain_s=0.0, clean=True)
    raise CheckpointException("open", {rank: _wrapped(failure) for rank, failure in failures.items()})


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


def _ignore(_: messages.Message) -> None:
    """Announcements are for who asks `Checkpointer.due`."""


# --- errors as DCP has them ------------------------------------------------------------------------------------------


def _checkpoint_exception(error: BaseException, rank: int) -> CheckpointException:
    failures: Mapping[int, RemoteFailure] = getattr(error, "failures", {})
    wrapped: dict[int, tuple[BaseException, traceback.StackSummary]]
    wrapped = {each: _wrapped(failure) for each, failure in sorted(failures.items())}
    # Without a rank it is this one's: its sidecar is gone, or it could not stage.
    made = CheckpointException(str(error), wrapped or {rank: (error, traceback.extract_tb(error.__traceback__))})
    made.__cause__ = error if isinstance(error, PillionError) else None
    return made


def _wrapped(failure: RemoteFailure) -> tuple[BaseException, traceback.StackSummary]:
    """A failure as DCP's WRAPPED_EXCEPTION: the error, built again where it is one of Python's own, and its stack."""
    error = _rebuilt(failure)
    if failure.traceback_text:
        error.__cause__ = RemoteError(f'\n"""\n{failure.traceback_text}"""', failure)
    return error, _stack(failure.traceback_text)


def _rebuilt(failure: RemoteFailure) -> Exception:
    kind = getattr(builtins, failure.type_name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        errno = _ERRNO.fullmatch(failure.message) if issubclass(kind, OSError) else None
        with contextlib.suppress(TypeError):  # UnicodeDecodeError wants five arguments
            return kind(int(errno[1]), errno[2]) if errno else kind(failure.message)
    return RemoteError(f"{failure.type_name}: {failure.message}", failure)


def _stack(text: str) -> traceback.StackSummary:
    """The frames of the last traceback in a text: the one of the error itself, not of its causes."""
    lines = text.rpartition(_TRACEBACK_HEAD)[2].splitlines()
    frames = []
    for number, line in enumerate(lines):
        frame = _FRAME.match(line)
        if frame:
            source = lines[number + 1].strip() if lines[number + 1 : number + 2] else ""
            frames.append((frame["file"], int(frame["line"]), frame["name"], source))
    return traceback.StackSummary.from_list(frames)
