"""
The steps of a root, each with its state: what `pillion ls` shows, and what other commands choose from.

Called from: the commands of `cli`. Never writes to the root: an interrupted commit is shown, and stays for the next load.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import catalog, commit, milestones, pins, retention
from pillion_sidecar.storage import generation as generations
from pillion_sidecar.storage.folder import Entry, Folder

LOOKS: Final = 8
"""Number of steps that are looked at together: each costs two or three small requests of a bucket."""


class State(StrEnum):
    """The state of a step's folder."""

    COMMITTED = "committed"
    STOCK = "stock"
    """Committed by another program than Pillion, such as `torch.distributed.checkpoint.save`."""
    DAMAGED = "damaged"
    """Committed, and its manifest cannot be read."""
    COMPLETE = "complete"
    """Without a commit, but every part is there: the next load of the job commits it."""
    TORN = "torn"
    """Without a commit: a save that is running or that was interrupted, or a removal that was interrupted."""


IS_COMMITTED: Final = (State.COMMITTED, State.STOCK, State.DAMAGED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a root."""

    step: int | None
    """None: a checkpoint by itself that does not name its step."""
    folder: Folder
    state: State
    size_bytes: int
    saved_ns: int
    """Wall clock time of the commit; without one, of the last change. 0: not known."""
    ranks: int | None = None
    """Number of ranks that saved it; None: not known."""
    ranks_there: int | None = None
    """(torn) Number of ranks whose parts are there."""
    cause: str = ""
    generation: str = ""
    run_id: str = ""
    owner: str = ""
    pinned: tuple[str, ...] = ()
    """Holders of its pins."""
    is_newest: bool = False
    """Whether a load takes this one."""
    is_left_behind: bool = False
    """Whether training went back behind it. Retention does not count it."""
    is_verified: bool = False
    """Whether it is the one that a load has verified last."""


def of_root(root: Folder) -> list[Step]:
    """Return the steps of a root, ascending. Raises: OSError: the storage does not answer."""
    found = [step for name in root.folders() if (step := names.parse_step_directory(name)) is not None]
    with futures.ThreadPoolExecutor(LOOKS, "pillion-look") as pool:
        looks = list(pool.map(lambda step: look(catalog.step_folder(root, step), step), found))
    orders = _orders(root, looks)
    line = retention.line(orders)
    holders, verified = pins.pinned(root), milestones.verified(root)
    newest = max(orders, key=lambda step: (orders[step], step), default=None)
    return [_placed(each, newest, line, holders, verified) for each in sorted(looks, key=lambda each: each.step or 0)]


def _orders(root: Folder, looks: Iterable[Step]) -> dict[int, generations.Order]:
    own: dict[int, generations.Order | None] = {}
    for each in looks:
        if each.step is None or each.state not in IS_COMMITTED:
            continue
        text = each.generation
        if not text and (noted := milestones.written(root, each.step)) is not None:
            text = noted[0]
        own[each.step] = generations.order_of(text) if text else None
    return catalog.ordered(own)


def _placed(
    each: Step, newest: int | None, line: list[int], holders: Mapping[int, tuple[str, ...]], verified: set[int]
) -> Step:
    if each.step is None:
        return each
    return dataclasses.replace(
        each,
        pinned=holders.get(each.step, ()),
        is_newest=each.step == newest,
        is_left_behind=each.state in IS_COMMITTED and each.step not in line,
        is_verified=each.step in verified,
    )


def look(folder: Folder, step: int | None) -> Step:
    """Return the state of one folder. Raises: OSError: the storage does not answer."""
    files = folder.files()
    if names.COMMIT_MARKER not in files:
        return _without_commit(folder, step, files)
    try:
        read = manifest.decode_manifest(commit.read_manifest(folder))
    except FileNotFoundError:
        state = State.STOCK if commit.is_strangers(folder) else State.DAMAGED
        return _plain(folder, step, files, state, files[names.COMMIT_MARKER].modified_ns)
    except manifest.ManifestError:
        return _plain(folder, step, files, State.DAMAGED, files[names.COMMIT_MARKER].modified_ns)
    return Step(
        step=read.step if step is None else step,
        folder=folder,
        state=State.COMMITTED,
        size_bytes=read.size_bytes,
        saved_ns=read.created_ns,
        ranks=read.world_size,
        cause=read.cause,
        generation=read.generation,
        run_id=read.run_id,
        owner=read.owner,
    )


def _plain(folder: Folder, step: int | None, files: Mapping[str, Entry], state: State, saved_ns: int) -> Step:
    size_bytes = sum(entry.length for entry in files.values())
    return Step(step=step, folder=folder, state=state, size_bytes=size_bytes, saved_ns=saved_ns)


def _without_commit(folder: Folder, step: int | None, files: Mapping[str, Entry]) -> Step:
    size_bytes = sum(entry.length for entry in files.values())
    changed_ns = max((entry.modified_ns for entry in files.values()), default=0)
    newest: manifest.Part | None = None
    ranks: dict[str, set[int]] = {}
    for name in files:
        parsed = names.parse_part_file(name)
        if parsed is None:
            continue
        with contextlib.suppress(FileNotFoundError, manifest.ManifestError):
            part = manifest.decode_part(folder.read(name))
            if any(each not in files or files[each].length != length for each, length in part.files.items()):
                continue
            ranks.setdefault(part.generation, set()).update(part.ranks)
            if newest is None or generations.order(part.generation) > generations.order(newest.generation):
                newest = part
    if newest is None:
        return Step(step=step, folder=folder, state=State.TORN, size_bytes=size_bytes, saved_ns=changed_ns)
    there = len(ranks[newest.generation])
    return Step(
        step=step,
        folder=folder,
        state=State.COMPLETE if there == newest.world_size else State.TORN,
        size_bytes=size_bytes,
        saved_ns=changed_ns,
        ranks=newest.world_size,
        ranks_there=there,
        generation=newest.generation,
        run_id=newest.run_id,
    )
