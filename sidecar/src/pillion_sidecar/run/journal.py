"""
The journal of a run: what happened in its attempts and saves, as numbers. Bounded; pure.

Producer: the coordinator's sidecar (`run.ledger` collects, the executor writes it with the note of each commit: `checkpoint.milestones`). Consumer:
the sidecar of the next attempt, and `pillion report`. JSON, at most some 100 KiB. No load needs it.

An attempt is one session of trainers on the root: each start of the training is another one. All times are wall clock times of the machine with rank 0,
in nanoseconds since 1970; 0 means that nobody knows.

Breaking: removing a field, or changing a meaning. Not breaking: a new field with a default.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pillion.wire import codec

_log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 100
"""Maximum attempts in a journal, the newest ones, of some 500 bytes each. A job that restarts more often has other problems first."""
MAX_SAVES: Final = 200
"""Maximum saves in a journal, the newest ones, of some 200 bytes each: the width of a chart. Older ones count in the sums of their attempt."""
MAX_LOADS: Final = 8
"""Maximum loads of one attempt in a journal, the newest ones. A script loads once."""
TEXT_CHARS: Final = 64
"""Maximum length of a text in a journal, characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A load that changed the state of training."""

    step: int = -1
    """-1: there was nothing to load."""
    tier: str = ""
    began_ns: int
    ended_ns: int
    saved_ns: int = 0
    """When the save of what was loaded began. What was trained after it is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt, as far as its sidecar knew it when it wrote last."""

    number: int
    """Number of the session on the root: see `checkpoint.ownership`. Numbers that are missing are of attempts without a commit."""
    session: str
    world_size: int = 0
    num_pods: int = 0
    began_ns: int
    """When its first trainer connected."""
    seen_ns: int
    """The last time its trainers were known to live."""
    ended: str = ""
    """How its trainers ended: CLOSED or DIED. Empty: nobody knows."""
    loads: tuple[Load, ...] = ()
    stalled_s: float = 0.0
    """Time that saves held up training, without `waited_s`. Of the slowest rank in the pod of rank 0."""
    waited_s: float = 0.0
    """Time that saves held up training because no slot was free: storage was slower than the saves came."""
    saves: int = 0
    """Committed saves."""
    failed: int = 0
    dropped: int = 0
    """Saves that the policy's `overlap` dropped."""
    snapshots: int = 0
    bytes: int = 0
    """Bytes of the committed saves."""
    persist_s: float = 0.0
    """Time from the seal to the commit, all committed saves together."""
    refused: int = 0
    """Corrupt or lost checkpoints that its loads skipped."""


CLOSED: Final = "closed"
"""The trainers closed their Checkpointer."""
DIED: Final = "died"
"""A trainer ended without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One committed save, or the one that is being committed."""

    number: int
    """The attempt's."""
    step: int
    began_ns: int
    committed_ns: int = 0
    """0: it is being committed."""
    stall_s: float = 0.0
    """Time that it held up training, with the wait for a slot."""
    queued_s: float = 0.0
    """Time from the seal until the executor began."""
    persist_s: float = 0.0
    """From there until the bytes of rank 0's pod were durable."""
    commit_s: float = 0.0
    """From there until the checkpoint was visible: the other pods' writes, and the commit."""
    bytes: int = 0
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """The attempts and the saves, oldest first."""

    attempts: tuple[Attempt, ...] = ()
    saves: tuple[Save, ...] = ()
    dropped: int = 0
    """Attempts that are not in the journal any more."""

    def to_document(self) -> dict[str, object]:
        return codec.write(self)


def read(document: object) -> Journal:
    """Return the journal of a document. An empty one, if the document is not a journal: a run goes on without its past."""
    if document is None:
        return Journal()
    try:
        journal: Journal = codec.read(Journal, document)
        return journal
    except (codec.Wrong, TypeError, ValueError, RecursionError) as err:
        _log.warning("ignored an unreadable journal of the run: %s", err)
        return Journal()


def with_attempt(journal: Journal, attempt: Attempt) -> Journal:
    """Return the journal with an attempt in its newest state. Pure."""
    others = [each for each in journal.attempts if each.number != attempt.number]
    attempts = sorted([*others, attempt], key=lambda each: each.number)
    gone = max(0, len(attempts) - MAX_ATTEMPTS)
    return replace(journal, attempts=tuple(attempts[gone:]), dropped=journal.dropped + gone)


def with_save(journal: Journal, save: Save) -> Journal:
    """Return the journal with a save in its newest state. Pure."""
    others = [
        each
        for each in journal.saves
        if (each.number, each.step, each.began_ns) != (save.number, save.step, save.began_ns)
    ]
    return replace(journal, saves=(*others, save)[-MAX_SAVES:])


def committed(
    document: Mapping[str, Any], step: int, *, now_ns: int, size_bytes: int, persist_s: float, commit_s: float
) -> dict[str, object]:
    """
    Return a journal's document in which the save of `step` is committed. It is the one that the supervisor sent to the executor as being committed. Pure.

    Args:
        now_ns: time of the commit.
        size_bytes, persist_s, commit_s: see `Save`.
    """
    journal = read(document)
    pending = next((each for each in reversed(journal.saves) if each.step == step and not each.committed_ns), None)
    if pending is None:
        return journal.to_document()
    save = replace(
        pending, committed_ns=now_ns, bytes=size_bytes, persist_s=round(persist_s, 3), commit_s=round(commit_s, 3)
    )
    attempts = tuple(counted(each, save) if each.number == pending.number else each for each in journal.attempts)
    # A save that the next one overtook stays pending, and is none.
    saves = tuple(each for each in journal.saves if each is not pending and each.committed_ns)
    return replace(journal, attempts=attempts, saves=(*saves, save)).to_document()


def counted(attempt: Attempt, save: Save) -> Attempt:
    """Return the attempt with a committed save in its sums. Pure."""
    return replace(
        attempt,
        saves=attempt.saves + 1,
        bytes=attempt.bytes + save.bytes,
        persist_s=round(attempt.persist_s + save.queued_s + save.persist_s + save.commit_s, 3),
    )
