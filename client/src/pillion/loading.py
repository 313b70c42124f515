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
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

from pillion import flatten
from pillion import leaves as leaves_module
from pillion import opaque as opaque_module
from pillion.errors import LoadError, SidecarUnavailable
from pillion.handle import LoadReport
from pillion.session import Session
from pillion.wire import layout, messages

LOAD_SILENCE_S: Final = 1800.0
"""Longest silence of the sidecar within a load. It speaks for every 32 MiB; the longest pause is the agreement of all pods,
which waits for the slowest trainer to start."""
TRIES: Final = 3
"""How often a load is begun: a sidecar that dies in it has a successor, which finds the arena and the other pods as they were."""
RETURN_S: Final = 60.0
"""How long a load waits for the successor: a kubelet starts a container again at once, then after 10, 20, 40 s."""

_log = logging.getLogger(__name__)


def load(
    session: Session,
    collector: leaves_module.Collector,
    state_dict: dict[str, Any],
    step: int | None,
    *,
    path: str | None,
) -> tuple[LoadReport, leaves_module.Leaves]:
    """
    Fill `state_dict` in place. Each `Stateful` in it is asked for its state once, and is given the loaded one once.

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
    request: messages.Message = {"type": "load", "step": step, "path": path, "layout": of.encoded.decode()}
    answer, opaque = _fill_anew(session, leaves, request)
    found = messages.optional_field(answer, "step", int)
    if found is not None:
        _assign(state_dict, wanted, leaves, opaque)
    report = LoadReport(
        step=found,
        tier=messages.field(answer, "tier", str),
        path=messages.field(answer, "path", str, ""),
        elapsed_s=time.perf_counter() - started,
        size_bytes=of.tensors_bytes,
        refused={str(k): str(v) for k, v in messages.field(answer, "refused", dict, {}).items()},
    )
    return report, leaves


def _fill_anew(
    session: Session, leaves: leaves_module.Leaves, request: messages.Message
) -> tuple[messages.Message, list[bytes]]:
    """`_fill`, with the sidecar's successor where it dies meanwhile."""
    for attempt in range(1, TRIES + 1):
        greeted = session.welcome
        try:
            return _fill(session, leaves, request)
        except SidecarUnavailable as err:
            # The successor may have greeted already: then nothing is lost any more.
            if attempt == TRIES or not (session.returned(RETURN_S) or session.welcome is not greeted):
                raise
            _log.warning("pillion: the load begins anew with the sidecar's successor: %s", err)
    raise AssertionError("the last try returns or raises")


def _fill(
    session: Session, leaves: leaves_module.Leaves, request: messages.Message
) -> tuple[messages.Message, list[bytes]]:
    """Ask, and copy what is announced; the last answer, and the opaque leaves in the order of the layout."""
    mapping = session.mapping
    if mapping is None:
        raise LoadError("the session has no arena")
    of = leaves.layout
    stored = leaves
    copied = slot = 0
    opaque: list[bytes] = []
    try:
        with contextlib.closing(session.stream(request, LOAD_SILENCE_S)) as answers:
            for answer in answers:
                if answer["type"] == "load_begin":
                    # Another round: an earlier one met a corrupt item. Everything is copied again.
                    copied, slot = 0, messages.field(answer, "slot", int)
                    # From the leaves as they were asked for: the dtypes are those of this round's checkpoint alone.
                    stored = _with_dtypes(leaves, messages.field(answer, "dtypes", dict, {}))
                elif answer["type"] == "load_progress":
                    upto = messages.field(answer, "upto", int)
                    mapping.copy_out(slot, stored, copied, upto)
                    copied = upto
                elif answer["type"] == "loaded":
                    break
            if messages.optional_field(answer, "step", int) is not None:
                mapping.copy_out(slot, stored, copied, len(of.items))
                opaque = _read_opaque(messages.field(answer, "opaque", dict), of)
    finally:
        # Also after an error: slots that nobody reads any more must not stay lent.
        session.send({"type": "load_done"})
    return answer, opaque


def _with_dtypes(leaves: leaves_module.Leaves, dtypes: Mapping[str, Any]) -> leaves_module.Leaves:
    """The slot holds the dtypes of the checkpoint; the copy converts, as stock `dcp.load` does."""
    if not dtypes:
        return leaves
    items = tuple(
        dataclasses.replace(item, dtype=str(dtypes.get(item.fqn, item.dtype))) for item in leaves.layout.items
    )
    changed = layout.Layout(items, leaves.layout.opaque, leaves.layout.paths)
    return leaves_module.Leaves(changed, leaves.tensors, leaves.opaque)


def _read_opaque(where: Mapping[str, Any], of: layout.Layout) -> list[bytes]:
    """Opaque leaves in the order of the layout, from the file that the sidecar names."""
    if not of.opaque:
        return []
    path, starts, lengths = where.get("file"), where.get("starts"), where.get("lengths")
    if not isinstance(path, str) or not isinstance(starts, list) or not isinstance(lengths, list):
        raise LoadError("the sidecar did not say where the opaque leaves are")
    with open(path, "rb") as file:
        return [_read_piece(file, start, length) for start, length in zip(starts, lengths, strict=True)]


def _read_piece(file: BinaryIO, start: int, length: int) -> bytes:
    """Raises: LoadError: the file ends before."""
    file.seek(start)
    # read(2) moves at most 0x7ffff000 bytes a call; a buffered file calls it until all is there.
    data = file.read(length)
    if len(data) != length:
        raise LoadError(f"the opaque leaves in {file.name} end at {start + len(data)}, and not at {start + length}")
    return data


def _assign(
    state_dict: dict[str, Any], wanted: dict[str, Any], leaves: leaves_module.Leaves, opaque: list[bytes]
) -> None:
    of = leaves.layout
    for fqn, target, data in zip(of.opaque, leaves.opaque, opaque, strict=True):
        loaded = opaque_module.unpickled(data, fqn)
        if not opaque_module.fill(target, loaded):
            flatten.assign(wanted, of.paths[fqn], loaded)
    for key, value in state_dict.items():
        if leaves_module.is_stateful(value):
            value.load_state_dict(wanted[key])
        else:
            state_dict[key] = wanted[key]
