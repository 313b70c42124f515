"""
One load: ask the sidecar, copy what it has verified, put the opaque leaves in place.

Called from: `Checkpointer.load` (all ranks). Unlike a save, a load raises: training on wrong weights is worse than none.

The sidecar answers with a stream, so that the trainer copies one part while the next is read and verified (from the arena, where
nothing has to be read, it copies all of it meanwhile); what was copied counts when `loaded` says that all of it passed:

    load_begin (tier, step, slot, dtypes) -> load_progress (items that may be copied) ... -> loaded | failed
         ^                                                                   |
         +------ a corrupt one is found: the ranks agree on an older <-------+
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, BinaryIO, Final, TypeVar

from pillion import flatten, load_notes, sharing, stateful
from pillion import leaves as leaves_module
from pillion import opaque as opaque_module
from pillion.errors import LoadError, SidecarUnavailable
from pillion.handle import Found, LoadReport
from pillion.session import Session
from pillion.wire import layout, load_messages

LOAD_SILENCE_S: Final = 1800.0
"""Longest silence of the sidecar within a load. It speaks for every 32 MiB; the longest pause is the agreement of all pods,
which waits for the slowest trainer to start."""
TRIES: Final = 3
"""How often a load is begun: a sidecar that dies in it has a successor, which finds the arena and the other pods as they were."""
RETURN_S: Final = 60.0
"""How long a load waits for the successor: a kubelet starts a container again at once, then after 10, 20, 40 s."""

NOTHING: Final = layout.Layout((), (), {})
"""What a call asks for that only looks."""

_log = logging.getLogger(__name__)
T = TypeVar("T")


def load(
    session: Session,
    collector: leaves_module.Collector,
    state_dict: dict[str, Any],
    step: int | None,
    *,
    path: str | None,
    strict: bool = True,
) -> tuple[LoadReport, leaves_module.Leaves]:
    """
    Fill `state_dict` in place, from the checkpoint in the directory `path` where that is given. Each `Stateful` in it is asked for its state once, and is given the loaded one once.

    Returns:
        The report, and the leaves that were asked for: what the next save is like.

    Ranks: all, in the same order.

    Blocks: for the read; each silence of the sidecar is bounded by LOAD_SILENCE_S, its absence by RETURN_S.

    Raises:
        LoadError: `NoCheckpoint`, `CorruptCheckpoint`, `IncompatibleCheckpoint`.
        SidecarUnavailable: it went away, and did not come back in time, or died each time.
    """
    started = time.perf_counter()
    wanted = leaves_module.materialize(state_dict)
    leaves = collector.collect(wanted)
    of = leaves.layout
    leaves_module.check_fillable(leaves)
    flatten.check_assignable(wanted, [of.paths[fqn] for fqn in of.opaque])
    request = load_messages.Load(step=step, path=path, layout=of.encoded.decode(), strict=strict)
    filled = _fill_anew(session, leaves, request)
    answer = filled.answer
    if path is not None and (answer.step is None or answer.path != path):
        raise LoadError(f"the sidecar is of a release that loads no directory by its name ({path}): update its image")
    replaced: list[str] = []
    empty = list(load_notes.empty_containers(wanted))
    if answer.step is not None:
        replaced = _assign(state_dict, wanted, leaves, filled.opaque)
    report = LoadReport(
        step=answer.step,
        tier=answer.tier,
        path=answer.path,
        elapsed_s=time.perf_counter() - started,
        size_bytes=of.tensors_bytes,
        refused=answer.refused,
        missing=tuple(filled.missing),
        unexpected=answer.unexpected,
        narrowed=load_notes.narrowed(filled.dtypes, of),
        replaced=tuple(replaced),
        differing=tuple(sorted(of.paths.keys() & set(answer.differing))),
        passed_over=answer.passed_over,
        set_aside=answer.set_aside,
        conflicting=tuple(filled.conflicting),
    )
    for where, why in report.refused.items():
        _log.warning("pillion: skipped the corrupt checkpoint %s: %s", where, why)
    load_notes.warn(report, empty=empty, first=session.group.rank == 0, alike=answer.alike, what=path or "")
    return report, leaves


def find(session: Session, step: int | None) -> Found | None:
    """
    What `load` would take now; None: nothing.

    Ranks, Blocks, Raises: as `load`.
    """
    request = load_messages.Load(find=True, step=step, layout=NOTHING.encoded.decode())
    try:
        answer = _anew(session, lambda: _last(session, request))
    finally:
        # A sidecar of an earlier release takes it for a load of nothing, and lends a slot for it.
        session.send(load_messages.LoadDone())
    return None if answer.step is None else Found(step=answer.step, tier=answer.tier, path=answer.path)


def _last(session: Session, request: load_messages.Load) -> load_messages.Loaded:
    """The answer that ends a load which copies nothing."""
    with contextlib.closing(session.stream(request, LOAD_SILENCE_S)) as answers:
        return next(answer for answer in answers if isinstance(answer, load_messages.Loaded))


@dataclasses.dataclass(frozen=True, slots=True)
class _Filled:
    """What the last round of a load brought."""

    answer: load_messages.Loaded
    opaque: Mapping[str, bytes]
    """FQN -> what the trainer pickled."""
    dtypes: Mapping[str, str]
    """FQN -> the dtype of the checkpoint, where it is another than the wanted one."""
    missing: Sequence[str]
    conflicting: Sequence[str]
    """FQNs whose tensors share memory, and hold not all what is stored for them."""


def _fill_anew(session: Session, leaves: leaves_module.Leaves, request: load_messages.Load) -> _Filled:
    return _anew(session, lambda: _fill(session, leaves, request))


def _anew(session: Session, ask: Callable[[], T]) -> T:
    """Ask, and ask the sidecar's successor where it dies meanwhile."""
    for attempt in range(1, TRIES + 1):
        greeted = session.welcome
        try:
            return ask()
        except SidecarUnavailable as err:
            # The successor may have greeted already: then nothing is lost any more.
            if attempt == TRIES or not (session.returned(RETURN_S) or session.welcome is not greeted):
                raise
            _log.warning("pillion: the load begins again with the sidecar's successor: %s", err)
    raise AssertionError("the last try returns or raises")


def _fill(session: Session, leaves: leaves_module.Leaves, request: load_messages.Load) -> _Filled:
    """Ask, and copy what is announced."""
    mapping = session.mapping
    if mapping is None:
        raise LoadError("the session has no arena")
    stored = leaves
    copied = slot = 0
    opaque: dict[str, bytes] = {}
    dtypes: Mapping[str, str] = {}
    missing: Sequence[str] = ()
    conflicting: list[str] = []
    try:
        with contextlib.closing(session.stream(request, LOAD_SILENCE_S)) as answers:
            for answer in answers:
                if isinstance(answer, load_messages.LoadBegin):
                    # Another round: an earlier one met a corrupt item. Everything is copied again.
                    copied, slot = 0, answer.slot
                    # From the leaves as they were asked for: what differs is a matter of this round's checkpoint alone.
                    dtypes, missing = answer.dtypes, answer.missing
                    stored = _as_stored(leaves, dtypes, missing)
                elif isinstance(answer, load_messages.LoadProgress):
                    mapping.copy_out(slot, stored, copied, answer.upto)
                    copied = answer.upto
                else:
                    break
            assert isinstance(answer, load_messages.Loaded)  # the stream ends in no other way
            if answer.step is not None:
                mapping.copy_out(slot, stored, copied, len(stored.tensors))
                indexes = sharing.conflicting(stored.tensors, mapping.views(slot, stored.layout))
                conflicting = list(dict.fromkeys(stored.layout.items[index].fqn for index in indexes))
                opaque = _read_opaque(answer.opaque, stored.layout)
    finally:
        # Also after an error: slots that nobody reads any more must not stay lent.
        session.send(load_messages.LoadDone())
    return _Filled(answer, opaque, dtypes, missing, conflicting)


def _as_stored(
    leaves: leaves_module.Leaves, dtypes: Mapping[str, str], missing: Collection[str]
) -> leaves_module.Leaves:
    """
    The leaves as they lie in the slot: in the dtypes of the checkpoint (the copy converts, as stock `dcp.load` does), and without those
    that it does not have.
    """
    if not dtypes and not missing:
        return leaves
    lacking = frozenset(missing)
    of = leaves.layout
    kept = [(item, tensor) for item, tensor in zip(of.items, leaves.tensors, strict=True) if item.fqn not in lacking]
    items = tuple(dataclasses.replace(item, dtype=dtypes.get(item.fqn, item.dtype)) for item, _ in kept)
    opaque = [(fqn, leaf) for fqn, leaf in zip(of.opaque, leaves.opaque, strict=True) if fqn not in lacking]
    changed = layout.Layout(items, tuple(fqn for fqn, _ in opaque), of.paths)
    return leaves_module.Leaves(changed, [tensor for _, tensor in kept], [leaf for _, leaf in opaque])


def _read_opaque(where: Mapping[str, Any], of: layout.Layout) -> dict[str, bytes]:
    """The opaque leaves by name, from the file that the sidecar says."""
    if not of.opaque:
        return {}
    path, starts, lengths = where.get("file"), where.get("starts"), where.get("lengths")
    if not isinstance(path, str) or not isinstance(starts, list) or not isinstance(lengths, list):
        raise LoadError("the sidecar did not say where the opaque leaves are")
    with open(path, "rb") as file:
        pieces = zip(of.opaque, starts, lengths, strict=True)
        return {fqn: _read_piece(file, start, length) for fqn, start, length in pieces}


def _read_piece(file: BinaryIO, start: int, length: int) -> bytes:
    """Raises: LoadError: the file ends before."""
    file.seek(start)
    # read(2) moves at most 0x7ffff000 bytes a call; a buffered file calls it until all is there.
    data = file.read(length)
    if len(data) != length:
        raise LoadError(f"the opaque leaves in {file.name} end at {start + len(data)}, and not at {start + length}")
    return data


def _assign(
    state_dict: dict[str, Any], wanted: dict[str, Any], leaves: leaves_module.Leaves, opaque: Mapping[str, bytes]
) -> list[str]:
    """Put the opaque leaves and the states of `Stateful` values in place; names of what has new objects now."""
    of = leaves.layout
    replaced = []
    for fqn, target in zip(of.opaque, leaves.opaque, strict=True):
        if fqn not in opaque:
            continue
        loaded = opaque_module.unpickled(opaque[fqn], fqn)
        if opaque_module.fill(target, loaded):
            continue
        own = list(stateful.within(target))
        if own:
            loaded = stateful.restored(target, loaded)
        flatten.assign(wanted, of.paths[fqn], loaded)
        kept = {id(each) for each in stateful.within(loaded)} if own else set()
        if load_notes.is_tensor(target) or any(id(each) not in kept for each in own):
            replaced.append(fqn)
    for key, value in state_dict.items():
        if stateful.is_stateful(value):
            value.load_state_dict(wanted[key])
        else:
            state_dict[key] = wanted[key]
    return replaced
