"""
Pillion takes checkpointing out of a PyTorch training process.

This module has the public names and nothing else. `pillion.dcp` has the signatures of `torch.distributed.checkpoint`.

`Checkpointer` is imported at its first use. The sidecar and the operator import `pillion.wire` and must run without torch,
which would cost them 3 s and 300 MB.
"""

from typing import TYPE_CHECKING, Any

from pillion.errors import (
    ArenaExhausted,
    BarrierTimeout,
    CommitError,
    CorruptCheckpoint,
    IncompatibleCheckpoint,
    InternalError,
    LoadError,
    NoCheckpoint,
    PersistError,
    PillionError,
    ProtocolMismatch,
    RemoteFailure,
    SaveError,
    SaveSkipped,
    SettingsError,
    SidecarError,
    SidecarUnavailable,
    StagingError,
    UnsupportedLeaf,
    UsageError,
)
from pillion.handle import Checkpoint, Found, LoadReport, SaveHandle

if TYPE_CHECKING:
    from pillion.checkpointer import Checkpointer

__all__ = [
    "ArenaExhausted",
    "BarrierTimeout",
    "Checkpoint",
    "Checkpointer",
    "CommitError",
    "CorruptCheckpoint",
    "Found",
    "IncompatibleCheckpoint",
    "InternalError",
    "LoadError",
    "LoadReport",
    "NoCheckpoint",
    "PersistError",
    "PillionError",
    "ProtocolMismatch",
    "RemoteFailure",
    "SaveError",
    "SaveHandle",
    "SaveSkipped",
    "SettingsError",
    "SidecarError",
    "SidecarUnavailable",
    "StagingError",
    "UnsupportedLeaf",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name == "Checkpointer":
        from pillion import checkpointer

        return checkpointer.Checkpointer
    raise AttributeError(f"module 'pillion' has no attribute {name!r}")
