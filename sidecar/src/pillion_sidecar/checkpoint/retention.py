"""
Retention: which committed checkpoints are removed. `line` and `choose` are pure. `tidy` removes them, one file at a time.

Called from: the coordinator's executor, after a commit.

Retention never removes these checkpoints:

- the one that was committed last, and the one that a load has verified last
- those that the policy keeps
- pinned ones (`checkpoint.pins`)
- those of a step ahead of the save that was just committed
- one that a newer attempt has written into
- anything that Pillion did not write
- one that a load of this job reads: the executor never loads and removes at the same time
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from pillion.wire import manifest, names
from pillion.wire.policy import Best, KeepBest, Retention
from pillion_sidecar.checkpoint import catalog, commit, facts, milestones, pins, quota
from pillion_sidecar.storage import generation as generations
from pillion_sidecar.storage import temporary_names
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.local import LocalFolder

_log = logging.getLogger(__name__)

DELETED_AT_ONCE: Final = 200
"""(a bucket) Maximum of files that one call removes. S3 takes 1,000 in one request; where each file is a request, 10 are under way at a time."""
NO_VALUES: Final[Mapping[int, float]] = {}
NO_SIZES: Final[Mapping[int, int]] = {}
NAMED_STRANGERS: Final = 3
"""Maximum of files of other programs that a warning names."""


def line(committed: Mapping[int, generations.Order]) -> list[int]:
    """
    Return the steps that led to the last committed checkpoint, ascending. Pure.

    A step is off the line if the same or a smaller step was committed later: training went back behind it.
    """
    steps_on_line: list[int] = []
    for step in sorted(committed, key=lambda each: (committed[each], each), reverse=True):
        if not steps_on_line or step < steps_on_line[-1]:
            steps_on_line.append(step)
    return steps_on_line[::-1]


def best(values: Mapping[int, float], policy: KeepBest) -> list[int]:
    """
    Return the steps of the best values, at most as many as the policy keeps. Pure.

    NaN is no value. Of equal values the larger step is better.
    """
    sign = 1.0 if policy.mode is Best.MAX else -1.0
    ranked = sorted((sign * value, step) for step, value in values.items() if not math.isnan(value))
    return [step for _, step in ranked[-policy.count :]]


def choose(
    committed: Mapping[int, generations.Order],
    policy: Retention,
    *,
    current: int,
    keep: Iterable[int] = (),
    values: Mapping[int, float] = NO_VALUES,
    ages_s: Mapping[int, float] = NO_VALUES,
    sizes: Mapping[int, int] = NO_SIZES,
) -> list[int]:
    """
    Return the steps to remove after the commit of `current`, ascending. Pure.

    The policy counts along the line. Checkpoints that a rollback has left behind stay until training has passed their steps again.
    Age and quota come last, and remove also what the other fields keep.

    Args:
        keep: steps that stay whatever the policy says.
        values: committed step -> value of the metric of `keep_best`, where its save has one.
        ages_s: committed step -> seconds from its commit to the newest commit, where they are known.
        sizes: committed step -> bytes, where they are known.
    """
    if not policy.removes or not committed:
        return []
    on_line = line(committed)
    ordered = [step for step in on_line if step <= current]
    bests: list[int] = []
    if policy.keep_best is not None:
        bests = best({step: values[step] for step in ordered if step in values}, policy.keep_best)
    must_stay = {*keep, current, on_line[-1], *(step for step in committed if step > current)}
    kept = set(committed)
    if policy.keep_last is not None:
        every = policy.keep_every_steps
        multiples = {step for step in ordered if step % every == 0} if every else set()
        kept &= {*ordered[-policy.keep_last :], *multiples, *bests, *must_stay}
    if policy.max_age_seconds is not None:
        kept -= {step for step in kept - must_stay if ages_s.get(step, 0.0) > policy.max_age_seconds}
    if policy.max_bytes is not None:
        # What a rollback has left goes first, then the oldest; the best goes last.
        ranks = {step: rank for rank, step in enumerate(bests, 1)}
        going = sorted(kept - must_stay, key=lambda step: (ranks.get(step, 0), step in on_line, committed[step], step))
        kept -= quota.beyond(going, kept, sizes, policy.max_bytes)
    return sorted(committed.keys() - kept)


def judge(known: Mapping[int, facts.Facts], policy: Retention, *, current: int, keep: Iterable[int] = ()) -> list[int]:
    """Return the same as `choose`, from the facts of the committed steps. Pure."""
    committed = facts.orders(known)
    metric = None if policy.keep_best is None else policy.keep_best.metric
    return choose(
        committed,
        policy,
        current=current,
        keep=keep,
        values=facts.values(known, metric),
        ages_s=facts.ages_s(known, line(committed)[-1]) if committed else {},
        sizes=facts.sizes(known),
    )


def _over_quota(
    known: Mapping[int, facts.Facts], policy: Retention, removed: Iterable[int], current: int, keep: Iterable[int]
) -> str:
    """Return why the checkpoints that stay have more bytes than the policy allows; empty: they have not. Pure."""
    kept = known.keys() - set(removed)
    why = dict.fromkeys(keep, "pinned or verified by a load")
    why |= {step: "ahead of the newest" for step in kept if step > current}
    why |= dict.fromkeys(line(facts.orders(known))[-1:], "the newest")
    return quota.problem(kept, facts.sizes(known), why, policy.max_bytes)


def apply(root: Folder, policy: Retention, *, current: int, generation: int) -> list[int]:
    """Run `tidy` to its end. Return the removed steps."""
    before = catalog.committed(root)
    for _ in tidy(root, policy, current=current, generation=generation):
        pass
    return sorted(before.keys() - catalog.committed(root).keys())


def tidy(
    root: Folder, policy: Retention, *, current: int, generation: int, known: facts.Known | None = None
) -> Iterator[None]:
    """
    Remove the checkpoints that the policy does not keep, and the files of failed saves before `current`.

    Yields after each file, in a bucket after each call of `delete`. The caller may stop at any of them: the next call removes the rest. A directory that cannot be removed does not stop
    the others. It is logged, and tried again after the next commit.

    Args:
        generation: generation of the attempt that removes. Files of a newer attempt stay.
        known: what earlier calls have seen. This call adds its own. Manifests are read once. If the policy has no `keep_last`, known steps are
            not looked at again, so that their number costs no requests.
    """
    known = facts.Known() if known is None else known
    committed_by_step = catalog.steps(root, known.steps if policy.keep_last is None else ())
    known.steps.update(step for step, done in committed_by_step.items() if done)
    removed: list[int] = []
    known.over_quota = ""
    if policy.removes:
        read = known.read(root, (step for step, done in committed_by_step.items() if done))
        keep: set[int] = set()
        # Pins only keep more. They cost requests, so they are read if there is something to remove.
        if judge(read, policy, current=current):
            keep = kept_whatever_the_policy(root)
            removed = judge(read, policy, current=current, keep=keep)
        known.over_quota = _over_quota(read, policy, removed, current, keep)
    known.forget(*removed)
    yield from _remove_all(root, removed, _leftovers(root, committed_by_step, current), generation)


def kept_whatever_the_policy(root: Folder) -> set[int]:
    """Return the pinned steps, and the one that a load has verified last. Raises: OSError: it is not known which steps are pinned."""
    return {*pins.pinned(root), *milestones.verified(root)}


def make_room(root: Folder, policy: Retention, *, current: int, generation: int) -> Iterator[None]:
    """
    Make room on a full disk: remove before the commit of `current` what `tidy` would remove after it. The last committed checkpoint stays.

    Yields as `tidy`.
    """
    committed_by_step = catalog.steps(root)
    read = facts.Known().read(root, (step for step, done in committed_by_step.items() if done))
    committed = facts.orders(read)
    newest = line(committed)[-1:]
    # The save is as large as the newest checkpoint, as far as anybody knows.
    like_newest = read[newest[0]] if newest else facts.Facts()
    order = max([*committed.values(), generations.OLDEST])
    text = generations.text(order[0], generations.save_number(order[1], rescued=True))
    after = {**read, current: dataclasses.replace(like_newest, generation=text)}
    keep = [*newest, *kept_whatever_the_policy(root)]
    removed = judge(after, policy, current=current, keep=keep)
    _log.warning("storage is full: removing steps %s to make room for step %d", removed, current)
    yield from _remove_all(root, removed, _leftovers(root, committed_by_step, current), generation)


def _leftovers(root: Folder, committed_by_step: Mapping[int, bool], current: int) -> list[int]:
    """
    Return the steps before `current` that have files of saves without a commit.

    A pinned step is none of them. In a bucket it may be a checkpoint that a killed process had made invisible, and that the next load commits again.
    """
    leftovers = [step for step, done in committed_by_step.items() if not done and step < current]
    pinned = pins.pinned(root) if leftovers else {}
    return [step for step in leftovers if step not in pinned]


def _remove_all(root: Folder, committed: Iterable[int], leftovers: Iterable[int], generation: int) -> Iterator[None]:
    for step in committed:
        if commit.newest_generation(root) > generation:
            return  # a newer attempt has begun, and its own retention decides

        def is_pinned(step: int = step) -> bool:
            return step in pins.pinned(root)

        try:
            yield from remove(catalog.step_folder(root, step), generation=generation, is_pinned=is_pinned)
        except FileNotFoundError:
            pass  # another process has removed it in the meantime
        except OSError as err:
            _log.warning(
                "retention: step %d could not be removed, and is tried again after the next commit: %s", step, err
            )
    for step in leftovers:
        try:
            yield from _remove_files(catalog.step_folder(root, step), generation)
        except OSError as err:
            _log.warning(
                "retention: files of the failed save of step %d could not be removed, and are tried again after the next commit: %s",
                step,
                err,
            )
    yield from _sweep(root, generation)


def remove_step(root: Folder, step: int, *, generation: int) -> Iterator[None]:
    """
    Remove one step, committed or not, unless it is pinned or a newer attempt has written there. Yields as `tidy`. Raises: OSError.

    Called from: `pillion prune`.
    """
    folder = catalog.step_folder(root, step)
    if commit.is_committed(folder):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it in the meantime
            yield from remove(folder, generation=generation, is_pinned=lambda: step in pins.pinned(root))
    elif step not in pins.pinned(root):
        yield from _remove_files(folder, generation)


def is_written_again(folder: Folder) -> bool:
    """Whether a committed checkpoint's folder has files of a newer save, which is not committed yet. Raises: OSError."""
    committed = commit.committed_as(folder)
    if committed is None:
        return False
    texts = {generations.in_file_name(name) for name in folder.files()} - {None}
    return any(generations.order(text) > generations.order(committed) for text in texts if text is not None)


def remove(folder: Folder, *, generation: int, is_pinned: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """
    Remove one checkpoint. It becomes invisible in one step, is checked, and is then deleted file by file. Yields as `tidy`.

    So no loader ever sees half a checkpoint. If a newer attempt has written into the folder in the meantime, the checkpoint is put back. If this
    process is killed before that, the next process puts it back (`put_back`). Files that Pillion did not write are put back too.

    Args:
        is_pinned: whether the step is pinned now. A checkpoint that is pinned while it becomes invisible is put back too.

    Raises:
        OSError: the checkpoint stays, or the rest of it is in a place where no loader looks.
    """
    if commit.committed_as(folder) is None or folder.obstacle():
        _log_once(folder, "holds a checkpoint that Pillion did not write, or is a link: it stays")
        return
    if is_pinned():
        return
    aside = folder.take_down(by=generation, generation_of=commit.generation_of, marker=names.COMMIT_MARKER)
    listed = () if aside is None else tuple(aside.files())
    if aside is not None and _newest_of(listed) > (generation,):
        aside.put_up()
        aside = None
    if aside is None:
        _log.warning("%s was written by a newer attempt: it is kept", folder)
        return
    try:
        pinned_meanwhile = is_pinned()
    except OSError:
        aside.put_up()
        raise
    if pinned_meanwhile:
        aside.put_up()
        return
    yield
    yield from _delete(aside, listed, folder, generation)


def _delete(aside: Folder, listed: Iterable[str], origin: Folder, generation: int) -> Iterator[None]:
    """Delete the files that attempts up to `generation` wrote in a folder that was taken down. Put all other files back to `origin`."""
    # Parts go first: without one of them no process can commit the rest again. The manifest goes last, because a newer attempt's manifest may
    # appear meanwhile in a bucket, where the folder cannot be moved.
    for _, group in itertools.groupby(sorted(listed, key=_removal_rank), lambda name: _removal_rank(name)[0]):
        own_files = []
        for name in group:
            newer = (commit.committed_as(aside) if name == names.MANIFEST else generations.in_file_name(name)) or ""
            if is_ours(aside, name) and generations.order(newer)[0] <= generation:
                own_files.append(name)
        yield from _delete_files(aside, own_files)
    strangers = aside.give_back()
    if strangers:
        _log_once(origin, f"keeps what Pillion did not write ({', '.join(strangers[:NAMED_STRANGERS])})")
    # A file stays aside if a file with its name has appeared in `origin` in the meantime.
    aside.remove_if_empty()
    yield


def _delete_files(folder: Folder, files: Sequence[str]) -> Iterator[None]:
    """Remove files: each by itself in a directory, many by one call in a bucket. Yields after each call."""
    at_once = 1 if folder.object_bytes is None else DELETED_AT_ONCE
    for start in range(0, len(files), at_once):
        folder.delete(files[start : start + at_once])
        yield


def _removal_rank(name: str) -> tuple[int, str]:
    return (0 if names.parse_part_file(name) else 2 if name == names.MANIFEST else 1), name


def _remove_files(folder: Folder, generation: int) -> Iterator[None]:
    """Remove the files of a save that was never committed, if no newer attempt has written there. Remove the folder if it is then empty."""
    listed = folder.files()
    own_files = [name for name in listed if is_ours(folder, name)]
    if not own_files or _newest_of(listed) > (generation,):
        return
    yield from _delete_files(folder, own_files)
    folder.remove_if_empty()


def remove_written(root: LocalFolder, step: int) -> Iterator[None]:
    """Remove the files of a step that `milestones.note_written` has noted. Yields as `tidy`. Raises: OSError."""
    folder = root.below(names.step_directory(step))
    noted = milestones.written(root, step)
    if noted is None:
        _log_once(folder, "holds a checkpoint that Pillion did not write: it stays")
        return
    # The marker goes first, so that the rest is no checkpoint any more.
    for name in sorted(noted[1]):
        folder.delete_whole(name)
        yield
    folder.remove_if_empty()
    milestones.forget_written(root, step)


def is_ours(folder: Folder, name: str) -> bool:
    """
    Whether Pillion wrote this file, in a folder where Pillion has begun or committed a save.

    No other program gives such names to files.
    """
    if name == names.OLD_MANIFEST:
        return manifest.is_manifest(folder.read(name))
    return (
        name in (names.MANIFEST, names.COMMIT_MARKER)
        or names.parse_data_file(name) is not None
        or names.parse_part_file(name) is not None
        or temporary_names.is_temporary(name)
    )


def put_back(root: Folder) -> list[int]:
    """
    Put back the folders that a killed attempt had taken aside, if a newer attempt has written into them, or if they are pinned and whole.

    Return the steps.

    Called from: the coordinator, before it looks for the newest checkpoint, and after each retention.
    """
    steps = []
    for aside, origin, remover in root.taken_down():
        step = names.parse_step_directory(origin.name)
        if step is not None and (newest_in(aside) > (remover,) or (step in pins.pinned(root) and _is_whole(aside))):
            with contextlib.suppress(OSError):
                aside.put_up()
                steps.append(step)
    return steps


def _is_whole(aside: Folder) -> bool:
    """Whether the removal of a folder has not deleted anything yet: it deletes the parts first."""
    try:
        parts = manifest.decode_manifest(commit.read_manifest(aside)).parts
    except (FileNotFoundError, manifest.ManifestError):
        return False
    return {names.COMMIT_MARKER, *(part.name for part in parts)} <= aside.files().keys()


def newest_in(folder: Folder) -> tuple[int, ...]:
    """Return the newest generation that has written into a folder, without the number of the save. Empty: no save of Pillion has."""
    return _newest_of(folder.files())


def _newest_of(listed: Iterable[str]) -> tuple[int, ...]:
    newest: tuple[int, ...] = ()
    for name in listed:
        text = generations.in_file_name(name)
        if text is not None:
            newest = max(newest, generations.order(text)[:1])
    return newest


def _sweep(root: Folder, generation: int) -> Iterator[None]:
    """Finish removals that were interrupted: put back, or delete, the folders that they have left aside."""
    put_back(root)
    for aside, origin, remover in root.taken_down():
        if remover <= generation:
            with contextlib.suppress(OSError):
                yield from _delete(aside, aside.files(), origin, remover)


def remove_older_files(folder: Folder, generation: str) -> None:
    """Remove the files of Pillion's older saves from a folder that was written again. No checkpoint refers to them any more."""
    own_order = generations.order(generation)
    older = []
    for name in folder.files():
        text = generations.in_file_name(name)
        if (text is not None and generations.order(text) < own_order) or (
            name == names.OLD_MANIFEST and is_ours(folder, name)
        ):
            older.append(name)
    folder.delete(older)


_logged: set[str] = set()
"""Folders that a warning has named. A process warns about each only once."""
MAX_LOGGED: Final = 1024
"""Maximum of entries in `_logged`. When it is full it is emptied, and a folder may be named again."""


def _log_once(folder: Folder, what: str) -> None:
    if str(folder) not in _logged:
        if len(_logged) >= MAX_LOGGED:
            _logged.clear()
        _logged.add(str(folder))
        _log.warning("%s %s", folder, what)
