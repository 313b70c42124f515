"""
Which destinations a trainer in a pod may name: the directories for its saves and loads, and the writer. Pure.

Called from: `supervisor.staging`, for a claim with a destination; `supervisor.loader`, for a load of a directory. In a pod, the sidecar has
more rights than the trainer: the storage of all jobs of the claim, credentials, a token. So a trainer's message may neither choose the code
that runs in the sidecar nor name another job's directory. Without a cluster, both are processes of one user, and nothing is refused.
"""

from __future__ import annotations

import os

from pillion.errors import UsageError
from pillion.wire import names, policy
from pillion.wire.save_messages import Destination


def check(destination: Destination, *, root: str, writer: policy.Writer | None) -> None:
    """
    Refuse a destination of a save outside the job's root, or with another writer than the policy's.

    Args:
        destination: the destination that a claim names: path and writer.
        root: the directory of this job's checkpoints.
        writer: the policy's writer. None: Pillion's own.

    Raises:
        UsageError: the destination is refused. The text has the allowed ones.
    """
    named = destination.writer
    own = None if writer is None else (writer.name, dict(writer.arguments))
    if named is not None and (named.name, dict(named.arguments)) != own:
        allowed = "none" if writer is None else f"{writer.name} with the policy's arguments"
        raise UsageError(
            f"the writer {named.name!r} is not the policy's: in a pod the policy's storage.writer says what runs in the"
            f" sidecar (here: {allowed})"
        )
    path = destination.path
    if path is not None and not _is_below(path, root):
        raise UsageError(
            f"{path} is not below {root}: in a pod a checkpoint goes into the job's own directory, which {names.ENV_ROOT} names"
        )


def check_source(path: str, *, root: str, below: bool = False, source: policy.RestoreFrom | None = None) -> None:
    """
    Refuse a load from a directory outside the job's root, and outside that of the job which the policy's `restore.from` names.

    Args:
        path: the directory that the load names.
        root: the directory of this job's checkpoints.
        below: whether the load may name a root itself.
        source: the policy's `restore.from`.

    Raises:
        UsageError: the directory is refused. The text has the allowed ones.
    """
    other = "" if source is None else names.beside(root, source.job)
    for allowed in filter(None, (root, other)):
        if _is_below(path, allowed) or (below and path == allowed):
            return
    job = (
        f"or from {other}, as the policy's restore.from says"
        if other
        else "or of another job that the policy's restore.from names"
    )
    raise UsageError(
        f"{path} is not below {root}: in a pod a checkpoint is read from the job's own directory, which {names.ENV_ROOT} names, {job}"
    )


def _is_below(path: str, root: str) -> bool:
    if "://" in root or "://" in path:
        folders = path.removeprefix(f"{root}/").split("/") if path.startswith(f"{root}/") else [""]
        return not {"", ".", ".."} & set(folders) and folders[0] != names.INTERNAL_DIR
    if not os.path.isabs(path):
        return False
    below_root = os.path.relpath(os.path.normpath(path), os.path.normpath(root)).split(os.sep)
    return below_root[0] not in (os.pardir, os.curdir, names.INTERNAL_DIR)
