"""
What the arguments of DCP's calls mean here: which the sidecar handles, which go to torch, and which are refused. Pure.

Called from: `dcp`.
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Final

from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlanner,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager

try:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
except ImportError:  # torch 2.6 has no choice to name; can go with the last release that supports it

    class AsyncCheckpointerType(enum.Enum):  # type: ignore[no-redef]
        """The enum that torch has since 2.7."""

        THREAD = "thread"
        PROCESS = "process"


try:
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
except ImportError:  # torch 2.6 has no stager that needs it

    @dataclass
    class AsyncSaveResponse:  # type: ignore[no-redef]
        """The pair that torch has since 2.8."""

        staging_completion: futures.Future[None]
        upload_completion: futures.Future[Any]


from pillion import addresses, policy_source
from pillion.errors import UsageError
from pillion.wire import names, policy, save_messages

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "Staging", "Unmapped", "Writer"]

LOCAL_SCHEMES: Final = ("file://", "local://")
"""How fsspec addresses a local file."""


class Unmapped(UsageError):
    """The sidecar cannot do what the call requests; torch itself may."""


@dataclass(frozen=True)
class Writer:
    """
    A DCP `StorageWriter` by name. The executor imports it, and makes one as ``Class(**arguments)`` for each rank and save.

    The sidecar must be able to import the module. Without a cluster it searches the trainer's `sys.path`, which includes the script's
    directory. In a pod it searches its own image and PYTHONPATH. A writer object cannot be sent: no pickle crosses a process boundary.

    Raises:
        UsageError: the name is not ``package.module:Class``, or an argument is not a JSON value.
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


def destination(
    checkpoint_id: str | os.PathLike[str] | None, writer: StorageWriter | Writer | None
) -> save_messages.Destination:
    """
    Return the destination of a claim: path, and writer or overwrite.

    Raises:
        Unmapped: the writer is an object that cannot be sent, or the address is not a directory.
        UsageError: neither argument gives a directory.
    """
    where = None if checkpoint_id is None else os.fspath(checkpoint_id)
    if isinstance(writer, Writer):
        if names.ENV_RUNTIME_DIR not in os.environ:
            policy_source.require_module(writer.name)
        path = where if where is None or "://" in where else os.path.abspath(where)
        named = save_messages.NamedWriter(name=writer.name, arguments=dict(writer.arguments))
        return save_messages.Destination(path=path, writer=named)
    overwrite = True
    if writer is not None:
        _check_writer(writer)
        overwrite = bool(getattr(writer, "overwrite", True))
        where = where or os.fspath(getattr(writer, "path", ""))
    if not where:
        raise UsageError("checkpoint_id must be given when storage_writer is None")
    path = directory(where, instead="a pillion.dcp.Writer that writes to it", buckets=writer is None)
    return save_messages.Destination(path=path, overwrite=overwrite)


def directory(where: str, *, instead: str, buckets: bool) -> str:
    """
    Return the absolute path for a DCP id or path. fsspec's addresses of local files are understood.

    Args:
        where: the id or path.
        instead: what to pass instead of another address, for the error.
        buckets: whether the URL of a bucket is returned as it is: the sidecar opens it, with credentials of its own.

    Raises:
        Unmapped: `where` is not a directory. The text says what to pass `instead`.
    """
    for scheme in LOCAL_SCHEMES:
        if where.startswith(f"{scheme}/"):
            return os.path.abspath(where.removeprefix(scheme))
    if buckets and addresses.is_bucket(where):
        return addresses.absolute(where)
    if "://" in where:
        raise Unmapped(f"{where} is not a directory: pass {instead}")
    return os.path.abspath(where)


def _check_writer(writer: StorageWriter) -> None:
    kind = type(writer)
    if kind is not FileSystemWriter and not _is_torchs(writer, "FsspecWriter"):
        raise Unmapped(
            f"a {kind.__qualname__} object cannot be sent to the sidecar: pass it by name, as"
            f' pillion.dcp.Writer("{kind.__module__}:{kind.__qualname__}", {{its arguments}})'
        )
    # Both are younger than torch 2.6.
    form = getattr(getattr(writer, "serialization_format", None), "name", "TORCH_SAVE")
    extensions = getattr(getattr(writer, "transforms", None), "extensions", ())
    if form != "TORCH_SAVE" or extensions:
        what = "stream extensions" if extensions else f"serialization_format={form}"
        raise Unmapped(
            f"{kind.__qualname__} with {what} changes the format: leave it out, or name the writer as"
            f' pillion.dcp.Writer("torch.distributed.checkpoint:{kind.__qualname__}", {{its arguments}})'
        )


def _is_torchs(value: object, name: str) -> bool:
    """Whether a value is of DCP's class `name`. Compared by name: its module differs by release, and may need fsspec to import."""
    kind = type(value)
    return kind.__name__ == name and kind.__module__.startswith("torch.distributed.checkpoint.")


def check_planner(planner: SavePlanner | None, *, use_collectives: bool) -> None:
    """
    Raises:
        Unmapped: the planner's plan would differ from the sidecar's.
    """
    # enable_plan_caching is accepted: the executor caches plans anyway.
    if planner is not None and not (
        type(planner) is DefaultSavePlanner
        and planner.flatten_state_dict
        and planner.flatten_sharded_tensors
        and not planner.dedup_save_to_lowest_rank
    ):
        raise Unmapped(
            f"planner={type(planner).__qualname__}: the sidecar plans as DefaultSavePlanner does with its default flags;"
            " change the state dict before the call instead, and leave the planner out"
        )
    if not use_collectives:
        raise Unmapped(
            "use_collectives=False: Pillion saves without collectives, and still writes one whole checkpoint; leave it out"
        )


def check_checkpointer_type(kind: object) -> None:
    """
    Raises:
        UsageError: `kind` is not an AsyncCheckpointerType.
    """
    if not isinstance(kind, AsyncCheckpointerType):
        raise UsageError(f"async_checkpointer_type must be an AsyncCheckpointerType, not {kind!r}")


@dataclass(frozen=True, slots=True)
class Staging:
    """How an `async_stager` stages."""

    stager: AsyncStager | None = None
    """The user's own stager. It may change the state, so it is called and its result is saved. None for torch's stagers."""
    responds: bool = False
    """True if it stages beside the training. Then the caller waits for the end of the staging."""


def staging(stager: object) -> Staging:
    """
    Return how a stager stages. The options of torch's own stagers have no effect, as the state is copied into the arena anyway.

    Raises:
        UsageError: `stager` is not an AsyncStager.
    """
    if stager is None:
        return Staging()
    if _is_torchs(stager, "DefaultStager"):
        options = getattr(stager, "_config", None)
        return Staging(responds=bool(getattr(options, "use_async_staging", False)))
    if type(stager) in (BlockingAsyncStager, FileSystemWriter) or _is_torchs(stager, "FsspecWriter"):
        return Staging()
    if not isinstance(stager, AsyncStager):
        raise UsageError(f"async_stager must be an AsyncStager, not a {type(stager).__qualname__}")
    return Staging(stager)


def source(
    checkpoint_id: str | os.PathLike[str] | None, reader: StorageReader | None, planner: LoadPlanner | None
) -> tuple[str, bool]:
    """
    Return the directory of a load, and whether a value that the checkpoint lacks is an error.

    Raises:
        Unmapped: the reader or the planner is not torch's own, or the address is not a directory.
        UsageError: neither argument gives a directory.
    """
    if reader is not None and type(reader) is not FileSystemReader and not _is_torchs(reader, "FsspecReader"):
        raise Unmapped(f"a {type(reader).__qualname__} object cannot be sent to the sidecar")
    strict = True
    if planner is not None:
        if not (type(planner) is DefaultLoadPlanner and planner.flatten_state_dict and planner.flatten_sharded_tensors):
            raise Unmapped(f"planner={type(planner).__qualname__}: the sidecar plans as DefaultLoadPlanner does")
        strict = not planner.allow_partial_load
    where = os.fspath(checkpoint_id) if checkpoint_id is not None else ""
    where = where or os.fspath(getattr(reader, "path", ""))
    if not where:
        raise UsageError("checkpoint_id must be given when storage_reader is None")
    return directory(where, instead="a directory", buckets=reader is None), strict
