"""
`async_save`, `save` and `load` with the signatures of `torch.distributed.checkpoint`, through the sidecar.

Called from: the training thread of code that has DCP's calls already: one import changes. The first call of a process group opens a
session (a collective); later calls run none. Never reads or writes storage itself: the sidecar does.

    DCP                                       | here
    ------------------------------------------|---------------------------------------------------------------
    storage_writer=None, FileSystemWriter,    | Pillion's own writer: stock DCP files, committed atomically. `file://` and `local://` are
    FsspecWriter with a local path            | local paths. Options for speed have no effect
    any other StorageWriter                   | `Writer("package.module:Class", {...})`: made in the sidecar's executor. `write_data` may
                                              | return anything; to reach `finish` in another pod it must be plain data
    what else cannot be had: objects of your  | `async_save`: a UsageError that says what to do. `save` and `load`: handed to torch, which does
    own, other planners, `s3://`,             | them in this process, with its collectives, outside of the sidecar; one line of the log says so.
    use_collectives=False                     | Of a load also: your own StorageReader and LoadPlanner
    Metadata that a save returns              | the `Checkpoint`: path and size. The metadata lie on storage, which a trainer in a pod does not
                                              | see: `FileSystemReader(path).read_metadata()` where it does
    async_stager                              | DefaultStager, BlockingAsyncStager: accepted, not called, as the state goes into the arena. One of
                                              | your own is called, waited for, and what it returns is saved: a copy more
    AsyncSaveResponse                         | returned where the stager stages beside the training (`use_async_staging`, or a `stage` that
                                              | returns a future); the copy is then beside the training, too, and the next optimizer step waits
    AsyncCheckpointerType, both               | accepted: the writing is in another process in any case
    CheckpointException(failures)             | the same class, on every rank; exactly the ranks that failed
    what a Stateful or a pickling raises, two | DCP raises it at the call on that rank, and the others hang: here it is in every rank's future,
    values of one name, a state_dict that is  | with all ranks that failed so
    no mapping, a stager's error              |
    a tensor of another shape or type under   | DCP saves one of them in silence: here it is the failure of both ranks. Give values that differ
    the same name on another rank             | from rank to rank (random states, a loader's) names that do, too
    an OSError that says something of a place | fails at once, as with DCP (EACCES, ENOTDIR, EROFS, ...); others are tried again for 20 s
    checkpoint_id that differs between ranks  | one checkpoint has one: of the ranks of a pod the lowest one's counts, and pods that write to
                                              | different folders fail at the commit. Of a load: an error
    overwrite=False on one rank               | holds for all
    a group without a backend for the CPU     | works; DCP asserts one
    no_dist                                   | as DCP, without its warning: two ranks with one path leave the checkpoint of the last one
    a writer's instance                       | made for each rank and save: what it keeps from save to save is lost
    load: what the checkpoint lacks           | as DCP: an error, unless the planner has `allow_partial_load`. Any error is a CheckpointException
                                              | that holds a `LoadError`, and names this rank; digests are checked
    load: meta tensors in the state dict      | refused; DCP makes them. What was written with extensions or as safetensors: refused
    load before `Stateful`s in sorted order   | in the order of the dict
    in a pod                                  | paths below the job's root, and the policy's own writer, only
    DCP_USE_PREFIX_STORE=1 without MASTER_*   | an error, but in a group of one, and unset means the policy's `store` (docs/guide/training.md)
    DCP_DISABLE_AUTOMATIC_GC, .._MANUAL_GC    | of the executor, which is the process that saves, as DCP's own: no automatic collection, one
                                              | behind each save. In a pod: variables of the sidecar's container
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, cast, overload

import torch.distributed as dist
from torch.distributed import checkpoint as stock
from torch.distributed.checkpoint import LoadPlanner, SavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import AsyncStager

from pillion import dcp_options as options
from pillion import dcp_sessions
from pillion.dcp_failures import RemoteError
from pillion.dcp_options import AsyncCheckpointerType, AsyncSaveResponse, Writer
from pillion.handle import Checkpoint

__all__ = [
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "CheckpointException",
    "RemoteError",
    "Writer",
    "async_save",
    "close",
    "load",
    "save",
]

_log = logging.getLogger(__name__)


@overload
def async_save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | Writer | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> futures.Future[Checkpoint]: ...


@overload
def async_save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | Writer | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> futures.Future[Checkpoint] | AsyncSaveResponse: ...


def async_save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | Writer | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> futures.Future[Checkpoint] | AsyncSaveResponse:
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
        async_stager: see the module.
        no_dist: save this rank's state as a checkpoint of its own.
        use_collectives: True; the ranks agree through the sidecars, not by collectives.

    Returns:
        A future of the `Checkpoint`, whose callbacks run one after another in a thread of their own (DCP's future has the `Metadata`,
        which stays on storage). Its error is a `CheckpointException`; note that DCP derives that from BaseException. Where the stager
        asks for it, an `AsyncSaveResponse` with that future as `upload_completion`.

    Ranks: all of the process group, in the same order.

    Blocks: for the copy, and while no slot is free (the policy's `staging.overlap`); the first call also for a collective
        and the sidecar's start. With a stager that stages beside the training, only for what no optimizer steps.

    Raises:
        UsageError: the call asks for what cannot be had, or this rank is not in the group; the text says what to do instead. Where DCP
            raises RuntimeError (no checkpoint_id, an address that no storage has), it is this one as well.

    Source: torch 2.15, torch/distributed/checkpoint/state_dict_saver.py.
    """
    destination = options.destination(checkpoint_id, storage_writer)
    options.check_planner(planner, use_collectives=use_collectives)
    options.check_checkpointer_type(async_checkpointer_type)
    staging = options.staging(async_stager)
    responds = staging.responds

    def stage() -> Mapping[str, Any]:
        nonlocal responds
        if staging.stager is None:
            return state_dict
        staged, responds = _staged(staging.stager, state_dict)
        return staged

    try:
        saves = dcp_sessions.of_group(process_group, no_dist=no_dist)
    except CheckpointException as err:
        failed: futures.Future[Any] = futures.Future()
        failed.set_exception(err)
        return AsyncSaveResponse(failed, failed) if responds else failed
    done, saved = saves.save(stage, destination, overlap=staging.responds)
    # As torch's own annotation has it.
    return AsyncSaveResponse(done, cast("futures.Future[None]", saved)) if responds else saved


def save(
    state_dict: Mapping[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | Writer | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Checkpoint | Metadata:
    """
    Save through the sidecar, and wait for the commit.

    Args: as of `async_save`. What that one refuses is handed to torch's own `save`.

    Returns:
        The `Checkpoint`; of what torch saved, its `Metadata`.

    Ranks: all of the process group, in the same order.

    Blocks: until the checkpoint is committed, or cannot be; every phase has a bound of its own.

    Raises:
        CheckpointException: it is not saved; on every rank, with the ranks that failed.
        UsageError: nothing says where, or this rank is not in the group.
    """
    try:
        destination = options.destination(checkpoint_id, storage_writer)
        options.check_planner(planner, use_collectives=use_collectives)
    except options.Unmapped as why:
        if isinstance(storage_writer, Writer):
            raise
        chosen: dict[str, Any] = (
            {"use_collectives": use_collectives} if not use_collectives else {}
        )  # torch 2.6 has no choice
        metadata: Metadata = _by_torch(
            "save",
            why,
            lambda: stock.save(
                dict(state_dict),
                checkpoint_id=checkpoint_id,
                storage_writer=storage_writer,
                planner=planner,
                process_group=process_group,
                no_dist=no_dist,
                **chosen,
            ),
        )
        return metadata
    saves = dcp_sessions.of_group(process_group, no_dist=no_dist)
    return saves.save(lambda: state_dict, destination)[1].result()


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """
    Fill `state_dict` in place from one checkpoint, of Pillion or of stock DCP; the sidecar reads it, and checks the digests that it has.

    Args:
        state_dict: as for DCP; tensors are filled in place, other leaves replaced, `Stateful` values get theirs.
        checkpoint_id: the checkpoint's directory.
        storage_reader: None, or a `FileSystemReader`, or a `FsspecReader` with a local path: it gives the path. Another one, or an
            address that is no directory, is handed to torch's own `load`.
        planner: None or a `DefaultLoadPlanner`, which may allow a partial load. Another one is handed to torch's own `load`.
        process_group: the ranks that load together; None is the default group.
        no_dist: load by this rank alone.

    Ranks: all of the process group, in the same order, from the same directory.

    Blocks: for saves in flight and for the read; the first call of a group also for a collective and the sidecar's start.

    Raises:
        CheckpointException: it cannot be loaded; it holds the `LoadError`, and names this rank.
        UsageError: nothing says where, this rank is not in the group, or the state dict holds what cannot be filled.

    Source: torch 2.15, torch/distributed/checkpoint/state_dict_loader.py.
    """
    try:
        path, strict = options.source(checkpoint_id, storage_reader, planner)
    except options.Unmapped as why:
        _by_torch(
            "load",
            why,
            lambda: stock.load(
                state_dict,
                checkpoint_id=checkpoint_id,
                storage_reader=storage_reader,
                planner=planner,
                process_group=process_group,
                no_dist=no_dist,
            ),
        )
        return
    dcp_sessions.of_group(process_group, no_dist=no_dist).load(state_dict, path, strict=strict)


def close(timeout_s: float | None = None) -> None:
    """
    Drain what is in flight and part from the sidecars; the interpreter's end does it too. A later save opens anew.

    Blocks: up to `timeout_s` for each process group (None: the policy's drain.timeoutSeconds).
    """
    dcp_sessions.close(timeout_s)


def _staged(stager: AsyncStager, state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """What somebody's own stager makes of the state, whole; and whether it stages beside the training."""
    staged = stager.stage(dict(state_dict))
    if isinstance(staged, futures.Future):
        return staged.result(), True
    if stager.should_synchronize_after_execute:
        with warnings.catch_warnings():
            # Torch deprecates it, and calls it.
            warnings.simplefilter("ignore", FutureWarning)
            stager.synchronize_staging()
    return staged, False


def _by_torch(what: str, why: options.Unmapped, call: Callable[[], Any]) -> Any:
    _log.info("pillion: torch does this %s in this process, without the sidecar: %s", what, why)
    return call()
