"""
`pillion ls`: the steps of a root. Called from: `cli.main`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pillion.wire import names
from pillion_sidecar.cli import inventory, output, places
from pillion_sidecar.cli.exits import Exit, not_found, wrong_usage

HEADS: Final = ("STEP", "STATE", "SAVED", "AGE", "SIZE", "RANKS", "CAUSE", "PINNED", "NOTE")
WIDE: Final = (*HEADS, "GENERATION", "WHERE")
NUMBERS: Final = ("STEP", "SIZE", "RANKS", "AGE")


def run(arguments: argparse.Namespace) -> Exit:
    """Print the steps of a root. FOUND: nothing is there, or a committed checkpoint is damaged."""
    text = arguments.root or os.environ.get(names.ENV_ROOT, "")
    if not text:
        raise wrong_usage(f"no root: name a directory or a URL, or set {names.ENV_ROOT}")
    options, ca_file = places.storage_options(arguments, os.environ)
    place = places.open_place(text, options, ca_file)
    if place.alone is not None:
        found = [inventory.look(place.alone, None)]
    else:
        found = inventory.of_root(places.root_of(place))
        if place.step is not None:
            found = [each for each in found if each.step == place.step]
    if arguments.output == "json":
        output.show_json([document(each) for each in found])
    elif arguments.output == "name":
        output.show("".join(f"{each.folder}\n" for each in found if each.state in inventory.IS_COMMITTED))
    elif found:
        output.show(table(found, time.time_ns(), is_wide=arguments.output == "wide"))
    if not found:
        raise not_found(f"{text} holds no checkpoints, and no folders such as step-200")
    return Exit.FOUND if any(each.state == inventory.State.DAMAGED for each in found) else Exit.WELL


def table(found: Sequence[inventory.Step], now_ns: int, *, is_wide: bool) -> str:
    """Return the table of steps. Pure."""
    rows = [[*_row(each, now_ns), *([each.generation, str(each.folder)] if is_wide else [])] for each in found]
    return output.table(WIDE if is_wide else HEADS, rows, right=NUMBERS)


def _row(each: inventory.Step, now_ns: int) -> list[str]:
    ranks = "" if each.ranks is None else str(each.ranks)
    if each.state == inventory.State.TORN and each.ranks_there is not None:
        ranks = f"{each.ranks_there}/{each.ranks}"
    return [
        "" if each.step is None else str(each.step),
        each.state,
        output.timestamp(each.saved_ns) if each.saved_ns else "",
        output.age((now_ns - each.saved_ns) / 1e9) if each.saved_ns else "",
        output.size(each.size_bytes),
        ranks,
        each.cause,
        ",".join(each.pinned),
        ", ".join(_notes(each)),
    ]


def _notes(each: inventory.Step) -> Iterable[str]:
    if each.is_newest:
        yield "newest"
    if each.is_verified:
        yield "verified"
    if each.is_left_behind:
        yield "left behind"


def document(each: inventory.Step) -> dict[str, Any]:
    """Return a step as `-o json` has it. Pure."""
    return {
        "step": each.step,
        "state": str(each.state),
        "path": str(each.folder),
        "time": output.timestamp(each.saved_ns) if each.saved_ns else None,
        "sizeBytes": each.size_bytes,
        "worldSize": each.ranks,
        "ranksThere": each.ranks_there,
        "cause": each.cause or None,
        "generation": each.generation or None,
        "runId": each.run_id or None,
        "owner": each.owner or None,
        "pinned": list(each.pinned),
        "newest": each.is_newest,
        "leftBehind": each.is_left_behind,
        "verified": each.is_verified,
    }
