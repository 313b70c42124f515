"""
Who owns a root: one living session at a time. `judge` is pure; the rest reads and writes one small file.

Called from: the coordinator's executor (`claim`, `Lease`), every other pod's executor (`find_shared`), the supervisor of a job of one pod
(`wait_until_free`, before it greets).

    <root>/.pillion/generations/<n>     the record of session number n; the largest n owns the root, and every commit looks for a larger

The owner counts its beats in its record for as long as it has trainers, or brings to storage what they left. A session that comes looks at
the record: an owner that has left, or that is the one which this pod served before, is succeeded at once; one that has not beaten for
STALE_S too. In between it is watched for `silent_s`: a beat refuses the newcomer, with both names, and no beat lets it in. So an owner is
taken for dead `silent_s` after its last beat at the latest, and no clock of another machine is believed within STALE_S. An owner whose
trainers are gone and whose last snapshot is on its way is waited for, DRAIN_MOST_S at most.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Final

from pillion.errors import UsageError
from pillion.wire import names
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.storage import durable

_log = logging.getLogger(__name__)

BEATS_WITHIN_SILENCE: Final = 5
"""An owner beats this often within the time after which it is taken for dead: four may be late."""
STALE_S: Final = 60.0
"""A record that has not changed for this long is of a dead owner, by the time stamps of the file server; two clocks of a cluster, where
clients set them, differ by less."""
LOOK_S: Final = 0.25
"""Between two looks at an owner that may live."""
CLAIMS_MOST: Final = 8
"""Newcomers that may claim a root before this one, between its look and its claim."""
DRAIN_MOST_S: Final = 90.0
"""How long a newcomer waits for the last snapshot of an owner without trainers to reach storage: as long as the drain of a pod. Then it
goes on without, and the owner's commit is fenced off."""
RECORD_BYTES: Final = 2048
"""Every record is padded to this length and written in place by one call, so that a reader finds the old one or the new."""
TEXT_MOST: Final = 256
"""Characters of a name or path in a record."""
SHARED_WITHIN_S: Final = 5.0
"""How long a pod looks for the record that the coordinator has written; a network file system may show it late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a session says of itself on its root."""

    session: str
    name: str
    """For people: job and pod, or host and process."""
    root: str = ""
    """As this owner names it."""
    owner: str = ""
    """In a cluster the object that the pods belong to, with its UID: the same for every retry of it. Empty: none, or not known."""
    nonce: str = ""
    """Drawn at the claim: a pod that reads it back shares the root."""
    beats: int = 0
    draining: bool = False
    """It has no trainers any more, and brings to storage what they left."""
    left: bool = False
    """Nothing of it is on its way any more."""

    def encode(self) -> bytes:
        short = replace(self, name=_cut(self.name), root=_cut(self.root), owner=_cut(self.owner))
        return json.dumps(asdict(short)).encode().ljust(RECORD_BYTES)

    @classmethod
    def decode(cls, data: bytes) -> Record | None:
        """None: empty, as older releases leave it, or damaged."""
        try:
            document = json.loads(data)
            return cls(
                session=str(document["session"]),
                name=str(document["name"]),
                root=str(document["root"]),
                owner=str(document.get("owner", "")),
                nonce=str(document["nonce"]),
                beats=int(document["beats"]),
                draining=bool(document["draining"]),
                left=bool(document["left"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


def _cut(text: str) -> str:
    """Printable ASCII: a character is at most two in JSON, and a record never longer than RECORD_BYTES."""
    ascii_only = text.encode("ascii", "backslashreplace").decode()
    return "".join(each if each.isprintable() else "?" for each in ascii_only[:TEXT_MOST])


class State(StrEnum):
    """What a session is in."""

    TRAINING = "training"
    DRAINING = "draining"
    """Without trainers, and something of theirs is on its way to storage."""
    LEFT = "left"


class Verdict(StrEnum):
    """What a record says of its owner."""

    FREE = "free"
    """It may be succeeded at once."""
    UNKNOWN = "unknown"
    """It lives, or has died within STALE_S: its beats tell."""


def judge(record: Record | None, *, served: Collection[str], age_s: float) -> Verdict:
    """
    Pure.

    Args:
        record: of the owner; None: there is none, or it is of a release without records.
        served: this session, and those that this pod knows have ended.
        age_s: since the record was written.
    """
    if record is None or record.left or record.session in served or age_s > STALE_S:
        return Verdict.FREE
    return Verdict.UNKNOWN


# --- looking ---------------------------------------------------------------------------------------------------------


def _folder(root: str) -> str:
    return os.path.join(root, names.INTERNAL_DIR, commit.GENERATIONS)


def read(root: str, generation: int) -> Record | None:
    """
    The record of a session.

    Raises:
        OSError: but for a file that is not there, which is none.
    """
    try:
        with open(os.path.join(_folder(root), str(generation)), "rb") as file:
            return Record.decode(file.read(RECORD_BYTES))
    except FileNotFoundError:
        return None


def _age_s(root: str, generation: int) -> float:
    """Seconds since a record was written, by the clock that sets the time stamps of both it and a new file."""
    probe = os.path.join(_folder(root), f".now-{secrets.token_hex(8)}")
    with open(probe, "xb") as file:
        try:
            file.write(b"\0")
            file.flush()
            now_s = os.fstat(file.fileno()).st_mtime
        finally:
            os.unlink(probe)
    try:
        return now_s - os.stat(os.path.join(_folder(root), str(generation))).st_mtime
    except FileNotFoundError:
        return STALE_S + 1


def wait_until_free(
    root: str,
    *,
    name: str,
    served: Collection[str],
    silent_s: float,
    succeeds: Callable[[Record], bool] = lambda _: False,
) -> int:
    """
    The newest generation of the root, once its owner does not live.

    Args:
        name: of who asks, for the error.
        served: sessions that may be succeeded at once.
        silent_s: an owner that does not beat for this long is dead.
        succeeds: asked once about an owner that lives: whether it is an older attempt of the same job all the same.

    Blocks: up to `silent_s`, when the owner may live; DRAIN_MOST_S more when it drains.

    Raises:
        UsageError: the owner lives; with both names.
        OSError: the root cannot be read or written.
    """
    os.makedirs(_folder(root), exist_ok=True)
    generation = commit.newest_generation(root)
    first = read(root, generation)
    if first is None or judge(first, served=served, age_s=_age_s(root, generation)) is Verdict.FREE:
        return generation
    _log.warning("%s may be in use by %s: waiting up to %.0f s for a sign of life", root, first.name, silent_s)
    until = time.monotonic() + silent_s
    drained_by = time.monotonic() + DRAIN_MOST_S
    while time.monotonic() < until:
        time.sleep(LOOK_S)
        newest = commit.newest_generation(root)
        now = read(root, newest)
        if now is None or judge(now, served=served, age_s=0.0) is Verdict.FREE:
            return newest
        if now.draining and newest == generation:
            # It beats, or has died in it: the latter shows as for any other.
            if now.beats != first.beats and drained_by > time.monotonic():
                first, until = now, min(time.monotonic() + silent_s, drained_by)
            continue
        if newest != generation or now.beats != first.beats:
            if succeeds(now):
                return newest
            raise UsageError(
                f"the root {root} is in use by {now.name}, which lives; this is {name}. A root has one training at a time:"
                " give each a root of its own, or end the other"
            )
    _log.warning("%s has shown no sign of life for %.0f s: its root is given to %s", first.name, silent_s, name)
    return generation


def find_shared(root: str, generation: int, nonce: str) -> bool:
    """
    Whether this root is the one on which the coordinator has written its record.

    Blocks: up to SHARED_WITHIN_S.
    """
    until = time.monotonic() + SHARED_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            record = read(root, generation)
            if record is not None and record.nonce == nonce:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_S)


# --- owning ----------------------------------------------------------------------------------------------------------


def claim(
    root: str,
    record: Record,
    *,
    before: Collection[str] = (),
    silent_s: float,
    succeeds: Callable[[Record], bool] = lambda _: False,
) -> tuple[int, Record]:
    """
    Own the root: the number of this session, and its record as it was written.

    Two that claim at once never get the same number; the later one has seen the record of the earlier one.

    Args:
        before: sessions whose end this pod knows.
        silent_s, succeeds: see `wait_until_free`.

    Raises:
        UsageError: another session lives on the root.
        OSError: the root cannot be written.
    """
    record = replace(record, nonce=secrets.token_hex(16))
    served = {record.session, *before}
    for _ in range(CLAIMS_MOST):
        number = 1 + wait_until_free(root, name=record.name, served=served, silent_s=silent_s, succeeds=succeeds)
        if _create(root, number, record):
            _say_whose(root, number - 1, record)
            _prune(root, number)
            return number, record
    raise UsageError(f"{CLAIMS_MOST} other sessions have begun on the root {root} meanwhile; this is {record.name}")


def _create(root: str, number: int, record: Record) -> bool:
    """Make a record that nobody has made before; whether it is ours. Never seen empty where the file system has hard links."""
    path = os.path.join(_folder(root), str(number))
    temporary = os.path.join(_folder(root), f".{number}-{secrets.token_hex(8)}")
    durable.write_new(temporary, record.encode())
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links.
        try:
            durable.write_new(path, record.encode())
        except FileExistsError:
            return False
    finally:
        os.unlink(temporary)
    durable.fsync_directory(_folder(root))
    return True


def _say_whose(root: str, before: int, record: Record) -> None:
    """Log that the checkpoints here are those of another object, such as a job of the same name that was deleted."""
    with contextlib.suppress(OSError):
        last = read(root, before)
        if last is not None and last.owner and record.owner and last.owner != record.owner:
            _log.warning("%s holds checkpoints of %s: %s continues from them", root, last.owner, record.owner)


def _prune(root: str, number: int) -> None:
    """Only the newest record is needed; the one before stays for a claim that is looking right now."""
    for name in os.listdir(_folder(root)):
        if name.isdecimal() and int(name) < number - 1:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(_folder(root), name))


class Lease:
    """
    Shows that a session lives: counts a beat in its record for as long as it has trainers.

    Args:
        root: the root.
        number: of the session.
        record: as it was written.
        beat_s: between two beats.
        state: what the session is in.

    Owns: one daemon thread, until `close`. A storage that hangs holds up that thread and nothing else.
    """

    def __init__(self, root: str, number: int, record: Record, *, beat_s: float, state: State) -> None:
        self._path = os.path.join(_folder(root), str(number))
        self._record = record
        self._beat_s = beat_s
        self._state = state
        self._changed = threading.Condition()
        self._waiting: list[Callable[[], None]] = []
        self._closed = False
        self._warned = False
        threading.Thread(target=self._run, name="pillion-owner", daemon=True).start()

    def change(self, state: State, written: Callable[[], None]) -> None:
        """What the session is in; `written` is called, in the thread, when the record says so. Blocks: never."""
        with self._changed:
            self._state = state
            self._waiting.append(written)
            self._changed.notify()

    def close(self) -> None:
        """Stop beating; the record stays as it is. Blocks: never."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                waiting, self._waiting = self._waiting, []
                state = self._state
            left, draining = state is State.LEFT, state is State.DRAINING
            if not self._write(replace(self._record, beats=self._record.beats + 1, left=left, draining=draining)):
                return
            for written in waiting:
                written()
            with self._changed:
                if not self._waiting and not self._closed:
                    self._changed.wait(None if left else self._beat_s)

    def _write(self, record: Record) -> bool:
        """Whether the record is still there to be written."""
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(fd, record.encode(), 0)
            finally:
                os.close(fd)
            self._record = record
        except FileNotFoundError:
            return False  # a newer session has removed it
        except OSError as err:
            if not self._warned:
                _log.warning("cannot write this session's sign of life to storage: %s", err)
            self._warned = True
        return True
