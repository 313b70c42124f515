"""
Comparison of a checkpoint with the state dict to fill: by names, shapes and dtypes. Finds what is missing and what is unexpected. Pure.

Called from: `executor.load.fill` (storage), `executor.load.snapshot` (memory), `executor.load.restore` (all pods together).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import layout, manifest

MISMATCHES_SHOWN: Final = 20
"""Names that the text of an error lists. The field of the error has all."""
COMPILED: Final = "_orig_mod"
"""The name that `torch.compile` gives the module which it wraps. A compiled model's own state dict has it in its names."""
MAX_UNEXPECTED: Final = 256
"""Maximum of names that are reported as unexpected. They are shortest prefixes, so a model of a hundred layers has some hundreds at most."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """The dtype and the shape of a tensor in the checkpoint."""

    dtype: str
    size: tuple[int, ...]


def tensors_in(chunks: Mapping[str, Sequence[manifest.StoredChunk]]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their names. `chunks`: FQN -> its chunks, at least one."""
    return {fqn: Tensor(each[0].dtype, each[0].size) for fqn, each in chunks.items()}


@dataclass(frozen=True, slots=True)
class Match:
    """The part of a rank's state dict that a checkpoint can fill."""

    layout: layout.Layout
    """The wanted layout in the dtypes of the checkpoint, without missing tensors and leaves."""
    dtypes: Mapping[str, str]
    """FQN -> the checkpoint's dtype, where it differs from the wanted one."""
    missing: tuple[str, ...] = ()
    """FQNs that the checkpoint does not have."""


def match(
    wanted: layout.Layout, tensors: Mapping[str, Tensor], opaque: Collection[str], *, strict: bool, where: str
) -> Match:
    """
    Compare the layout of a state dict with a checkpoint.

    Args:
        wanted: layout of the state dict to fill.
        tensors: FQN -> tensor of the checkpoint.
        opaque: FQNs of the checkpoint's leaves that are not tensors.
        strict: a missing name is an error.
        where: the checkpoint's name, for the text of the error.

    Raises:
        IncompatibleCheckpoint: names, shapes or kinds do not fit. The text lists missing and unexpected names, so a rename is easy to see.
    """
    problems: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    items = []
    missing: dict[str, None] = {}
    for item in wanted.items:
        tensor = tensors.get(item.fqn)
        if tensor is None and item.fqn in opaque:
            problems[item.fqn] = "is no tensor there"
        elif tensor is None:
            missing[item.fqn] = None
        elif tensor.size != item.size:
            problems[item.fqn] = f"has shape {list(tensor.size)} there, {list(item.size)} here"
        else:
            if tensor.dtype != item.dtype:
                dtypes[item.fqn] = tensor.dtype
            items.append(dataclasses.replace(item, dtype=tensor.dtype))
    for fqn in wanted.opaque:
        if fqn in opaque:
            continue
        if fqn in tensors:
            problems[fqn] = "is a tensor there"
        else:
            missing[fqn] = None
    wrong = problems | (dict.fromkeys(missing, "is not in it") if strict else {})
    if wrong:
        not_wanted = unexpected([*tensors, *opaque], names_of(wanted))
        text = f"{where} does not fit: " + _shown([f"{fqn!r} {why}" for fqn, why in wrong.items()])
        if missing and not_wanted:
            text += "; it has, and nothing here asks for: " + _shown([repr(fqn) for fqn in not_wanted])
            text += _compiled(missing, [*tensors, *opaque])
        raise IncompatibleCheckpoint(text, fqns=list(wrong))
    leaves = tuple(fqn for fqn in wanted.opaque if fqn not in missing)
    return Match(layout.Layout(tuple(items), leaves, wanted.paths), dtypes, tuple(missing))


def _compiled(missing: Iterable[str], stored: Iterable[str]) -> str:
    """Return the end of an error's text if names are missing because one of the two models was compiled. Otherwise nothing."""
    there = {_uncompiled(fqn): fqn for fqn in stored}
    pairs = [(fqn, other) for fqn in missing if (other := there.get(_uncompiled(fqn), fqn)) != fqn]
    if not pairs:
        return ""
    rename = dict(_ahead_of_what_is_equal(*pair) for pair in pairs)
    text = f"; names differ by the {COMPILED!r} of a module that torch.compile has wrapped: "
    if "" in rename or "" in rename.values() or len(rename) > MISMATCHES_SHOWN:
        return text + f"save and load the state of the module within (model.{COMPILED}), or pass a function as rename"
    return text + f"load with rename={rename!r}"


def _uncompiled(fqn: str) -> str:
    return ".".join(part for part in fqn.split(".") if part != COMPILED)


def _ahead_of_what_is_equal(one: str, other: str) -> tuple[str, str]:
    """Return both dotted names without the parts that are equal at their ends."""
    ones, others = one.split("."), other.split(".")
    while ones and others and ones[-1] == others[-1]:
        del ones[-1], others[-1]
    return ".".join(ones), ".".join(others)


def _shown(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - MISMATCHES_SHOWN} more" if len(entries) > MISMATCHES_SHOWN else ""
    return "; ".join(entries[:MISMATCHES_SHOWN]) + more


def names_of(rank_layout: layout.Layout) -> set[str]:
    return {item.fqn for item in rank_layout.items} | set(rank_layout.opaque)


def unexpected(stored: Iterable[str], asked: Collection[str]) -> list[str]:
    """
    Return the names in the checkpoint that nobody asked for, at most MAX_UNEXPECTED.

    Each is shortened to the shortest dotted prefix under which nobody asked for any name.
    """
    left = [fqn for fqn in stored if fqn not in asked]
    if not left:  # the usual case, and the prefixes of a hundred thousand names take 0.3 s
        return []
    above = {prefix for fqn in asked for prefix in _prefixes(fqn)}
    prefixes = {next((prefix for prefix in _prefixes(fqn) if prefix not in above), fqn) for fqn in left}
    return sorted(prefixes)[:MAX_UNEXPECTED]


def common(lists: Sequence[Collection[str]]) -> list[str]:
    """Return the prefixes that every list covers, at most MAX_UNEXPECTED: no rank of the job asked for them."""
    shared = set(lists[0]) if lists else set()
    for each in lists[1:]:
        others = set(each)
        shared = {fqn for fqn in shared if _covers(others, fqn)} | {fqn for fqn in others if _covers(shared, fqn)}
    return sorted(shared)[:MAX_UNEXPECTED]


def _covers(prefixes: Collection[str], fqn: str) -> bool:
    return any(prefix in prefixes for prefix in _prefixes(fqn))


def _prefixes(fqn: str) -> Iterable[str]:
    """Yield the dotted prefixes of a name, the shortest first. The name itself comes last."""
    end = fqn.find(".")
    while end >= 0:
        yield fqn[:end]
        end = fqn.find(".", end + 1)
    yield fqn


def fingerprint(*values: object) -> str:
    """Return a short digest of the values. Ranks compare digests to learn whether all would report the same."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
