"""
A state without a template: what a checkpoint holds, as a layout of whole tensors, and the snapshots of all local ranks taken together.

Called from: `executor.load.restore` (what a checkpoint holds), `executor.load.snapshot` (snapshots). Imports torch only to put the parts of a
tensor together. A read from storage needs nothing else of this module: to `executor.load.fill` a whole tensor is one more wanted chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import layout
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.executor.load import matching

NAMES_SHOWN: Final = 20
"""Maximum names at the top of a checkpoint that the text of an error lists."""
Path = tuple[str | int, ...]


def stored_content(stored: catalog.Stored, prefixes: Sequence[str]) -> layout.Layout:
    """
    Return what a checkpoint on storage holds below the prefixes, each tensor as one item.

    Raises:
        IncompatibleCheckpoint: it has nothing below a prefix, or a tensor of a dtype that this release does not know.
    """
    tensors = matching.tensors_in(stored.chunks)
    return _content(tensors, stored.opaque, stored.paths, prefixes, where=f"the checkpoint {stored.folder}")


def _content(
    tensors: Mapping[str, matching.Tensor],
    opaque: Iterable[str],
    paths: Mapping[str, Path],
    prefixes: Sequence[str],
    *,
    where: str,
) -> layout.Layout:
    wanted = [fqn for fqn in tensors if _is_below(fqn, prefixes)]
    leaves = [fqn for fqn in opaque if _is_below(fqn, prefixes)]
    found = [*wanted, *leaves]
    absent = [prefix for prefix in prefixes if not any(_is_below(fqn, (prefix,)) for fqn in found)]
    if absent:
        tops = sorted({fqn.partition(".")[0] for fqn in [*tensors, *opaque]})
        more = f" and {len(tops) - NAMES_SHOWN} more" if len(tops) > NAMES_SHOWN else ""
        raise IncompatibleCheckpoint(
            f"{where} has nothing below {', '.join(map(repr, absent))}; it has {', '.join(map(repr, tops[:NAMES_SHOWN]))}{more}",
            fqns=absent,
        )
    unknown = [fqn for fqn in wanted if tensors[fqn].dtype not in layout.ITEMSIZE_BYTES]
    if unknown:
        raise IncompatibleCheckpoint(
            f"{where} has tensors of dtypes that this release cannot read without a state dict: "
            + ", ".join(f"{fqn!r} ({tensors[fqn].dtype})" for fqn in unknown[: matching.MISMATCHES_SHOWN]),
            fqns=unknown,
        )
    items = tuple(_item(fqn, tensors[fqn]) for fqn in wanted)
    return layout.Layout(items, tuple(leaves), {fqn: paths.get(fqn, (fqn,)) for fqn in found})


def _item(fqn: str, tensor: matching.Tensor) -> layout.Item:
    return layout.Item(fqn, tensor.dtype, tensor.size, (0,) * len(tensor.size), tensor.size)


def _is_below(fqn: str, prefixes: Sequence[str]) -> bool:
    return not prefixes or any(fqn == prefix or fqn.startswith(f"{prefix}.") for prefix in prefixes)


@dataclass(frozen=True, slots=True)
class Part:
    """One leaf of one rank's snapshot."""

    image: image.SlotImage
    index: int
    """Index among the items; of an opaque leaf among the opaque leaves."""

    @property
    def item(self) -> layout.Item:
        return self.image.layout.items[self.index]


class Together:
    """
    The snapshots of one step of all local ranks. Where two ranks have the same chunk or the same opaque leaf, the lowest rank's counts, as on
    storage.

    Args:
        images: the snapshots, by rank.
        step: their step, for the texts of errors.
    """

    def __init__(self, images: Sequence[image.SlotImage], step: int) -> None:
        self._where = f"the snapshot of step {step} in the memory of ranks {[each.header.rank for each in images]}"
        self._chunks: dict[str, dict[tuple[object, ...], Part]] = {}
        self._leaves: dict[str, Part] = {}
        self._paths: dict[str, Path] = {}
        self._tensors: dict[str, matching.Tensor] = {}
        self._odd: dict[str, str] = {}
        """FQN -> why its parts make no whole tensor."""
        for each in images:
            for index, item in enumerate(each.layout.items):
                tensor = self._tensors.setdefault(item.fqn, matching.Tensor(item.dtype, item.size))
                if tensor != matching.Tensor(item.dtype, item.size):
                    self._odd[item.fqn] = "has another shape or dtype on each rank"
                self._chunks.setdefault(item.fqn, {}).setdefault(item.key, Part(each, index))
            for index, fqn in enumerate(each.layout.opaque):
                self._leaves.setdefault(fqn, Part(each, index))
            self._paths = {**each.layout.paths, **self._paths}
        for fqn in self._tensors.keys() & self._leaves.keys():
            self._odd[fqn] = "is a tensor on some ranks only"

    def content(self, prefixes: Sequence[str]) -> layout.Layout:
        """
        Return what the snapshots hold below the prefixes, each tensor as one item.

        Raises:
            IncompatibleCheckpoint: as `stored_content`, or the pod's memory has only a part of a tensor.
        """
        found = _content(self._tensors, self._leaves, self._paths, prefixes, where=self._where)
        self._check_whole([item.fqn for item in found.items], found.opaque)
        return found

    def match(self, wanted: layout.Layout) -> matching.Match:
        """
        Compare a layout of whole tensors with the snapshots.

        Raises:
            IncompatibleCheckpoint: a name is missing, has another shape or kind, or is here in part only.
        """
        matched = matching.match(wanted, self._tensors, self._leaves.keys(), strict=True, where=self._where)
        self._check_whole([item.fqn for item in matched.layout.items], matched.layout.opaque)
        return matched

    def _check_whole(self, tensors: Sequence[str], leaves: Sequence[str]) -> None:
        problems = {fqn: self._odd[fqn] for fqn in (*tensors, *leaves) if fqn in self._odd}
        for fqn in tensors:
            held = sum(math.prod(part.item.sizes) for part in self._chunks[fqn].values())
            if held < math.prod(self._tensors[fqn].size):
                problems.setdefault(fqn, "is there in part only")
        if problems:
            shown = [f"{fqn!r} {why}" for fqn, why in problems.items()][: matching.MISMATCHES_SHOWN]
            raise IncompatibleCheckpoint(
                f"{self._where} does not have the whole state: {'; '.join(shown)}; only storage could put it together",
                fqns=list(problems),
            )

    def chunks(self, fqn: str) -> Iterator[Part]:
        """Yield the parts of a tensor."""
        yield from self._chunks[fqn].values()

    def leaf(self, fqn: str) -> Part:
        """Return an opaque leaf."""
        return self._leaves[fqn]


def copy(parts: Sequence[Part], target: layout.Layout, index: int, memory: memoryview) -> None:
    """
    Write the payload of item `index` of the target layout into the image.

    Raises:
        catalog.Damaged: the parts leave a hole.
    """
    item = target.items[index]
    start, length = target.payload_starts[index], item.payload_bytes
    for part in parts:
        if part.item.sizes == item.sizes:
            source = part.image.layout.payload_starts[part.index]
            memory[start : start + length] = part.image.memory[source : source + length]
            return
    from pillion_sidecar.executor.load import reshard  # torch

    out = reshard.view(memory, start, item)
    covered = 0
    for part in parts:
        tensor = reshard.view(part.image.memory, part.image.layout.payload_starts[part.index], part.item)
        covered += reshard.paste(out, item, tensor, part.item.offsets)
    if covered < out.numel():
        raise catalog.Damaged(f"the parts of {item.fqn!r} in memory leave a hole")
