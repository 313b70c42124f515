"""
Which committed checkpoints go. `line` and `choose` are pure; `tidy` does it, one file at a time. Called from: the coordinator's executor,
after a commit.

Never removed: the checkpoint that was committed last, one that the policy keeps, the one that a load has verified last, one of a step
ahead of the save just committed, one that a newer attempt has written into, and whatever Pillion did not write. A checkpoint that a load
of this job reads stays as well: the executor does one of the two at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from pillion.wire import manifest, names
from pillion.wire.policy import Retention
from pillion_sidecar.checkpoint import catalog, commit, milestones
from pillion_sidecar.storage import durable

_log = logging.getLogger(__name__)

REMOVED: Final = "removed"
"""Below names.INTERNAL_DIR: what is being removed."""
_TEMPORARY: Final = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}\.tmp")
"""What `durable.replace_file` calls a file for the time being."""
NAMED_STRANGERS: Final = 3
"""Files of others that a warning names."""


def line(committed: Mapping[int, commit.Order]) -> list[int]:
    """
    The steps that led to the checkpoint that was committed last, ascending. Pure.

    A checkpoint is off the line when one of its step or a smaller one was committed later: training went back behind it.
    """
    steps_on_line: list[int] = []
    for step in sorted(committed, key=lambda each: (committed[each], each), reverse=True):
        if not steps_on_line or step < steps_on_line[-1]:
            steps_on_line.append(step)
    return steps_on_line[::-1]


def choose(
    committed: Mapping[int, commit.Order], policy: Retention, *, current: int, keep: Iterable[int] = ()
) -> list[int]:
    """
    The steps to remove, ascending, after `current` was committed. Pure.

    The policy counts along the line. What a rollback has left behind stays until training has passed its step again.

    Args:
        keep: steps that stay whatever the policy says.
    """
    if policy.keep_last is None or not committed:
        return []
    ordered = [step for step in line(committed) if step <= current]
    kept = {*ordered[-policy.keep_last :], *keep, current, line(committed)[-1]}
    if policy.keep_every_steps:
        kept |= {step for step in ordered if step % policy.keep_every_steps == 0}
    return [step for step in sorted(committed) if step <= current and step not in kept]


def apply(root: str, policy: Retention, *, current: int, generation: int) -> list[int]:
    """`tidy`, to its end; the steps removed."""
    before = catalog.committed(root)
    for _ in tidy(root, policy, current=current, generation=generation):
        pass
    return sorted(before.keys() - catalog.committed(root).keys())


def tidy(root: str, policy: Retention, *, current: int, generation: int) -> Iterator[None]:
    """
    Remove what the policy does not keep, and what failed saves before `current` left behind. Yields after each file, so that the caller
    may leave it there: the next one begins with what is left.

    One directory that cannot be removed does not stop the others: it is logged, and tried again after the next commit.

    Args:
        generation: of the attempt that does it; what a newer one has written stays.
    """
    committed_by_step = catalog.steps(root)
    removed = choose(catalog.orders(root, committed_by_step), policy, current=current, keep=milestones.verified(root))
    yield from _remove_all(root, removed, _leftovers(committed_by_step, current), generation)


def make_room(root: str, policy: Retention, *, current: int, generation: int) -> Iterator[None]:
    """
    On a full disk: remove before the commit of `current` what the policy removes after it, but for what was committed last. Yields as
    `tidy`.
    """
    committed_by_step = catalog.steps(root)
    committed = catalog.orders(root, committed_by_step)
    newest = line(committed)[-1:]
    after = committed | {current: max([*committed.values(), commit.OLDEST])}
    removed = choose(after, policy, current=current, keep=[*newest, *milestones.verified(root)])
    _log.warning("storage is full: removing steps %s to make room for step %d", removed, current)
    yield from _remove_all(root, removed, _leftovers(committed_by_step, current), generation)


def _leftovers(committed_by_step: Mapping[int, bool], current: int) -> list[int]:
    """Of saves before `current` that were never committed."""
    return [step for step, done in committed_by_step.items() if not done and step < current]


def _remove_all(root: str, committed: Iterable[int], leftovers: Iterable[int], generation: int) -> Iterator[None]:
    for step in committed:
        if commit.newest_generation(root) > generation:
            return  # a newer attempt has begun: it decides
        try:
            yield from remove(os.path.join(root, names.step_directory(step)), generation=generation)
        except FileNotFoundError:
            pass  # somebody else has removed it meanwhile
        except OSError as err:
            _log.warning(
                "retention: step %d could not be removed, and is tried again after the next commit: %s", step, err
            )
    for step in leftovers:
        try:
            yield from _remove_files(os.path.join(root, names.step_directory(step)), generation)
        except OSError as err:
            _log.warning(
                "retention: files of the failed save of step %d could not be removed, and are tried again after the next commit: %s",
                step,
                err,
            )
    yield from _sweep(root, generation)


def remove(path: str, *, generation: int) -> Iterator[None]:
    """
    Remove one checkpoint: taken aside by one rename, looked at, and only then deleted, file by file. Yields as `tidy`.

    A checkpoint is so never half there; and one that a newer attempt has begun or made meanwhile is put back, by this process or, when it
    is killed in between, by the next one that looks (`put_back`). Files that Pillion did not write are put back alone.

    Raises:
        OSError: it stays, or what is left of it is nowhere that anybody looks.
    """
    if commit.committed_as(path) is None or os.path.islink(path):
        _log_once(path, "holds a checkpoint that Pillion did not write, or is a link: it stays")
        return
    folder = os.path.join(os.path.dirname(path), names.INTERNAL_DIR, REMOVED)
    os.makedirs(folder, exist_ok=True)
    aside = os.path.join(folder, f"{os.path.basename(path)}.{generation}.{secrets.token_hex(4)}")
    os.rename(path, aside)
    durable.fsync_directory(os.path.dirname(path))
    if newest_in(aside) > (generation,):
        _log.warning("%s was written by a newer attempt: it is kept", path)
        os.rename(aside, path)
        return
    yield
    yield from _delete(aside, path)


def _delete(aside: str, path: str) -> Iterator[None]:
    """Delete what Pillion wrote of a directory that is aside; put the rest back to where it was."""
    strangers = []
    for name in sorted(os.listdir(aside)):
        if is_ours(aside, name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(aside, name))
            yield
        else:
            strangers.append(name)
    if strangers:
        _log_once(path, f"keeps what Pillion did not write ({', '.join(strangers[:NAMED_STRANGERS])})")
        os.makedirs(path, exist_ok=True)
        for name in strangers:
            if not os.path.lexists(os.path.join(path, name)):
                os.rename(os.path.join(aside, name), os.path.join(path, name))
    # What came back meanwhile under the same name stays aside.
    with contextlib.suppress(OSError):
        os.rmdir(aside)
    yield


def _remove_files(path: str, generation: int) -> Iterator[None]:
    """Of a save that was never committed: what attempts up to this one have written. The directory goes when nothing else is in it."""
    ours = [name for name in os.listdir(path) if is_ours(path, name)]
    if not ours or newest_in(path) > (generation,):
        return
    for name in ours:
        os.unlink(os.path.join(path, name))
        yield
    with contextlib.suppress(OSError):
        os.rmdir(path)


def note_written(root: str, step: int, generation: str) -> None:
    """
    Write down which files a `StorageWriter` by name has left of a step: only these are removed later.

    Raises:
        OSError.
    """
    files = sorted(os.listdir(os.path.join(root, names.step_directory(step))))
    text = json.dumps({"generation": generation, "files": files})
    os.makedirs(os.path.dirname(milestones.written_record(root, step)), exist_ok=True)
    durable.replace_file(milestones.written_record(root, step), text.encode())


def remove_written(root: str, step: int) -> Iterator[None]:
    """Remove what `note_written` has noted of a step. Yields as `tidy`. Raises: OSError."""
    path = os.path.join(root, names.step_directory(step))
    noted = milestones.written(root, step)
    if noted is None:
        _log_once(path, "holds a checkpoint that Pillion did not write: it stays")
        return
    # The marker first: what is half removed is no checkpoint any more.
    for name in sorted(noted[1]):
        target = os.path.join(path, name)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(target) if os.path.isdir(target) else os.unlink(target)
        yield
    with contextlib.suppress(OSError):
        os.rmdir(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(milestones.written_record(root, step))


def is_ours(path: str, name: str) -> bool:
    """Whether Pillion wrote this file of a directory that it has committed, or begun: no other program gives a file such a name."""
    if name == names.OLD_MANIFEST:
        with open(os.path.join(path, name), "rb") as file:
            return manifest.is_manifest(file.read())
    return (
        name in (names.MANIFEST, names.COMMIT_MARKER)
        or names.parse_data_file(name) is not None
        or names.parse_part_file(name) is not None
        or commit.laid_down_by(name) is not None
        or _TEMPORARY.fullmatch(name) is not None
    )


def put_back(root: str) -> list[int]:
    """
    Put back what an attempt that was killed meanwhile had taken aside from a newer one; the steps.

    Called from: the coordinator, before it looks for the newest checkpoint, and after each retention.
    """
    steps = []
    for aside, step, remover in _aside(root):
        if newest_in(aside) > (remover,):
            with contextlib.suppress(OSError):
                os.rename(aside, os.path.join(root, names.step_directory(step)))
                steps.append(step)
    return steps


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
    newest: tuple[int, ...] = ()
    for name in os.listdir(path):
        text = _generation_in(name)
        if text is not None:
            newest = max(newest, commit.generation_order(text)[:1])
    return newest


def _sweep(root: str, generation: int) -> Iterator[None]:
    """What removals that were cut short left aside: put back, or deleted."""
    put_back(root)
    for aside, step, remover in _aside(root):
        if remover <= generation:
            with contextlib.suppress(OSError):
                yield from _delete(aside, os.path.join(root, names.step_directory(step)))


def remove_older_files(path: str, generation: str) -> None:
    """In a directory that was written again: the files of Pillion's saves before, which nothing refers to any more."""
    ours = commit.generation_order(generation)
    for name in os.listdir(path):
        theirs = _generation_in(name)
        older = theirs is not None and commit.generation_order(theirs) < ours
        if older or (name == names.OLD_MANIFEST and is_ours(path, name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(path, name))


def _generation_in(name: str) -> str | None:
    """The generation in the name of a data or part file."""
    data, part = names.parse_data_file(name), names.parse_part_file(name)
    return data[2] if data is not None else part[1] if part is not None else None


_logged: set[str] = set()
"""Directories that were named in a warning: it is said once in a process."""
LOGGED_MOST: Final = 1024
"""Of these; more are said again."""


def _log_once(path: str, what: str) -> None:
    if path not in _logged:
        if len(_logged) >= LOGGED_MOST:
            _logged.clear()
        _logged.add(path)
        _log.warning("%s %s", path, what)
