"""
The choice within a directory that a load names: the checkpoint in it, or one of those in the root of a run.

Called from: `executor.load.choose`, in the pod of rank 0. The directory may be another run's, which may train at this moment. So nothing in
a root changes by the choice: no interrupted save is finished, and what another run has taken aside stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pillion.errors import CorruptCheckpoint, NoCheckpoint, UsageError
from pillion.wire import manifest, names
from pillion.wire.load_messages import Tier
from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.executor.load.request import Request
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import reading
from pillion_sidecar.storage.folder import Folder

UNNAMED_STEP: Final = 0
"""Step of a checkpoint that says none: neither its directory's name nor a manifest has it (stock DCP)."""
STEPS_SHOWN: Final = 20
"""Maximum steps of another run that the text of an error lists."""


def choose(context: Context, request: Request, path: str, refused: Mapping[str, str]) -> dict[str, Any]:
    """
    Return the part of the choice's document that names the checkpoint.

    Raises:
        NoCheckpoint: nothing is committed there.
        CorruptCheckpoint: every checkpoint that counts was refused before.
        UsageError: the directory is one checkpoint, and the request names a step as well.
        OSError: the directory cannot be listed.
    """
    context.watch.storage(f"look at {path}")
    folder = context.open_folder(path)
    if not request.below:
        return _only(folder, path, refused, finishes=True)
    if reading.retried(folder, lambda: _is_committed(folder)):
        if request.step is not None:
            raise UsageError(
                f"{path} is one checkpoint, so step={request.step} cannot choose in it: leave step out, or name the run's root"
            )
        return _only(folder, path, refused, finishes=False)
    return _in_root(folder, request.step, refused)


def of_another_job(context: Context, request: Request, refused: Mapping[str, str]) -> dict[str, Any] | None:
    """
    Choose the checkpoint with which the policy's `restore.from` lets a job begin that has none of its own. None: the policy names no job.

    Raises: as `choose`. A job without a checkpoint is never a fresh start of this one.
    """
    source, root = context.restore.source, context.root
    if source is None or root is None:
        return None
    path = names.beside(str(root), source.job)
    if path == str(root):
        return None  # the policy of several jobs names this one: it has nothing to begin from
    context.watch.storage(f"look at {path}")
    try:
        chosen = _in_root(context.open_folder(path), source.step, refused)
    except NoCheckpoint as err:
        raise NoCheckpoint(
            f"this job has no checkpoint of its own, and restore.from names the job {source.job!r}: {err}"
        ) from err
    return chosen | {"elsewhere": True}


def own_steps(context: Context, request: Request, path: str) -> set[int]:
    """
    Return the steps of this run, committed or in memory, if the request is for another run's checkpoint. The load does not take them.

    Raises:
        OSError: the root cannot be listed.
    """
    root = context.root
    if root is None or not request.below or request.find or request.whole or f"{path}/".startswith(f"{root}/"):
        return set()
    context.watch.storage(f"list {root}")
    committed = {step for step, done in reading.retried(root, lambda: catalog.steps(root)).items() if done}
    return committed | request.arena.keys()


def _is_committed(folder: Folder) -> bool:
    try:
        return commit.is_committed(folder)
    except NotADirectoryError:
        return False


def _only(folder: Folder, path: str, refused: Mapping[str, str], *, finishes: bool) -> dict[str, Any]:
    """Choose the checkpoint in the folder itself."""

    def committed() -> bool:
        try:
            # A save that was interrupted between its last part and its commit is finished first, as in a listing of the root.
            return commit.is_committed(folder) or (finishes and commit.finish(folder) is not None)
        except NotADirectoryError:
            return False

    step = UNNAMED_STEP if finishes else _step_of(folder)
    if (why := refused.get(f"{Tier.STORAGE}:{step}")) is not None:
        raise CorruptCheckpoint(f"the checkpoint in {path} is corrupt: {why}", reasons={path: why})
    if not reading.retried(folder, committed):
        raise NoCheckpoint(f"there is no checkpoint in {path}: it has no {names.COMMIT_MARKER}")
    return _chosen(folder, path, step)


def _step_of(folder: Folder) -> int:
    """Return the step of a checkpoint, as its directory's name or its manifest says."""
    named = names.parse_step_directory(folder.name)
    if named is not None:
        return named
    try:
        return manifest.decode_manifest(reading.retried(folder, lambda: commit.read_manifest(folder))).step
    except (FileNotFoundError, manifest.ManifestError):
        return UNNAMED_STEP


def _in_root(root: Folder, step: int | None, refused: Mapping[str, str]) -> dict[str, Any]:
    """Choose the checkpoint of a step in the root of a run, or the one that was committed last."""
    committed = reading.retried(root, lambda: _committed(root))
    usable = {each: order for each, order in committed.items() if f"{Tier.STORAGE}:{each}" not in refused}
    candidates = [each for each in usable if step in (None, each)]
    if candidates:
        newest = max(candidates, key=lambda each: (usable[each], each))
        chosen = catalog.step_folder(root, newest)
        return _chosen(chosen, str(chosen), newest)
    if refused:
        raise CorruptCheckpoint(
            f"every checkpoint of {root} that could be used is corrupt: "
            + "; ".join(f"{where}: {why}" for where, why in refused.items()),
            reasons=refused,
        )
    if not committed:
        raise NoCheckpoint(
            f"there is no checkpoint in {root}: neither does it have a {names.COMMIT_MARKER} itself, nor has a directory"
            f" {names.STEP_PREFIX}N below it one"
        )
    shown = sorted(committed)[-STEPS_SHOWN:]
    raise NoCheckpoint(f"there is no checkpoint of step {step} in {root}; the newest of {len(committed)} are {shown}")


def _committed(root: Folder) -> Mapping[int, tuple[int, int]]:
    try:
        return catalog.committed(root)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _chosen(folder: Folder, path: str, step: int) -> dict[str, Any]:
    return {"step": step, "tier": Tier.STORAGE, "path": path, "remarks": catalog.remarks(folder).to_document()}
