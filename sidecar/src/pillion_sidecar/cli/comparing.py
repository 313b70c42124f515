"""
`pillion diff`: what differs between two checkpoints. Called from: `cli.main`.

Two items with the same chunks are compared by their digests, without reading them. Only where the chunks differ (another world size), or where a
checkpoint has no digests, values are read.
"""

from __future__ import annotations

import argparse
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pillion_sidecar.checkpoint import catalog
from pillion_sidecar.cli import assembly, contents, output, places
from pillion_sidecar.cli.exits import Ended, Exit

HEADS: Final = ("NAME", "CHANGE", "A", "B")


class Change(StrEnum):
    """How an item differs."""

    ADDED = "added"
    REMOVED = "removed"
    KIND = "kind"
    """A tensor on one side, another leaf on the other."""
    DTYPE = "dtype"
    SHAPE = "shape"
    VALUES = "values"
    BYTES = "bytes"
    """An opaque leaf with other pickled bytes. Equal objects may have other bytes."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One item that differs."""

    fqn: str
    change: Change
    a: str = ""
    b: str = ""


def run(arguments: argparse.Namespace) -> Exit:
    """Compare two checkpoints. FOUND: something differs."""
    options, ca_file = places.storage_options(arguments, os.environ)
    other_options, _ = places.storage_options(arguments, os.environ, "to_")
    place = places.open_place(arguments.a, options, ca_file)
    folder, step = places.checkpoint_of(place, None)
    if arguments.b.isdecimal():
        other_folder, other_step = places.checkpoint_of(
            places.Place(place.text, places.root_of(place), None), arguments.b
        )
    else:
        other_folder, other_step = places.checkpoint_of(places.open_place(arguments.b, other_options, ca_file), None)
    a, b = contents.read(folder, step), contents.read(other_folder, other_step)
    found, num_same = compare(a, b, arguments.include, arguments.exclude, is_quiet=arguments.quiet)
    if arguments.output == "json":
        output.show_json(_document(a, b, found, num_same))
    else:
        if found:
            output.show(output.table(HEADS, [[each.fqn, each.change, each.a, each.b] for each in found]))
        output.say(f"pillion: {num_same} items are equal, {len(found)} differ between {a.folder} and {b.folder}")
    return Exit.FOUND if found else Exit.WELL


def compare(
    a: catalog.Stored,
    b: catalog.Stored,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    is_quiet: bool = True,
) -> tuple[list[Difference], int]:
    """
    Return what differs, sorted by name, and the number of equal items.

    Raises:
        Ended: values must be read, and that cannot be done or finds damage.
        LoadError: the storage does not answer.
    """
    tensors_a = {each.fqn: each for each in contents.tensors(a, include, exclude)}
    tensors_b = {each.fqn: each for each in contents.tensors(b, include, exclude)}
    leaves_a = {fqn: leaf for fqn, leaf in a.opaque.items() if contents.matches(fqn, include, exclude)}
    leaves_b = {fqn: leaf for fqn, leaf in b.opaque.items() if contents.matches(fqn, include, exclude)}
    found: list[Difference] = []
    to_read: list[tuple[contents.Tensor, contents.Tensor]] = []
    every = sorted({*tensors_a, *tensors_b, *leaves_a, *leaves_b})
    for fqn in every:
        tensor_a, tensor_b = tensors_a.get(fqn), tensors_b.get(fqn)
        if tensor_a is not None and tensor_b is not None:
            difference = _of_tensors(tensor_a, tensor_b)
            if difference is None and not _have_same_digests(tensor_a, tensor_b):
                if a.native and b.native and _have_same_chunks(tensor_a, tensor_b):
                    difference = Difference(fqn, Change.VALUES)
                else:
                    to_read.append((tensor_a, tensor_b))
        elif fqn in leaves_a and fqn in leaves_b:
            is_same = bool(leaves_a[fqn].digest) and leaves_a[fqn].digest == leaves_b[fqn].digest
            difference = None if is_same or _pickles(a, fqn) == _pickles(b, fqn) else Difference(fqn, Change.BYTES)
        else:
            difference = _of_one_side(fqn, tensor_a, tensor_b, in_a=fqn in leaves_a, in_b=fqn in leaves_b)
        if difference is not None:
            found.append(difference)
    found += _of_values(a, b, to_read, is_quiet)
    return sorted(found, key=lambda each: each.fqn), len(every) - len(found)


def _of_tensors(a: contents.Tensor, b: contents.Tensor) -> Difference | None:
    if a.shape != b.shape:
        return Difference(a.fqn, Change.SHAPE, _shape(a), _shape(b))
    return Difference(a.fqn, Change.DTYPE, a.dtype, b.dtype) if a.dtype != b.dtype else None


def _of_one_side(
    fqn: str, a: contents.Tensor | None, b: contents.Tensor | None, *, in_a: bool, in_b: bool
) -> Difference:
    shown_a = f"{a.dtype} {_shape(a)}" if a is not None else "opaque" if in_a else ""
    shown_b = f"{b.dtype} {_shape(b)}" if b is not None else "opaque" if in_b else ""
    change = Change.ADDED if not shown_a else Change.REMOVED if not shown_b else Change.KIND
    return Difference(fqn, change, shown_a, shown_b)


def _shape(tensor: contents.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _have_same_chunks(a: contents.Tensor, b: contents.Tensor) -> bool:
    return [(c.offsets, c.sizes) for c in a.chunks] == [(c.offsets, c.sizes) for c in b.chunks]


def _have_same_digests(a: contents.Tensor, b: contents.Tensor) -> bool:
    return _have_same_chunks(a, b) and all(
        own.digest and own.digest == other.digest for own, other in zip(a.chunks, b.chunks, strict=True)
    )


def _pickles(stored: catalog.Stored, fqn: str) -> bytes:
    leaf = stored.opaque[fqn]
    with catalog.damage(f"{stored.folder}/{leaf.file}"):
        return bytes(stored.folder.read_piece(leaf.file, leaf.offset, leaf.length))


def _of_values(
    a: catalog.Stored, b: catalog.Stored, pairs: Sequence[tuple[contents.Tensor, contents.Tensor]], is_quiet: bool
) -> list[Difference]:
    """Read the values of tensors whose chunks differ, one tensor after the other, and compare them bit for bit."""
    found = []
    total = sum(chunk.length for pair in pairs for tensor in pair for chunk in tensor.chunks)
    with output.progress("compare", total, is_quiet=is_quiet) as bar:
        for own, other in pairs:
            values = []
            for stored, tensor in ((a, own), (b, other)):
                memory = memoryview(mmap.mmap(-1, max(tensor.num_bytes or 0, 1)))[: tensor.num_bytes or 0]
                result = assembly.fill(stored, [tensor], {tensor.fqn: memory}, moved=bar.moved)
                if result.problems:
                    raise Ended(Exit.FOUND, "; ".join(result.problems))
                values.append(memory)
            if values[0] != values[1]:
                found.append(Difference(own.fqn, Change.VALUES))
    return found


def _document(a: catalog.Stored, b: catalog.Stored, found: Sequence[Difference], num_same: int) -> dict[str, Any]:
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "equal": num_same,
        "differences": [
            {"name": each.fqn, "change": str(each.change), "a": each.a or None, "b": each.b or None} for each in found
        ],
    }
