"""
One load in the trainer: request it from the sidecar, copy the tensors out of the arena, and put the opaque leaves in place.

Called from: `Checkpointer.load`, `pillion.reading` (all ranks). Unlike a save, a load raises: training on wrong weights is worse than none.

The sidecar answers with a stream of messages, so the trainer copies one part while the sidecar reads and verifies the next. The copies count
only after `loaded`, which says that every part was verified:

    load_begin (tier, step, slot, dtypes) -> load_progress (items that may be copied) ... -> loaded | failed
         ^                                                                   |
         +--- the checkpoint is corrupt: the ranks agree on an older one <---+
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, BinaryIO, Final, TypeVar

from pillion import flatten, load_notes, progress, renaming, sharing, stateful
from pillion import leaves as leaves_module
from pillion import opaque as opaque_module
from pillion.errors import IncompatibleCheckpoint, LoadError, NoCheckpoint, SidecarUnavailable
from pillion.handle import Found, LoadReport
from pillion.session import Session
from pillion.wire import layout, load_messages, remarks

LOAD_SILENCE_S: Final = 1800.0
"""Timeout for each message of the sidecar within a load. One comes for every 32 MiB. The longest pause is the agreement of all pods,
which waits for the slowest trainer to start."""
MAX_ATTEMPTS: Final = 3
"""Maximum attempts of a load. If the sidecar dies during a load, its successor has the same arena and the same other pods."""
RETURN_TIMEOUT_S: Final = 60.0
"""Timeout for the successor of a dead sidecar. A kubelet restarts a container at once, then after 10, 20 and 40 s."""

EMPTY_LAYOUT: Final = layout.Layout((), (), {})
"""Layout of a request that loads nothing (`find`)."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


def load(
    session: Session,
    collector: leaves_module.Collector,
    state_dict: dict[str, Any],
    step: int | None,
    *,
    path: str | None,
    below: bool = False,
    strict: bool = True,
    rename: renaming.Rename | None = None,
) -> tuple[LoadReport, leaves_module.Leaves]:
    """
    Fill `state_dict` in place. `state_dict` and `load_state_dict` of each `Stateful` value are called once each.

    Args:
        session: this rank's session.
        collector: turns the state dict into leaves.
        state_dict: the values to fill.
        step: a committed step. None lets the sidecars choose.
        path: directory of the checkpoint to load. None: the job's root.
        below: whether `path` may also be the root of a run.
        strict: whether a value that the checkpoint lacks is an error.
        rename: names of the state dict -> names in the checkpoint.

    Returns:
        The report, and the requested leaves. The next save probably has the same layout.

    Ranks: all, in the same order.

    Blocks: for the read. LOAD_SILENCE_S bounds each wait for a message, RETURN_TIMEOUT_S the wait for a successor of the sidecar.

    Raises:
        LoadError: `NoCheckpoint`, `CorruptCheckpoint`, `IncompatibleCheckpoint`.
        SidecarUnavailable: the sidecar went away and did not come back in time, or died in every attempt.
        UsageError: `rename` does not fit the state dict.
    """
    started = time.perf_counter()
    target = leaves_module.materialize(state_dict)
    leaves = collector.collect(target)
    requested = leaves.layout
    leaves_module.check_fillable(leaves)
    flatten.check_assignable(target, [requested.paths[fqn] for fqn in requested.opaque])
    own = list(requested.paths)
    there = renaming.names_there(rename, own)
    asked = dataclasses.replace(leaves, layout=renaming.renamed(requested, there))
    request = load_messages.Load(step=step, path=path, below=below, layout=asked.layout.encoded.decode(), strict=strict)
    try:
        filled = retry(session, lambda: fill(session, asked, request))
    except IncompatibleCheckpoint as err:
        if not there:
            raise
        fqns = renaming.own_names(err.fqns, there, own)
        raise IncompatibleCheckpoint(f"{err}{renaming.explained(there, err.fqns)}", fqns=fqns) from err
    answer = filled.answer
    check_source(answer, path)
    replaced: list[str] = []
    empty = list(load_notes.empty_containers(target))
    if answer.step is not None:
        opaque = {
            fqn: filled.opaque[name] for fqn in requested.opaque if (name := there.get(fqn, fqn)) in filled.opaque
        }
        replaced = _assign(state_dict, target, leaves, opaque)
    report = LoadReport(
        step=answer.step,
        tier=answer.tier,
        path=answer.path or None,
        elapsed_s=time.perf_counter() - started,
        size_bytes=requested.tensors_bytes,
        refused=answer.refused,
        missing=tuple(renaming.own_names(filled.missing, there, own)),
        unexpected=answer.unexpected,
        narrowed=load_notes.narrowed(_by_own_names(filled.dtypes, there, own), requested),
        replaced=tuple(replaced),
        differing=tuple(sorted(renaming.own_names(answer.differing, there, own))),
        passed_over=answer.passed_over,
        set_aside=answer.set_aside,
        conflicting=tuple(renaming.own_names(filled.conflicting, there, own)),
    )
    for where, why in report.refused.items():
        _log.warning("pillion: skipped the corrupt checkpoint %s: %s", where, why)
    load_notes.warn(
        report, empty=empty, first=session.group.rank == 0, alike=answer.alike, what=(report.path or "") if path else ""
    )
    return report, leaves


def _by_own_names(values: Mapping[str, T], there: Mapping[str, str], own: Sequence[str]) -> dict[str, T]:
    """Return values by names in the state dict, from values by names in the checkpoint."""
    return {fqn: values[name] for fqn in own if (name := there.get(fqn, fqn)) in values}


def check_source(answer: load_messages.Loaded, path: str | None) -> None:
    """
    Check that the sidecar has loaded from this directory. A sidecar of an earlier release ignores it.

    Raises:
        LoadError: it has loaded another checkpoint.
    """
    if path is None or (answer.step is not None and (answer.path == path or answer.path.startswith(f"{path}/"))):
        return
    raise LoadError(f"the sidecar's release cannot load a directory by its name ({path}): update its image")


def find(session: Session, step: int | None, *, path: str | None = None) -> Found | None:
    """
    Return the checkpoint that `load` would take now. None if there is none.

    Args: as `load`. A `path` may be the root of a run.

    Ranks, Blocks, Raises: as `load`.
    """
    request = load_messages.Load(
        find=True, step=step, path=path, below=path is not None, layout=EMPTY_LAYOUT.encoded.decode()
    )
    try:
        answer = ask(session, request)
    except NoCheckpoint:
        if path is None:
            raise  # the policy demands one
        return None
    if answer.step is not None:
        check_source(answer, path)
    return None if answer.step is None else found_of(answer.step, answer)


def found_of(step: int, answer: load_messages.Loaded) -> Found:
    said = remarks.read(answer.remarks)
    return Found(step=step, tier=answer.tier, path=answer.path or None, metrics=said.metrics, metadata=said.metadata)


def ask(session: Session, request: load_messages.Load) -> load_messages.Loaded:
    """
    Return the answer to a request that copies nothing.

    Ranks, Blocks, Raises: as `load`.
    """

    def last_answer() -> load_messages.Loaded:
        with contextlib.closing(session.stream(request, LOAD_SILENCE_S)) as answers:
            return next(answer for answer in answers if isinstance(answer, load_messages.Loaded))

    try:
        return retry(session, last_answer)
    finally:
        # A sidecar of an earlier release ignores `find`, and reserves a slot for a load of nothing. This message frees it.
        session.send(load_messages.LoadDone())


@dataclasses.dataclass(frozen=True, slots=True)
class Filled:
    """The result of the last round of a load. The tensors are filled; the opaque leaves are not yet in place."""

    answer: load_messages.Loaded
    opaque: Mapping[str, bytes]
    """FQN -> the leaf's pickled bytes."""
    dtypes: Mapping[str, str]
    """FQN -> the checkpoint's dtype, for tensors whose dtype here differs."""
    missing: Sequence[str]
    """FQNs that the checkpoint lacks."""
    conflicting: Sequence[str]
    """FQNs whose tensors share memory, so that they cannot all hold their stored values."""


def retry(session: Session, ask: Callable[[], T]) -> T:
    """Call `ask`. If the sidecar dies meanwhile, call it again with the sidecar's successor."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        welcome = session.welcome
        try:
            return ask()
        except SidecarUnavailable as err:
            # If the session has a new welcome, the successor has answered already, and no connection is lost now.
            if attempt == MAX_ATTEMPTS or not (session.returned(RETURN_TIMEOUT_S) or session.welcome is not welcome):
                raise
            _log.warning("pillion: the load begins again with the sidecar's successor: %s", err)
    raise AssertionError("the last attempt returns or raises")


def fill(session: Session, leaves: leaves_module.Leaves, request: load_messages.Load) -> Filled:
    """
    Request a load, and copy each part out of the arena when the sidecar announces it.

    Args:
        session: this rank's session.
        leaves: the leaves to fill, under their names in the checkpoint.
        request: the request, with the layout of these leaves.

    Raises: as `load`.
    """
    mapping = session.mapping
    if mapping is None:
        raise LoadError("the session has no arena")
    stored = leaves
    copied = slot = 0
    opaque: dict[str, bytes] = {}
    dtypes: Mapping[str, str] = {}
    missing: Sequence[str] = ()
    conflicting: list[str] = []
    meter = progress.Meter()
    # One line a pod is enough: its ranks load together.
    say = (lambda: _log.warning("pillion: %s", meter.line())) if session.group.local_rank == 0 else None
    try:
        with (
            progress.Speaker(say),
            contextlib.closing(session.stream(request, LOAD_SILENCE_S)) as answers,
        ):
            for answer in answers:
                if isinstance(answer, load_messages.LoadBegin):
                    # A second round, because the first checkpoint is corrupt. Everything is copied again.
                    copied, slot = 0, answer.slot
                    # Computed from the requested leaves: the differences of the previous round's checkpoint no longer apply.
                    dtypes, missing = answer.dtypes, answer.missing
                    stored = _as_stored(leaves, dtypes, missing)
                    meter.begin(answer.tier, stored.layout.tensors_bytes)
                elif isinstance(answer, load_messages.LoadProgress):
                    mapping.copy_out(slot, stored, copied, answer.upto)
                    copied = answer.upto
                    meter.move(stored.layout.end(copied - 1) if copied else 0)
                else:
                    break
            assert isinstance(answer, load_messages.Loaded)  # otherwise the stream raises
            if answer.step is not None:
                mapping.copy_out(slot, stored, copied, len(stored.tensors))
                indexes = sharing.conflicting(stored.tensors, mapping.views(slot, stored.layout))
                conflicting = list(dict.fromkeys(stored.layout.items[index].fqn for index in indexes))
                opaque = _read_opaque(answer.opaque, stored.layout)
    finally:
        # After an error as well, or the slot would stay reserved for this load.
        session.send(load_messages.LoadDone())
    return Filled(answer, opaque, dtypes, missing, conflicting)


def _as_stored(
    leaves: leaves_module.Leaves, dtypes: Mapping[str, str], missing: Collection[str]
) -> leaves_module.Leaves:
    """
    Return the leaves as they lie in the slot: with the checkpoint's dtypes, and without the values that it lacks.

    The copy converts to the dtypes of the state dict, as stock `dcp.load` does.
    """
    if not dtypes and not missing:
        return leaves
    lacking = frozenset(missing)
    requested = leaves.layout
    kept = [
        (item, tensor) for item, tensor in zip(requested.items, leaves.tensors, strict=True) if item.fqn not in lacking
    ]
    items = tuple(dataclasses.replace(item, dtype=dtypes.get(item.fqn, item.dtype)) for item, _ in kept)
    opaque = [(fqn, leaf) for fqn, leaf in zip(requested.opaque, leaves.opaque, strict=True) if fqn not in lacking]
    stored = layout.Layout(items, tuple(fqn for fqn, _ in opaque), requested.paths)
    return leaves_module.Leaves(stored, [tensor for _, tensor in kept], [leaf for _, leaf in opaque])


def _read_opaque(location: load_messages.OpaqueLeaves, stored: layout.Layout) -> dict[str, bytes]:
    """
    Read the opaque leaves from the file that the sidecar named.

    Args:
        location: the file, and the start and length in bytes of each leaf.
        stored: the layout of the slot, which has the leaves' names.

    Returns:
        FQN -> pickled bytes.

    Raises:
        LoadError: the sidecar named no file, or the file is too short.
    """
    if not stored.opaque:
        return {}
    if not location.file:
        raise LoadError("the sidecar did not say where the opaque leaves are")
    with open(location.file, "rb") as file:
        pieces = zip(stored.opaque, location.starts, location.lengths, strict=True)
        return {fqn: _read_piece(file, start, length) for fqn, start, length in pieces}


def _read_piece(file: BinaryIO, start: int, length: int) -> bytes:
    """
    Read exactly `length` bytes of the file.

    Raises:
        LoadError: the file is shorter.
    """
    file.seek(start)
    # read(2) moves at most 0x7ffff000 bytes a call. A buffered file calls it until all bytes have come.
    data = file.read(length)
    if len(data) != length:
        raise LoadError(f"the opaque leaves in {file.name} end at {start + len(data)}, and not at {start + length}")
    return data


def _assign(
    state_dict: dict[str, Any], target: dict[str, Any], leaves: leaves_module.Leaves, opaque: Mapping[str, bytes]
) -> list[str]:
    """
    Put the loaded opaque leaves in place, and pass each `Stateful` value its loaded state.

    Args:
        state_dict: the caller's state dict, whose values may be `Stateful`.
        target: the same state dict with the state of each `Stateful` value instead of the object.
        leaves: the requested leaves.
        opaque: FQN -> pickled bytes of the loaded leaf.

    Returns:
        FQNs of tensors and stateful objects that could not be filled in place, and were replaced by new objects.
    """
    requested = leaves.layout
    replaced = []
    for fqn, leaf in zip(requested.opaque, leaves.opaque, strict=True):
        if fqn not in opaque:
            continue
        loaded = opaque_module.unpickled(opaque[fqn], fqn)
        if opaque_module.fill(leaf, loaded):
            continue
        own = list(stateful.within(leaf))
        if own:
            loaded = stateful.restored(leaf, loaded)
        flatten.assign(target, requested.paths[fqn], loaded)
        kept = {id(each) for each in stateful.within(loaded)} if own else set()
        if load_notes.is_tensor(leaf) or any(id(each) not in kept for each in own):
            replaced.append(fqn)
    for key, value in state_dict.items():
        if stateful.is_stateful(value):
            value.load_state_dict(target[key])
        else:
            state_dict[key] = target[key]
    return replaced
