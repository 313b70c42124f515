"""
`pillion prune`: removes checkpoints that a rule does not keep. Says what would go; does it with --yes. Called from: `cli.main`.

It removes exactly what retention would remove under the same rule, and by the same code: never the newest, a pinned or the last verified checkpoint,
never another program's, and never one that training has left behind and not passed again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pillion.wire.policy import Retention
from pillion.wire.quantities import BYTES, DURATION, Unit
from pillion_sidecar import settings
from pillion_sidecar.checkpoint import catalog, commit, facts, ownership, retention
from pillion_sidecar.cli import inventory, output, places
from pillion_sidecar.cli.exits import Exit, wrong_usage
from pillion_sidecar.storage.folder import Folder

HEADS: Final = ("STEP", "STATE", "SIZE", "DOES", "WHY")
REMOVE: Final = "remove"
KEEP: Final = "keep"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one step goes, and why."""

    step: inventory.Step
    removes: bool
    why: str


def run(arguments: argparse.Namespace) -> Exit:
    """Say which steps go, and remove them with --yes. FOUND: one that should go is still there."""
    if arguments.keep_every is not None and arguments.keep_last is None:
        raise wrong_usage("--keep-every needs --keep-last: without it every checkpoint stays")
    max_age_s = _amount("--max-age", arguments.max_age, DURATION)
    max_bytes = _amount("--max-bytes", arguments.max_bytes, BYTES)
    rule = Retention(
        keep_last=arguments.keep_last,
        keep_every_steps=arguments.keep_every,
        max_age_seconds=max_age_s,
        max_bytes=max_bytes,
    )
    if not rule.removes and not arguments.torn:
        raise wrong_usage(
            "say what stays: --keep-last N, and with it --keep-every STEPS; --max-age AGE; --max-bytes SIZE; or --torn for saves without a commit"
        )
    for flag, number in (("--keep-last", arguments.keep_last), ("--keep-every", arguments.keep_every)):
        if number is not None and number < 1:
            raise wrong_usage(f"{flag} {number}: a whole number of at least 1 is allowed")
    options, ca_file = places.storage_options(arguments, os.environ)
    place = places.open_place(arguments.root, options, ca_file)
    root = places.root_of(place)
    if place.step is not None:
        raise wrong_usage(f"{place.text} is one step: name its root")
    verdicts = judge(root, inventory.of_root(root), rule, torn=arguments.torn)
    going = [each for each in verdicts if each.removes]
    if arguments.output == "json":
        output.show_json([_document(each, arguments.yes) for each in verdicts])
    else:
        output.show(table(verdicts))
    freed = output.size(sum(each.step.size_bytes for each in going))
    if not arguments.yes:
        output.say(f"pillion: --yes removes {len(going)} steps, {freed}" if going else "pillion: nothing to remove")
        return Exit.WELL
    left = remove(root, [each.step for each in going])
    for step in left:
        output.say(
            f"pillion: step {step} is still there: it was pinned or written again meanwhile, or holds files that Pillion did not write"
        )
    output.say(f"pillion: removed {len(going) - len(left)} steps of {freed}")
    return Exit.FOUND if left else Exit.WELL


def _amount(flag: str, given: str | None, unit: Unit) -> int | None:
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        if (amount := unit.parse(given)) >= 1:
            return amount
    raise wrong_usage(f"{flag} {given}: {unit.allowed} is allowed")


def judge(root: Folder, steps: Sequence[inventory.Step], rule: Retention, *, torn: bool) -> list[Verdict]:
    """Return for each step whether it goes. Raises: OSError: the storage does not answer."""
    chosen = chosen_by(root, rule)
    owner = _living_owner(root) if torn else ""
    verdicts = []
    for each in steps:
        if each.step is None:
            continue
        if each.state not in inventory.IS_COMMITTED:
            verdicts.append(Verdict(each, *_of_torn(each, torn=torn, owner=owner)))
        else:
            verdicts.append(Verdict(each, *_of_committed(each, chosen, rule)))
    return verdicts


def chosen_by(root: Folder, rule: Retention) -> Collection[int]:
    """Return the committed steps that retention would remove after the newest commit."""
    known = facts.Known().read(root, catalog.committed(root))
    if not known:
        return ()
    newest = retention.line(facts.orders(known))[-1]
    return retention.judge(known, rule, current=newest, keep=retention.kept_whatever_the_policy(root))


def _of_committed(each: inventory.Step, chosen: Collection[int], rule: Retention) -> tuple[bool, str]:
    if each.state == inventory.State.STOCK:
        return False, "another program wrote it"
    if each.is_newest:
        return False, "newest"
    if each.pinned:
        return False, f"pinned by {', '.join(each.pinned)}"
    if each.step in chosen:
        return True, "training has gone back behind it" if each.is_left_behind else "not among those to keep"
    if each.is_verified:
        return False, "verified by the last load"
    if not rule.removes:
        return False, "only saves without a commit go"
    return False, "ahead of the newest" if each.is_left_behind else "kept by the rule"


def _of_torn(each: inventory.Step, *, torn: bool, owner: str) -> tuple[bool, str]:
    if each.pinned:
        return False, f"pinned by {', '.join(each.pinned)}"
    if not torn:
        return False, "without a commit: --torn removes it"
    if owner:
        return False, f"{owner} uses the root, and may be writing it"
    if each.state == inventory.State.COMPLETE:
        return False, "every part is there: the next load commits it"
    return True, "without a commit"


def _living_owner(root: Folder) -> str:
    """Return the name of the training that uses the root or may use it; empty: nobody does."""
    record = ownership.living(root, settings.Settings(runtime_dir="").owner_silent_s)
    return record.name if record is not None else ""


def remove(root: Folder, steps: Sequence[inventory.Step]) -> list[int]:
    """
    Remove steps, as retention does. Return those that are still there.

    Raises: OSError: the storage failed. A step that was begun is not a checkpoint any more; the rest of it goes with the next call.
    """
    # A root that was copied by other tools has no record of the attempts that wrote its files.
    written = [commit.newest_written(each.folder) for each in steps]
    generation = max([commit.newest_generation(root), *written])
    left = []
    for each in steps:
        assert each.step is not None
        if not retention.is_written_again(each.folder):
            for _ in retention.remove_step(root, each.step, generation=generation):
                pass
        if each.folder.files():
            left.append(each.step)
    return left


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the table of verdicts. Pure."""
    rows = [
        [
            str(each.step.step),
            each.step.state,
            output.size(each.step.size_bytes),
            REMOVE if each.removes else KEEP,
            each.why,
        ]
        for each in verdicts
    ]
    return output.table(HEADS, rows, right=("STEP", "SIZE"))


def _document(verdict: Verdict, does: bool) -> dict[str, Any]:
    return {
        "step": verdict.step.step,
        "state": str(verdict.step.state),
        "sizeBytes": verdict.step.size_bytes,
        "action": REMOVE if verdict.removes else KEEP,
        "why": verdict.why,
        "dryRun": not does,
    }
