"""
`async_save`, `save` and `load` with the signatures of `torch.distributed.checkpoint`, through the sidecar.

Called from: the training thread of code that already has DCP's calls. Only its import changes. The first call of a process group opens
a session, which is a collective; later calls run none. This module never reads or writes storage: the sidecar does.

    DCP                                       | here
    ------------------------------------------|---------------------------------------------------------------
    storage_writer=None, FileSystemWriter,    | Pillion's own writer: stock DCP files, committed atomically. `file://` and `local://` are
    FsspecWriter with a local path            | local paths. Options for speed have no effect
    any other StorageWriter                   | `Writer("package.module:Class", {...})`: the sidecar's executor makes it. `write_data` may return
                                              | anything, but only plain data reaches `finish` in another pod
    what the sidecar cannot do: objects of    | `async_save` raises a UsageError that says what to do. `save` and `load` call torch, which runs
    your own, other planners, a URL of an     | in this process, with its collectives and without the sidecar; the log has a line. For a load
    FsspecWriter, use_collectives=False       | this includes your own StorageReader and LoadPlanner. A URL as checkpoint_id alone is the sidecar's
    Metadata that a save returns              | the `Checkpoint`: path and size. The metadata are on storage, which a trainer in a pod cannot
                                              | read. Elsewhere: `FileSystemReader(path).read_metadata()`
    async_stager                              | DefaultStager, BlockingAsyncStager: accepted and not called, as the state goes into the arena.
                                              | Your own stager is called and waited for; its result is saved, which costs one more copy
    AsyncSaveResponse                         | returned if the stager stages beside the training (`use_async_staging`, or a `stage` that
                                              | returns a future). Then the copy runs beside the training, and the next optimizer step waits
    AsyncCheckpointerType, both               | accepted: another process writes in any case
    CheckpointException(failures)             | the same class, on every rank, with exactly the failed ranks
    an error of a Stateful, of pickling or of | DCP raises at the call on that rank, and the other ranks hang. Here every rank's future has the
    a stager; two values of one name; a       | error, with all ranks that failed
    state_dict that is not a mapping          |
    a tensor of another shape or type under   | DCP saves one of them silently. Here both ranks fail. Give values that differ from rank to rank
    the same name on another rank             | (random states, a data loader's state) different names
    an OSError about a path                   | fails at once, as with DCP (EACCES, ENOTDIR, EROFS, ...). Other OSErrors are retried for 20 s
    checkpoint_id that differs between ranks  | the lowest rank's counts within a pod. Pods that write to different directories fail at the
                                              | commit. A load raises
    overwrite=False on one rank               | holds for all ranks
    a group without a backend for the CPU     | works; DCP asserts one
    no_dist                                   | as DCP, without its warning: of two ranks with one path the last one's checkpoint stays
    a writer's instance                       | made for each rank and save, so it keeps no state from save to save
    load: what the checkpoint lacks           | as DCP: an error, unless the planner has `allow_partial_load`. Every error is a
                                              | CheckpointException that holds a `LoadError` and names this rank. Digests are checked
    load: meta tensors in the state dict      | refused; DCP creates them. Also refused: files with stream extensions, or as safetensors
    load before `Stateful`s in sorted order   | in the order of the dict
    in a pod                                  | only paths below the job's root, and the policy's own writer
    DCP_USE_PREFIX_STORE=1 without MASTER_*   | an error, except in a group of one. Unset means the policy's `store` (docs/guide/training.md)
    DCP_DISABLE_AUTOMATIC_GC, .._MANUAL_GC    | apply to the executor, the process that saves, as in DCP: no automatic collection, and one after
                                              | each save. In a pod: variables of the sidecar's container
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
    Copy the state into the arena, and return. The sidecar writes and commits it.

    Args:
        state_dict: as for DCP. Of a `Stateful` value its `state_dict()` is saved.
        checkpoint_id: the checkpoint's directory. For a `Writer` also anything that its `reset` understands, such as a URL. A
            relative path is made absolute here.
        storage_writer: see the module. A `FileSystemWriter` gives its path and its `overwrite`; its options for speed
            have no effect.
        planner: None, or a `DefaultSavePlanner` with its default flags.
        process_group: the ranks that save together. None is the default group.
        async_checkpointer_type: both values are accepted and mean the same.
        async_stager: see the module.
        no_dist: save this rank's state as a checkpoint of its own.
        use_collectives: True. The ranks agree through the sidecars, not by collectives.

    Returns:
        A future of the `Checkpoint`. Its callbacks run one after another in a thread of their own. (DCP's future has the `Metadata`,
        which stays on storage.) Its error is a `CheckpointException`, which DCP derives from BaseException. If the stager stages
        beside the training: an `AsyncSaveResponse` with that future as `upload_completion`.

    Ranks: all of the process group, in the same order.

    Blocks: for the copy, and while no slot is free (the policy's `staging.overlap`). The first call also blocks for a collective
        and the sidecar's start. With a stager that stages beside the training, only for tensors that no optimizer steps.

    Raises:
        UsageError: the sidecar cannot do what the call requests, or this rank is not in the group. The text says what to do instead.
            It also replaces DCP's RuntimeError (no checkpoint_id, an address without a storage).

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

    Args: as for `async_save`. A call that `async_save` refuses goes to torch's own `save`.

    Returns:
        The `Checkpoint`. If torch saved: its `Metadata`.

    Ranks: all of the process group, in the same order.

    Blocks: until the checkpoint is committed, or the save has failed. Every phase has its own bound.

    Raises:
        CheckpointException: the save failed; on every rank, with the failed ranks.
        UsageError: neither checkpoint_id nor storage_writer gives a directory, or this rank is not in the group.
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
                **_alone(no_dist),
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
    Fill `state_dict` in place from one checkpoint of Pillion or of stock DCP. The sidecar reads it, and checks digests if it has any.

    Args:
        state_dict: as for DCP. Tensors are filled in place, other leaves are replaced, and `load_state_dict` of each `Stateful` is called.
        checkpoint_id: the checkpoint's directory.
        storage_reader: None, or a `FileSystemReader` or `FsspecReader` with a local path, which gives the directory. Any other reader
            or address goes to torch's own `load`.
        planner: None or a `DefaultLoadPlanner`, which may allow a partial load. Any other planner goes to torch's own `load`.
        process_group: the ranks that load together. None is the default group.
        no_dist: load on this rank alone.

    Ranks: all of the process group, in the same order, from the same directory.

    Blocks: for saves in flight and for the read. The first call of a group also blocks for a collective and the sidecar's start.

    Raises:
        CheckpointException: the load failed. It holds the `LoadError` and names this rank.
        UsageError: neither checkpoint_id nor storage_reader gives a directory, this rank is not in the group, or a value of the state
            dict cannot be filled.

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
                **_alone(no_dist),
            ),
        )
        return
    dcp_sessions.of_group(process_group, no_dist=no_dist).load(state_dict, path, strict=strict)


def _alone(no_dist: bool) -> dict[str, bool]:
    """Return `no_dist` for torch's own calls, if it says anything. torch 2.6 has no such argument, and is alone where there is no group."""
    return {"no_dist": True} if no_dist else {}


def close(timeout_s: float | None = None) -> None:
    """
    Wait for the saves in flight, and end the sessions with the sidecars. The interpreter's exit does the same. A later call opens a new session.

    Blocks: up to `timeout_s` for each process group (None: the policy's drain.timeoutSeconds).
    """
    dcp_sessions.close(timeout_s)


def _staged(stager: AsyncStager, state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Call the user's stager. Return its complete result, and whether it stages beside the training."""
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
