"""
`pillion show`: the contents of one checkpoint. Called from: `cli.main`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pillion_sidecar.checkpoint import catalog, pins
from pillion_sidecar.cli import contents, inventory, listing, output, places
from pillion_sidecar.cli.exits import Exit
from pillion_sidecar.storage.folder import Entry

HEADS: Final = ("NAME", "DTYPE", "SHAPE", "SIZE", "CHUNKS", "FILES")
FILE_HEADS: Final = ("FILE", "SIZE")
KNOWN_FIELDS: Final = frozenset(
    {
        "format",
        "step",
        "generation",
        "run_id",
        "world_size",
        "plan_id",
        "started_ns",
        "created_ns",
        "cause",
        "size_bytes",
    }
    | {"digest_algorithm", "metadata_digest", "parts", "differing", "owner"}
)
"""Fields of a manifest that have a line or a place of their own. Others, such as metrics, are shown as they are."""
SHOWN_DIFFERING: Final = 8
"""Maximum of names that a line lists."""


def run(arguments: argparse.Namespace) -> Exit:
    """Print what a checkpoint consists of."""
    options, ca_file = places.storage_options(arguments, os.environ)
    place = places.open_place(arguments.root, options, ca_file)
    folder, number = places.checkpoint_of(place, arguments.step)
    stored = contents.read(folder, number)
    step = inventory.look(folder, number)
    if place.root is not None:
        step = next((each for each in inventory.of_root(place.root) if each.step == number), step)
    reasons = pins.read(place.root).get(number, ()) if place.root is not None and number is not None else ()
    raw = contents.manifest_document(folder) or {}
    tensors = contents.tensors(stored, arguments.include)
    leaves = [fqn for fqn in sorted(stored.opaque) if contents.matches(fqn, arguments.include, ())]
    files = folder.files()
    if arguments.output == "json":
        output.show_json(_document(step, stored, raw, tensors, leaves, files))
        return Exit.WELL
    output.show("".join(f"{name + ':':<14}{value}\n" for name, value in _facts(step, stored, raw, reasons)) + "\n")
    output.show(items_table(stored, tensors, leaves))
    if arguments.files:
        rows = [[name, output.size(files[name].length)] for name in sorted(files)]
        output.show("\n" + output.table(FILE_HEADS, rows, right=("SIZE",)))
    return Exit.WELL


def items_table(stored: catalog.Stored, tensors: Sequence[contents.Tensor], leaves: Sequence[str]) -> str:
    """Return the table of tensors and other leaves, sorted by name. Pure."""
    rows = [
        [
            each.fqn,
            each.dtype,
            "x".join(map(str, each.shape)) or "scalar",
            "" if each.num_bytes is None else output.size(each.num_bytes),
            str(len(each.chunks)),
            _file_names({chunk.file for chunk in each.chunks}),
        ]
        for each in tensors
    ]
    rows += [
        [fqn, "opaque", "", output.size(stored.opaque[fqn].length), "1", stored.opaque[fqn].file] for fqn in leaves
    ]
    return output.table(HEADS, sorted(rows), right=("SIZE", "CHUNKS"))


def _file_names(files: set[str]) -> str:
    first = min(files)
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"


def _facts(
    step: inventory.Step, stored: catalog.Stored, raw: Mapping[str, Any], reasons: Sequence[pins.Pin]
) -> Iterator[tuple[str, str]]:
    yield "Checkpoint", str(step.folder)
    yield "Step", output.NOTHING if step.step is None else str(step.step)
    yield "State", ", ".join([str(step.state), *(["newest"] if step.is_newest else [])])
    yield "Saved", output.timestamp(step.saved_ns) if step.saved_ns else output.NOTHING
    if raw.get("started_ns") and step.saved_ns:
        yield "Took", f"{(step.saved_ns - int(raw['started_ns'])) / 1e9:.3g} s from the save to the commit"
    yield "Size", output.size(step.size_bytes)
    if step.ranks is not None:
        yield "Ranks", str(step.ranks)
    yield "Items", f"{len(stored.chunks)} tensors, {len(stored.opaque)} other leaves"
    writer = (
        "another program" if not stored.native else f"Pillion, format {raw.get('format')}, generation {step.generation}"
    )
    yield "Written by", f"{writer}{f', run {step.run_id}' if step.run_id else ''}"
    if step.owner:
        yield "Owner", step.owner
    if step.cause:
        yield "Cause", step.cause
    for pin in reasons:
        yield "Pinned by", f"{pin.holder}{f': {pin.reason}' if pin.reason else ''}"
    if stored.differing:
        more = f" and {len(stored.differing) - SHOWN_DIFFERING} more" if len(stored.differing) > SHOWN_DIFFERING else ""
        yield "Differing", ", ".join(stored.differing[:SHOWN_DIFFERING]) + more
    for name, value in raw.items():
        if name not in KNOWN_FIELDS:
            yield name.capitalize(), str(value)


def _document(
    step: inventory.Step,
    stored: catalog.Stored,
    raw: Mapping[str, Any],
    tensors: Sequence[contents.Tensor],
    leaves: Sequence[str],
    files: Mapping[str, Entry],
) -> dict[str, Any]:
    return {
        **listing.document(step),
        "manifest": raw or None,
        "tensors": [
            {
                "name": each.fqn,
                "dtype": each.dtype,
                "shape": list(each.shape),
                "sizeBytes": each.num_bytes,
                "chunks": [
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": chunk.file,
                        "offset": chunk.offset,
                        "length": chunk.length,
                        "digest": chunk.digest or None,
                    }
                    for chunk in each.chunks
                ],
            }
            for each in tensors
        ],
        "opaque": [
            {
                "name": fqn,
                "file": stored.opaque[fqn].file,
                "offset": stored.opaque[fqn].offset,
                "length": stored.opaque[fqn].length,
                "digest": stored.opaque[fqn].digest or None,
            }
            for fqn in leaves
        ],
        "files": {name: entry.length for name, entry in sorted(files.items())},
    }
