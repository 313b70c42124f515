"""
`pillion verify`: reads every byte of checkpoints, and compares it with its digest. Called from: `cli.main`.

A checkpoint of another program has no digests. Then `verify` only finds out that every byte that `.metadata` names can be read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pillion_sidecar.checkpoint import catalog, commit
from pillion_sidecar.cli import contents, inventory, leaves, output, places
from pillion_sidecar.cli.exits import Exit, not_found, wrong_usage
from pillion_sidecar.storage.folder import Folder

HEADS: Final = ("STEP", "RESULT", "SIZE", "ITEMS", "TIME", "RATE")
NUMBERS: Final = ("STEP", "SIZE", "ITEMS", "TIME", "RATE")
MAX_SHOWN: Final = 20
"""Maximum problems of a checkpoint that are printed. `-o json` has all."""
GONE: Final = "removed"
INTACT: Final = "intact"
DAMAGED: Final = "damaged"
READABLE: Final = "readable"


@dataclass(slots=True)
class Finding:
    """The result for one checkpoint."""

    step: int | None
    folder: Folder
    num_bytes: int = 0
    num_items: int = 0
    seconds: float = 0.0
    has_digests: bool = True
    was_removed: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        if self.was_removed:
            return GONE
        return DAMAGED if self.problems else INTACT if self.has_digests else READABLE


def run(arguments: argparse.Namespace) -> Exit:
    """Verify one checkpoint, or all of a root. FOUND: something is damaged."""
    options, ca_file = places.storage_options(arguments, os.environ)
    place = places.open_place(arguments.root, options, ca_file)
    findings = []
    for folder, step in _chosen(place, arguments):
        findings.append(verify(folder, step, is_quiet=arguments.quiet))
        if arguments.output != "json":
            _say_problems(findings[-1])
    if arguments.output == "json":
        output.show_json([_document(each) for each in findings])
    else:
        output.show(output.table(HEADS, [_row(each) for each in findings], right=NUMBERS))
    return Exit.FOUND if any(each.problems for each in findings) else Exit.WELL


def _chosen(place: places.Place, arguments: argparse.Namespace) -> Sequence[tuple[Folder, int | None]]:
    if not arguments.all:
        return [places.checkpoint_of(place, arguments.step)]
    if arguments.step is not None or place.step is not None:
        raise wrong_usage("--all verifies every step: leave the step out")
    found = [each for each in inventory.of_root(places.root_of(place)) if each.state in inventory.IS_COMMITTED]
    if not found:
        raise not_found(f"{place.text} holds no committed checkpoint")
    return [(each.folder, each.step) for each in found]


def verify(folder: Folder, step: int | None, *, is_quiet: bool) -> Finding:
    """
    Read a whole checkpoint, and return what is wrong with it.

    Blocks: for all of its bytes, with a progress bar on a terminal.

    Raises:
        LoadError: the storage does not answer. That says nothing about the checkpoint.
    """
    finding, rate = Finding(step, folder), output.Rate()
    try:
        stored = contents.read(folder, step)
    except catalog.Damaged as err:
        finding.problems.append(str(err))
        _notice_removal(finding)
        return finding
    finding.has_digests = stored.native
    every = leaves.all_of(stored)
    finding.num_items = len(every)
    name = "verify" if step is None else f"step {step}"
    with output.progress(name, sum(leaf.length for leaf in every), is_quiet=is_quiet) as bar:
        result = leaves.read(folder, every, moved=bar.moved)
    finding.num_bytes, finding.problems = result.num_bytes, result.problems
    finding.seconds, _ = rate.since(0)
    _notice_removal(finding)
    return finding


def _notice_removal(finding: Finding) -> None:
    if finding.problems and not commit.is_committed(finding.folder):
        finding.was_removed = True
        finding.problems.clear()


def _say_problems(finding: Finding) -> None:
    for problem in finding.problems[:MAX_SHOWN]:
        output.say(f"pillion: {problem}")
    if len(finding.problems) > MAX_SHOWN:
        output.say(
            f"pillion: and {len(finding.problems) - MAX_SHOWN} more problems of {finding.folder}; -o json has all"
        )


def _row(finding: Finding) -> list[str]:
    seconds = finding.seconds
    return [
        "" if finding.step is None else str(finding.step),
        finding.result,
        output.size(finding.num_bytes),
        str(finding.num_items),
        f"{seconds:.3g}s" if seconds else "",
        f"{output.size(int(finding.num_bytes / seconds))}/s" if seconds else "",
    ]


def _document(finding: Finding) -> dict[str, Any]:
    return {
        "step": finding.step,
        "path": str(finding.folder),
        "result": finding.result,
        "bytesRead": finding.num_bytes,
        "items": finding.num_items,
        "seconds": round(finding.seconds, 6),
        "digests": finding.has_digests,
        "problems": finding.problems,
    }
