"""
Which committed checkpoints go. `choose` is pure; `remove` does it. Called from: the coordinator's executor, after a commit.

Never removed: the newest committed one, one that the policy keeps, one of a step ahead of the save just committed.
`.metadata` goes first: a half-removed checkpoint is no checkpoint, and never a broken one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable

from pillion.wire import names
from pillion.wire.policy import Retention
from pillion_sidecar import catalog
from pillion_sidecar.storage import directio

_log = logging.getLogger(__name__)


def choose(committed: Iterable[int], policy: Retention, *, current: int) -> list[int]:
    """The steps to remove, oldest first, after `current` was committed."""
    ordered = sorted(step for step in committed if step <= current)
    if policy.keep_last is None:
        return []
    keep = set(ordered[-policy.keep_last :]) | {current}
    if policy.keep_every_steps:
        keep |= {step for step in ordered if step % policy.keep_every_steps == 0}
    return [step for step in ordered if step not in keep]


def apply(root: str, policy: Retention, *, current: int) -> list[int]:
    """
    Remove what the policy does not keep, and what failed saves before `current` left behind; the steps removed.

    One directory that cannot be removed does not stop the others: it is logged, and tried again after the next commit.
    """
    found = catalog.steps(root)
    removed = choose((step for step, done in found.items() if done), policy, current=current)
    leftovers = [step for step, done in found.items() if not done and step < current]
    for step in [*removed, *leftovers]:
        try:
            remove(os.path.join(root, names.step_directory(step)))
        except OSError as err:
            _log.warning("retention: step %d stays for now: %s", step, err)
    return removed


def remove(path: str) -> None:
    """Remove one checkpoint, the commit marker first."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(path, names.COMMIT_MARKER))
        directio.fsync_directory(path)
    shutil.rmtree(path)


def remove_older_files(path: str, generation: str) -> None:
    """In a directory that was written again: the files of the generations before, which nothing refers to any more."""
    for name in os.listdir(path):
        data, part = names.parse_data_file(name), names.parse_part_file(name)
        stale_native = (data is not None and data[2] != generation) or (part is not None and part[1] != generation)
        if stale_native or (data is None and name.startswith("__") and name.endswith(".distcp")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(path, name))
