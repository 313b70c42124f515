"""
What a checkpoint has of what a state dict wants, and what it has besides. Pure; by names, shapes and dtypes.

Called from: `executor.load.fill` (storage), `executor.load.snapshot` (memory), `executor.load.restore` (the pods together).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import layout

MISMATCHES_SHOWN: Final = 20
"""Names listed in an error's text; the error's field has all."""
UNEXPECTED_MOST: Final = 256
"""Names that are reported as not asked for. They are the shortest prefixes, so that a model of a hundred layers has some hundreds at most."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the checkpoint, as far as its fit is concerned."""

    dtype: str
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """What of a rank's wishes a checkpoint fulfils."""

    layout: layout.Layout
    """The wanted layout in the dtypes of the checkpoint, without what is missing."""
    dtypes: Mapping[str, str]
    """FQN -> the checkpoint's dtype, where it is another than the wanted one."""
    missing: tuple[str, ...] = ()
    """FQNs that the checkpoint does not have."""


def match(
    wanted: layout.Layout, tensors: Mapping[str, Tensor], opaque: Collection[str], *, strict: bool, where: str
) -> Match:
    """
    Compare what is wanted with what there is.

    Args:
        wanted: layout of the state dict to fill.
        tensors: FQN -> what the checkpoint has.
        opaque: FQNs of its leaves that are no tensors.
        strict: what is missing is an error.
        where: the checkpoint's name, for the error's text.

    Raises:
        IncompatibleCheckpoint: names, shapes or kinds do not fit; lists what is missing and what nothing asked for, so that a rename shows.
    """
    problems: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    items = []
    missing: dict[str, None] = {}
    for item in wanted.items:
        there = tensors.get(item.fqn)
        if there is None and item.fqn in opaque:
            problems[item.fqn] = "is no tensor there"
        elif there is None:
            missing[item.fqn] = None
        elif there.size != item.size:
            problems[item.fqn] = f"has shape {list(there.size)} there, {list(item.size)} here"
        else:
            if there.dtype != item.dtype:
                dtypes[item.fqn] = there.dtype
            items.append(dataclasses.replace(item, dtype=there.dtype))
    for fqn in wanted.opaque:
        if fqn in opaque:
            continue
        if fqn in tensors:
            problems[fqn] = "is a tensor there"
        else:
            missing[fqn] = None
    wrong = problems | (dict.fromkeys(missing, "is not in it") if strict else {})
    if wrong:
        beside = unexpected([*tensors, *opaque], names_of(wanted))
        text = f"{where} does not fit: " + _shown([f"{fqn!r} {why}" for fqn, why in wrong.items()])
        if missing and beside:
            text += "; it has, and nothing here asks for: " + _shown([repr(fqn) for fqn in beside])
        raise IncompatibleCheckpoint(text, fqns=list(wrong))
    left = tuple(fqn for fqn in wanted.opaque if fqn not in missing)
    return Match(layout.Layout(tuple(items), left, wanted.paths), dtypes, tuple(missing))


def _shown(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - MISMATCHES_SHOWN} more" if len(entries) > MISMATCHES_SHOWN else ""
    return "; ".join(entries[:MISMATCHES_SHOWN]) + more


def names_of(rank_layout: layout.Layout) -> set[str]:
    return {item.fqn for item in rank_layout.items} | set(rank_layout.opaque)


def unexpected(stored: Iterable[str], asked: Collection[str]) -> list[str]:
    """
    What the checkpoint has and nobody asked for, as the shortest dotted prefixes under which nothing was asked for. At most
    UNEXPECTED_MOST.
    """
    left = [fqn for fqn in stored if fqn not in asked]
    if not left:  # the usual case, and the prefixes of a hundred thousand names take 0.3 s
        return []
    above = {prefix for fqn in asked for prefix in _prefixes(fqn)}
    prefixes = {next((prefix for prefix in _prefixes(fqn) if prefix not in above), fqn) for fqn in left}
    return sorted(prefixes)[:UNEXPECTED_MOST]


def common(lists: Sequence[Collection[str]]) -> list[str]:
    """What every one of these lists of prefixes covers: asked for by no rank of the job. At most UNEXPECTED_MOST."""
    shared = set(lists[0]) if lists else set()
    for each in lists[1:]:
        others = set(each)
        shared = {fqn for fqn in shared if _covers(others, fqn)} | {fqn for fqn in others if _covers(shared, fqn)}
    return sorted(shared)[:UNEXPECTED_MOST]


def _covers(prefixes: Collection[str], fqn: str) -> bool:
    return any(prefix in prefixes for prefix in _prefixes(fqn))


def _prefixes(fqn: str) -> Iterable[str]:
    """The dotted prefixes of a name, the shortest first; the name itself comes last."""
    end = fqn.find(".")
    while end >= 0:
        yield fqn[:end]
        end = fqn.find(".", end + 1)
    yield fqn


def fingerprint(*what: object) -> str:
    """A short text that is equal where `what` is: for ranks to learn whether all would report the same."""
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
