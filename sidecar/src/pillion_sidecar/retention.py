"""
Which committed checkpoints go. `choose` is pure; `remove` does it. Called from: the coordinator's executor, after a commit.

Never removed: the newest committed one, one that the policy keeps, one of a step ahead of the save just committed, one that a newer
attempt has written into.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from pillion.wire import names
from pillion.wire.policy import Retention
from pillion_sidecar import catalog, commit
from pillion_sidecar.storage import directio

_log = logging.getLogger(__name__)

REMOVED: Final = "removed"
"""Below names.INTERNAL_DIR: what is being removed."""


def choose(committed: Iterable[int], policy: Retention, *, current: int) -> list[int]:
    """The steps to remove, oldest first, after `current` was committed."""
    ordered = sorted(step for step in committed if step <= current)
    if policy.keep_last is None:
        return []
    keep = set(ordered[-policy.keep_last :]) | {current}
    if policy.keep_every_steps:
        keep |= {step for step in ordered if step % policy.keep_every_steps == 0}
    return [step for step in ordered if step not in keep]


def apply(root: str, policy: Retention, *, current: int, generation: int) -> list[int]:
    """
    Remove what the policy does not keep, and what failed saves before `current` left behind; the steps removed.

    One directory that cannot be removed does not stop the others: it is logged, and tried again after the next commit.

    Args:
        generation: of the attempt that does it; what a newer one has written stays.
    """
    found = catalog.steps(root)
    removed = choose((step for step, done in found.items() if done), policy, current=current)
    _remove_all(root, [*removed, *_leftovers(found, current)], generation)
    _sweep(root, generation)
    return removed


def make_room(root: str, policy: Retention, *, current: int, generation: int) -> list[int]:
    """
    On a full disk: remove before the commit of `current` what the policy removes after it, but for the newest committed one.
    """
    found = catalog.steps(root)
    committed = [step for step, done in found.items() if done]
    newest = max(committed, default=None)
    removed = [step for step in choose({*committed, current}, policy, current=current) if step != newest]
    _log.warning("storage is full: steps %s make room for step %d", removed, current)
    _remove_all(root, [*removed, *_leftovers(found, current)], generation)
    _sweep(root, generation)
    return removed


def _leftovers(found: Mapping[int, bool], current: int) -> list[int]:
    return [step for step, done in found.items() if not done and step < current]


def _remove_all(root: str, steps: Iterable[int], generation: int) -> None:
    for step in steps:
        try:
            remove(os.path.join(root, names.step_directory(step)), generation=generation)
        except OSError as err:
            _log.warning("retention: step %d stays for now: %s", step, err)


def remove(path: str, *, generation: int) -> None:
    """
    Remove one checkpoint: taken aside by one rename, looked at, and only then deleted.

    A checkpoint is so never half there; and one that a newer attempt has begun or made meanwhile is put back, by this process or, when it
    is killed in between, by whoever looks next (`put_back`).

    Raises:
        OSError: it stays, or what is left of it is nowhere that anybody looks.
    """
    folder = os.path.join(os.path.dirname(path), names.INTERNAL_DIR, REMOVED)
    os.makedirs(folder, exist_ok=True)
    aside = os.path.join(folder, f"{os.path.basename(path)}.{generation}.{secrets.token_hex(4)}")
    os.rename(path, aside)
    directio.fsync_directory(os.path.dirname(path))
    if newest_in(aside) > (generation,):
        _log.warning("%s is of a newer attempt: it stays", path)
        os.rename(aside, path)
        return
    shutil.rmtree(aside)


def put_back(root: str) -> list[int]:
    """
    Put back what an attempt that was killed meanwhile had taken aside from a newer one; the steps.

    Called from: the coordinator, before it looks for the newest checkpoint, and after each retention.
    """
    found = []
    for aside, step, remover in _aside(root):
        if newest_in(aside) > (remover,):
            with contextlib.suppress(OSError):
                os.rename(aside, os.path.join(root, names.step_directory(step)))
                found.append(step)
    return found


def _aside(root: str) -> Iterator[tuple[str, int, int]]:
    """(path, step, generation of who removes it) of everything that is aside."""
    folder = os.path.join(root, names.INTERNAL_DIR, REMOVED)
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            directory, _, rest = name.partition(".")
            step, remover = names.parse_step_directory(directory), rest.partition(".")[0]
            if step is not None and remover.isdecimal():
                yield os.path.join(folder, name), step, int(remover)


def newest_in(path: str) -> tuple[int, ...]:
    """The newest generation that has written into a directory, without the save's own number; empty: none of ours."""
    found: tuple[int, ...] = ()
    for name in os.listdir(path):
        data, part = names.parse_data_file(name), names.parse_part_file(name)
        text = data[2] if data is not None else part[1] if part is not None else None
        if text is not None:
            found = max(found, commit.generation_order(text)[:1])
    return found


def _sweep(root: str, generation: int) -> None:
    """What removals that were cut short left aside: put back, or deleted."""
    put_back(root)
    for aside, _, remover in _aside(root):
        if remover <= generation:
            shutil.rmtree(aside, ignore_errors=True)


def remove_older_files(path: str, generation: str) -> None:
    """In a directory that was written again: the files of the generations before, which nothing refers to any more."""
    ours = commit.generation_order(generation)
    for name in os.listdir(path):
        data, part = names.parse_data_file(name), names.parse_part_file(name)
        theirs = data[2] if data is not None else part[1] if part is not None else None
        stale_native = theirs is not None and commit.generation_order(theirs) < ours
        if stale_native or (data is None and name.startswith("__") and name.endswith(".distcp")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(path, name))
