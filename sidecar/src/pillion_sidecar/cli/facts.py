"""
The facts of a run for its report, read from its root: the journal, the newest session's record, and the checkpoints that are there now.

Called from: `cli.report`. Never writes to the root.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pillion.wire import names
from pillion_sidecar.checkpoint import commit, milestones, ownership
from pillion_sidecar.cli import inventory
from pillion_sidecar.run import journal as journal_module
from pillion_sidecar.run.journal import CLOSED, Journal
from pillion_sidecar.storage.folder import Folder

QUIET_S: Final = 90.0
"""Age of the newest session's sign of life after which the page does not call the run running. An owner in a bucket gives one every 30 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the root has of the run."""

    root: str
    now_ns: int
    journal: Journal
    steps: Sequence[inventory.Step]
    """The checkpoints that are there, ascending."""
    state: str
    """RUNNING, ENDED or SILENT."""
    missing: Sequence[str]
    """What the root does not tell, as sentences."""


RUNNING: Final = "running"
ENDED: Final = "ended"
SILENT: Final = "without a sign of life"


def gather(root: Folder, now_ns: int) -> Facts:
    """
    Read the facts of a run.

    Raises: OSError: the storage does not answer.
    """
    document, problem = _note(root)
    newest = commit.newest_generation(root)
    record = ownership.read(root, newest) if newest else None
    seen_ns = ownership.seen_ns(root, newest)
    journal = journal_module.read(document)
    return Facts(
        root=str(root),
        now_ns=now_ns,
        journal=until_now(journal, newest, seen_ns, left=record is not None and record.left),
        steps=inventory.of_root(root),
        state=state_of(seen_ns, now_ns, left=record is not None and record.left),
        missing=missing(journal, newest, problem),
    )


def _note(root: Folder) -> tuple[Any, str]:
    """Return the journal's document on the root, and why there is none. Raises: OSError."""
    try:
        document = json.loads(root.below(names.INTERNAL_DIR).read(milestones.NEWEST))
    except FileNotFoundError:
        return (
            None,
            "There is no note of a commit below .pillion: no training of Pillion has committed here, or the folder was removed.",
        )
    except (ValueError, RecursionError):
        return None, "The note of the newest commit below .pillion is damaged, and with it the journal of the run."
    run = document.get("run") if isinstance(document, dict) else None
    if run is None:
        return (
            None,
            "The run has no journal: a release before it wrote the last commit, or another program. Only the checkpoints are known.",
        )
    return run, ""


def until_now(journal: Journal, newest: int, seen_ns: int, *, left: bool) -> Journal:
    """
    Return the journal with what the newest session's record says of its end. Pure.

    Args:
        newest: number of the newest session. 0: there is none.
        seen_ns: its last sign of life.
        left: whether it has left in order.
    """
    last = journal.attempts[-1] if journal.attempts else None
    if last is None or last.number != newest or last.ended:
        return journal
    return journal_module.with_attempt(
        journal, replace(last, seen_ns=max(last.seen_ns, seen_ns), ended=CLOSED if left else "")
    )


def state_of(seen_ns: int, now_ns: int, *, left: bool) -> str:
    """Return what the run does now. Pure."""
    if left:
        return ENDED
    return RUNNING if now_ns - seen_ns < QUIET_S * 1e9 else SILENT


def missing(journal: Journal, newest: int, problem: str) -> list[str]:
    """Return what the facts lack, as sentences for the page. Pure."""
    found = [problem] if problem else []
    if journal.dropped:
        found.append(
            f"The journal keeps the newest {journal_module.MAX_ATTEMPTS} attempts: {journal.dropped} older ones are not on this page."
        )
    numbers = [each.number for each in journal.attempts]
    if numbers:
        between = numbers[-1] - numbers[0] + 1 - len(numbers)
        if between:
            found.append(
                f"{between} {_attempts(between)} between the first and the last one ended without a commit, and so without facts; their time counts as down."
            )
        if newest > numbers[-1]:
            later = newest - numbers[-1]
            found.append(
                f"{later} {_attempts(later)} began after the last commit, and {'has' if later == 1 else 'have'} committed nothing yet: this page ends with the commit."
            )
        before = numbers[0] - 1 - journal.dropped
        if before > 0:
            found.append(
                f"{before} {_attempts(before)} before the first one left no facts: without a commit, or of an earlier release."
            )
    return found


def _attempts(number: int) -> str:
    return "attempt" if number == 1 else "attempts"
