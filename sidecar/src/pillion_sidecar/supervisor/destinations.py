"""
The whole of: where a trainer in a pod may have a save of its own written, and by what, and what it may have read. Pure.

Called from: `supervisor.staging`, at a claim that names a destination; `supervisor.loader`, at a load that names a directory. In a pod the sidecar holds what the trainer does not: the storage of all jobs
of the claim, credentials, a token. So a message decides neither what code runs here nor which job's directory is written. Without a
cluster both are processes of one user, and nothing is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pillion.errors import UsageError
from pillion.wire import names, policy


def check(destination: Mapping[str, Any], *, root: str, writer: policy.Writer | None) -> None:
    """
    Args:
        destination: of a claim.
        root: the directory of this job's checkpoints.
        writer: the policy's own.

    Raises:
        UsageError: says what is allowed.
    """
    named = destination.get("writer")
    if named is not None:
        own = None if writer is None else {"name": writer.name, "arguments": dict(writer.arguments)}
        theirs = {"name": named.get("name"), "arguments": dict(named.get("arguments") or {})}
        if theirs != own:
            allowed = "none" if writer is None else f"{writer.name} with the policy's arguments"
            raise UsageError(
                f"the writer {theirs['name']!r} is not the policy's: in a pod the policy's storage.writer says what runs in the"
                f" sidecar (here: {allowed})"
            )
    path = destination.get("path")
    if path is not None and not _is_below(str(path), root):
        raise UsageError(
            f"{path} is not below {root}: in a pod a checkpoint goes into the job's own directory, which {names.ENV_ROOT} names"
        )


def check_source(path: str, *, root: str) -> None:
    """
    Args:
        path: of a load that names a directory.
        root: the directory of this job's checkpoints.

    Raises:
        UsageError: says what is allowed.
    """
    if not _is_below(path, root):
        raise UsageError(
            f"{path} is not below {root}: in a pod a checkpoint is read from the job's own directory, which {names.ENV_ROOT} names"
        )


def _is_below(path: str, root: str) -> bool:
    if "://" in path or not os.path.isabs(path):
        return False
    beneath = os.path.relpath(os.path.normpath(path), os.path.normpath(root)).split(os.sep)
    return beneath[0] not in (os.pardir, os.curdir, names.INTERNAL_DIR)
