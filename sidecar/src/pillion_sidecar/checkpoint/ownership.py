"""
The ownership of a root: at most one living session owns it. `judge` is pure. The rest reads and writes one small file.

Called from: the coordinator's executor (`claim`, `Lease`), every other pod's executor (`find_shared`), and the supervisor of a job of one pod
(`wait_until_free`, before it greets).

    <root>/.pillion/generations/<n>     the record of session number n; the largest n owns the root, and every commit looks for a larger

The owner counts its beats in its record as long as it has trainers, or writes their last snapshot to storage. A new session reads the record:

- An owner that has left, or that this pod or another pod of the job served before, is succeeded at once. So is an owner with a stale record.
- Any other owner is watched. A beat refuses the new session, with both names. Without a beat the new session takes the root.
- An owner that drains has no trainers, and writes their last snapshot. The new session waits for it, at most MAX_DRAIN_S.

How often an owner beats and how long it may be silent is its `rhythm`. An owner counts as dead at the latest `silent_s` after its last beat was seen.
In a directory, no clock of another machine counts for a record younger than STALE_S. In a bucket the store sets every time stamp, so that the new
session waits only for the rest of the silence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Final

from pillion.errors import UsageError
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.session.state import State
from pillion_sidecar.storage.folder import Folder

_log = logging.getLogger(__name__)

BEATS_WITHIN_SILENCE: Final = 5
"""Number of an owner's beats within the silence after which it counts as dead: four beats may be late."""
STALE_S: Final = 60.0
"""(a directory) Age after which a record is of a dead owner, by the time stamps of the file server, unless owners may be silent for longer. Where
clients set the time stamps, the clocks of a cluster differ by less than this."""
LOOK_S: Final = 0.25
"""Pause between two checks of an owner that may live. In a bucket, where each is two requests: 4 times as long."""
BUCKET_SILENCE: Final = 9.0
"""Factor of the silence in a bucket. A store charges for each request: a beat every 30 s is 2,900 PUT a day, one every 2 s is 43,000."""
BUCKET_BEATS: Final = 3
"""(a bucket) Number of an owner's beats within the silence: two beats may be late. A beat repeats its requests for longer than it may be late."""
MAX_CLAIMS: Final = 8
"""Maximum of other sessions that may claim a root between this session's check and its claim."""
MAX_DRAIN_S: Final = 90.0
"""Timeout for the last snapshot of an owner without trainers to reach storage: as long as the drain of a pod. Then the new session takes the
root, and the fence refuses the owner's commit."""
RECORD_BYTES: Final = 2048
"""Length of every record, bytes. One call writes the padded record in place, so that a reader sees the old record or the new one."""
MAX_TEXT_CHARS: Final = 256
"""Maximum of characters of a name or path in a record."""
SHARED_WITHIN_S: Final = 5.0
"""Timeout for the coordinator's record to appear in another pod. A network file system may show it late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of a session on its root."""

    session: str
    name: str
    """Name of the owner for people: job and pod, or host and process."""
    root: str = ""
    """The root as this owner names it."""
    owner: str = ""
    """The object of the cluster that the pods belong to, with its UID. Every retry of it has the same. Empty: no such object, or not known."""
    nonce: str = ""
    """Random number of the claim. A pod that reads it back shares the root."""
    line: str = ""
    """Random number of the root's first session, which all later ones take over. A root that was emptied and used again has another."""
    beats: int = 0
    draining: bool = False
    """Whether the session has no trainers any more, and writes their last snapshot to storage."""
    left: bool = False
    """Whether the session has ended, and writes nothing any more."""

    def encode(self) -> bytes:
        short = replace(self, name=_cut(self.name), root=_cut(self.root), owner=_cut(self.owner))
        return json.dumps(asdict(short)).encode().ljust(RECORD_BYTES)

    @classmethod
    def decode(cls, data: bytes) -> Record | None:
        """Read a record; None: it is damaged, or empty, as older releases leave it."""
        try:
            document = json.loads(data)
            return cls(
                session=str(document["session"]),
                name=str(document["name"]),
                root=str(document["root"]),
                owner=str(document.get("owner", "")),
                nonce=str(document["nonce"]),
                line=str(document.get("line", "")),
                beats=int(document["beats"]),
                draining=bool(document["draining"]),
                left=bool(document["left"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


def _cut(text: str) -> str:
    """
    Cut a text, and make it printable ASCII.

    A character is then at most two in JSON, so that a record is never longer than RECORD_BYTES.
    """
    ascii_only = text.encode("ascii", "backslashreplace").decode()
    return "".join(each if each.isprintable() else "?" for each in ascii_only[:MAX_TEXT_CHARS])


class Verdict(StrEnum):
    """The state of an owner, by its record."""

    FREE = "free"
    """The owner is dead or has left: a new session may succeed it at once."""
    UNKNOWN = "unknown"
    """The owner lives, or has died a short time ago. Its beats show which."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """The rhythm of the owners of a root, seconds."""

    silent_s: float
    """Silence after which an owner is dead."""
    beat_s: float
    """Time between two beats."""
    stale_s: float
    """Age after which a record is of a dead owner."""
    look_s: float
    """Pause between two checks of an owner."""
    age_counts: bool
    """Whether the age of a record is a part of the silence: one clock sets all time stamps."""


def rhythm(root: Folder, owner_silent_s: float) -> Rhythm:
    """
    Return the rhythm of a root's owners. Pure.

    Args:
        owner_silent_s: the setting of that name.
    """
    if root.path is not None:
        return Rhythm(
            silent_s=owner_silent_s,
            beat_s=owner_silent_s / BEATS_WITHIN_SILENCE,
            stale_s=max(STALE_S, owner_silent_s),
            look_s=LOOK_S,
            age_counts=False,
        )
    silent_s = owner_silent_s * BUCKET_SILENCE
    return Rhythm(
        silent_s=silent_s, beat_s=silent_s / BUCKET_BEATS, stale_s=silent_s, look_s=4 * LOOK_S, age_counts=True
    )


def judge(record: Record | None, *, served: Collection[str], age_s: float, stale_s: float = STALE_S) -> Verdict:
    """
    Judge an owner by its record. Pure.

    Args:
        record: the owner's record; None: there is none, or a release without records wrote it.
        served: this session, and the sessions that have ended, as far as this pod knows.
        age_s: age of the record, seconds.
        stale_s: age after which its owner is dead, seconds.
    """
    if record is None or record.left or record.session in served or age_s > stale_s:
        return Verdict.FREE
    return Verdict.UNKNOWN


# --- looking ---------------------------------------------------------------------------------------------------------


def read(root: Folder, generation: int) -> Record | None:
    """
    Return the record of a session; None: its file is missing, damaged or empty.

    Raises:
        OSError: the storage failed.
    """
    try:
        return Record.decode(commit.generations_folder(root).read(str(generation)))
    except FileNotFoundError:
        return None


def seen_ns(root: Folder, generation: int) -> int:
    """Return the time of a session's last sign of life, by the clock of the storage, nanoseconds since 1970; 0: not known."""
    try:
        entry = commit.generations_folder(root).entry(str(generation)) if generation else None
    except OSError:
        return 0
    return 0 if entry is None else entry.modified_ns


def _age_s(root: Folder, generation: int) -> float:
    """
    Return the age of a record in seconds; infinite if the record is gone.

    A new file's time stamp is compared with the record's, so that the same clock sets both.
    """
    folder, probe = commit.generations_folder(root), f".now-{secrets.token_hex(8)}"
    folder.put(probe, b"\0")
    try:
        files = folder.files()
    finally:
        folder.delete([probe])
    if str(generation) not in files or probe not in files:
        return math.inf
    return (files[probe].modified_ns - files[str(generation)].modified_ns) / 1e9


def living(root: Folder, silent_s: float) -> Record | None:
    """
    Return the record of the training that uses the root, or may use it; None: none does.

    Called from: the command line, which does not wait for a beat.

    Raises: OSError: the root cannot be read, or no file can be written there.
    """
    generation = commit.newest_generation(root)
    record = read(root, generation) if generation else None
    if record is None or record.left:
        return None
    verdict = judge(record, served=(), age_s=_age_s(root, generation), stale_s=rhythm(root, silent_s).stale_s)
    return None if verdict is Verdict.FREE else record


def wait_until_free(
    root: Folder,
    *,
    name: str,
    served: Collection[str],
    silent_s: float,
    succeeds: Callable[[Record], bool] = lambda _: False,
) -> int:
    """
    Wait until the owner of the root does not live, and return the newest generation.

    Args:
        name: name of this session, for the error.
        served: sessions that may be succeeded at once.
        silent_s: the setting `owner_silent_s`, seconds.
        succeeds: called for an owner that lives, and in a bucket for one that may live. Returns whether it is an older attempt of the same job, and
            may be succeeded.

    Blocks: up to the silence of the root's rhythm if the owner may live; MAX_DRAIN_S more if it drains.

    Raises:
        UsageError: the owner lives. Has both names.
        OSError: the root cannot be read or written.
    """
    commit.generations_folder(root).make()
    generation = commit.newest_generation(root)
    first = read(root, generation)
    if first is None:
        return generation
    owners = rhythm(root, silent_s)
    age_s = _age_s(root, generation)
    if judge(first, served=served, age_s=age_s, stale_s=owners.stale_s) is Verdict.FREE:
        return generation
    rest_s = owners.silent_s - (max(0.0, age_s) if owners.age_counts else 0.0)
    until = time.monotonic() + rest_s
    drained_by = time.monotonic() + MAX_DRAIN_S
    if owners.age_counts and not first.draining and succeeds(first):
        return generation  # a beat would take as long as the rest of this function
    _log.warning("%s may be in use by %s: waiting up to %.0f s for a sign of life", root, first.name, rest_s)
    while time.monotonic() < until:
        time.sleep(owners.look_s)
        newest = commit.newest_generation(root)
        now = read(root, newest)
        if now is None or judge(now, served=served, age_s=0.0) is Verdict.FREE:
            return newest
        if now.draining and newest == generation:
            # The owner beats, or has died while it drained. Its silence shows the death, as for any other owner.
            if now.beats != first.beats and drained_by > time.monotonic():
                first, until = now, min(time.monotonic() + owners.silent_s, drained_by)
            continue
        if newest != generation or now.beats != first.beats:
            if succeeds(now):
                return newest
            raise UsageError(
                f"the root {root} is in use by {now.name}, which lives; this is {name}. A root has one training at a time:"
                " give each a root of its own, or end the other"
            )
    _log.warning("%s has shown no sign of life for %.0f s: its root is given to %s", first.name, owners.silent_s, name)
    return generation


def find_shared(root: Folder, generation: int, nonce: str) -> bool:
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
    root: Folder,
    record: Record,
    *,
    before: Collection[str] = (),
    silent_s: float,
    succeeds: Callable[[Record], bool] = lambda _: False,
) -> tuple[int, Record]:
    """
    Claim the root. Return the number of this session, and its record as it was written.

    Two sessions that claim at once never get the same number. The later one has seen the record of the earlier one.

    Args:
        before: sessions that have ended, as far as this pod knows.
        silent_s, succeeds: see `wait_until_free`.

    Raises:
        UsageError: another session lives on the root.
        OSError: the root cannot be written.
    """
    record = replace(record, nonce=secrets.token_hex(16))
    served = {record.session, *before}
    for _ in range(MAX_CLAIMS):
        number = 1 + wait_until_free(root, name=record.name, served=served, silent_s=silent_s, succeeds=succeeds)
        # The record of the session before is damaged at worst; the one before that is kept as well.
        last = next(filter(None, (read(root, each) for each in (number - 1, number - 2) if each > 0)), None)
        record = replace(record, line=(last.line if last is not None else "") or secrets.token_hex(16))
        if commit.generations_folder(root).create(str(number), record.encode()):
            _say_whose(root, last, record)
            _prune(root, number)
            return number, record
    raise UsageError(f"{MAX_CLAIMS} other sessions have begun on the root {root} meanwhile; this is {record.name}")


def _say_whose(root: Folder, last: Record | None, record: Record) -> None:
    """Log if the checkpoints on the root belong to another object, such as a deleted job of the same name."""
    if last is not None and last.owner and record.owner and last.owner != record.owner:
        _log.warning("%s holds checkpoints of %s: %s continues from them", root, last.owner, record.owner)


def _prune(root: Folder, number: int) -> None:
    """Delete all records but the newest two. The second newest stays for another session that checks the root right now."""
    folder = commit.generations_folder(root)
    folder.delete([name for name in folder.files() if name.isdecimal() and int(name) < number - 1])


class Lease:
    """
    Shows that a session lives: counts a beat in its record as long as it has trainers.

    Args:
        root: the root.
        number: number of the session.
        record: the record as it was written.
        beat_s: time between two beats, seconds.
        state: state of the session.

    Owns: one daemon thread, until `close`. If the storage hangs, only that thread waits.
    """

    def __init__(self, root: Folder, number: int, record: Record, *, beat_s: float, state: State) -> None:
        self._folder, self._name = commit.generations_folder(root), str(number)
        self._record = record
        self._beat_s = beat_s
        self._state = state
        self._changed = threading.Condition()
        self._waiting: list[Callable[[], None]] = []
        self._closed = False
        self._warned = False
        threading.Thread(target=self._run, name="pillion-owner", daemon=True).start()

    def change(self, state: State, written: Callable[[], None]) -> None:
        """Change the session's state. The thread calls `written` when the record has the new state. Blocks: never."""
        with self._changed:
            self._state = state
            self._waiting.append(written)
            self._changed.notify()

    def close(self) -> None:
        """Stop the beats. The record stays as it is. Blocks: never."""
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
            # A record that says so already keeps its time: the end of the session.
            if not (left and self._record.left) and not self._write(
                replace(self._record, beats=self._record.beats + 1, left=left, draining=draining)
            ):
                return
            for written in waiting:
                written()
            with self._changed:
                if not self._waiting and not self._closed:
                    self._changed.wait(None if left else self._beat_s)

    def _write(self, record: Record) -> bool:
        """Write the record. Return False if the record was removed, by a newer session."""
        try:
            if not self._folder.overwrite(self._name, record.encode()):
                return False  # a newer session has removed it
            self._record = record
        except OSError as err:
            if not self._warned:
                _log.warning("cannot write this session's sign of life to storage: %s", err)
            self._warned = True
        return True
