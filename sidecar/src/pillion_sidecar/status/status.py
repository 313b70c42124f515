"""
The status of this sidecar: counters, the newest failures, and the cause and times of each save. No I/O; clocks are arguments.

Called from: `supervisor.staging`, `supervisor.persister`, `supervisor.loader` (they report events), `reporting.prometheus` and
`reporting.reporter` (they read).
Must never: grow without a limit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from pillion.errors import PillionError
from pillion.wire import home
from pillion.wire.load_messages import Tier
from pillion_sidecar import channel
from pillion_sidecar.interval import Interval, Measurements
from pillion_sidecar.run import journal
from pillion_sidecar.run.ledger import Ledger
from pillion_sidecar.status.metrics import Metrics
from pillion_sidecar.status.save_requests import SaveRequests
from pillion_sidecar.waits import Wait, WaitKind

KEPT_SAVES: Final = 256
"""Maximum saves whose entries are kept. Far fewer are in flight at once."""
STALL_REPORTED_S: Final = 10.0
"""Silence of the storage after which it is reported, long before its timeout. A block of 8 MiB takes milliseconds."""
RECENT_COMMITS: Final = 8
"""Number of newest commits whose slowest estimates the duration of a drain. Older ones do not count: the first save is slow, and the storage
may have been busy."""
TRAINER_DIED: Final = "TrainerDied"
"""Error kind of a rank whose trainer ended before its seal."""
STORAGE_ERRORS: Final = frozenset({"PersistError", "CommitError"})
"""Error kinds of a save that the storage has probably caused."""


def rfc3339(seconds: float) -> str:
    """Return a time in seconds since 1970 as reports have it: RFC 3339, UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Entry:
    """Cause and times of one save."""

    began_s: float
    """Monotonic time of the first claim."""
    began_ns: int
    """Wall clock time of the first claim."""
    cause: home.Cause
    stall_s: float = 0.0
    waited_s: float = 0.0
    """Seconds that its slowest claim has waited for a slot."""
    ready_s: float | None = None
    """Monotonic time at which the last local rank sealed it, or a rescue sent it to storage. None: not yet."""
    queued_s: float = 0.0
    """Seconds from `ready_s` until the executor began."""
    persist: bool = False
    """Whether it is meant for storage from the start."""
    last: bool = False
    """True if it began after the end of the pod was announced, and is meant for storage."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The newest load since this sidecar started."""

    step: int
    tier: Tier
    time_s: float


@dataclass(frozen=True, slots=True)
class Commit:
    """The newest commit since this sidecar started."""

    step: int
    time_s: float


@dataclass(frozen=True, slots=True)
class About:
    """What a save's manifest says of it besides what is in it."""

    started_ns: int
    """When it began, wall clock; 0: nobody knows."""
    cause: home.Cause
    run: Mapping[str, Any] | None = None
    """The run's journal, with this save. None: this sidecar does not write it."""


class SidecarStatus:
    """
    The status of this sidecar. See the module.

    Args:
        clock: returns monotonic seconds.
        wall: returns seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.metrics = Metrics()
        self.save_requests = SaveRequests()
        self.run = Ledger(wall)
        self.measured = Measurements()
        """What persisted saves of the session cost."""
        self.interval: Interval | None = None
        """The automatic interval. None: the policy has none, or nothing is measured yet. `supervisor.pacing` writes it."""
        self.failures: deque[home.Failure] = deque(maxlen=home.MAX_FAILURES)
        self.commit: Commit | None = None
        self.storage_problem = ""
        """Why the last save could not be persisted. Empty after the next commit."""
        self.memory_problem = ""
        """Why the arena is too small for the trainers' state. Empty: it is large enough."""
        self.quota_problem = ""
        """Why the checkpoints have more bytes than `retention.maxBytes`. Empty: they have not, or there is no quota."""
        self.local_problem = ""
        """Why the last save went on without the local disks. Empty after the next one that did not."""
        self._held_s: dict[int, float] = {}
        """Step -> when every pod had it on its local disk, seconds since 1970."""
        self._waiting: tuple[int, ...] = ()
        self.loaded: Loaded | None = None
        self._drains_s: deque[float] = deque(maxlen=RECENT_COMMITS)
        self._stalled = False
        self.terminating = False
        """True once the end of the pod was announced. Later saves have the cause OnTermination."""
        self.last_save_committed = False
        """True once a save that began after the announcement is on storage."""
        self.trainers_end = False
        """True once the trainers are ended. Then an unfinished staging is not a failure."""
        self._listeners: list[Callable[[], None]] = []
        self._clock = clock
        self._wall = wall
        self._saves: dict[int, Entry] = {}

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` at each change that a report must have soon: a commit, a failure, the outcome of a requested save."""
        self._listeners.append(listener)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    # --- saves -------------------------------------------------------------------------------------------------------

    def began(self, step: int, *, persist: bool) -> None:
        """Note that the first rank of this pod has claimed a slot for `step`."""
        cause = home.Cause.PERIODIC
        if persist:
            if self.terminating:
                cause = home.Cause.ON_TERMINATION
            elif self.save_requests.waiting:
                cause = home.Cause.ON_DEMAND
            self.save_requests.began(step)
        is_last = cause is home.Cause.ON_TERMINATION
        self._saves[step] = Entry(self._clock(), int(self._wall() * 1e9), cause, persist=persist, last=is_last)
        while len(self._saves) > KEPT_SAVES:
            del self._saves[next(iter(self._saves))]

    def sealed(self, step: int, stall_s: float) -> None:
        """Note that a rank has sealed its slot, which held up its training loop for `stall_s` (0: not measured)."""
        entry = self._saves.get(step)
        if entry is not None:
            entry.stall_s = max(entry.stall_s, stall_s)

    def waited(self, step: int, waited_s: float) -> None:
        """Note that a rank's claim for `step` has waited for a slot."""
        entry = self._saves.get(step)
        if entry is not None:
            entry.waited_s = max(entry.waited_s, waited_s)

    def complete(self, step: int) -> None:
        """Note that the last rank of this pod has sealed its slot."""
        entry = self._saves.get(step)
        if entry is None:
            return
        entry.ready_s = self._clock()
        self.metrics.stages += 1
        self.metrics.stage_seconds += entry.ready_s - entry.began_s
        if entry.stall_s:
            self.metrics.stalls += 1
            self.metrics.stall_seconds += entry.stall_s
            self.run.stalled(entry.stall_s, entry.waited_s)
        if entry.persist:
            # Without a wait for a slot, which comes before the begin: a longer period would not shorten it, but make it longer still.
            self.measured.staged(step, entry.began_s, min(entry.stall_s, entry.ready_s - entry.began_s))

    def rescued(self, step: int) -> None:
        """Note that a rescue sends a snapshot to storage."""
        entry = self._saves.setdefault(step, Entry(self._clock(), 0, home.Cause.ON_TERMINATION))
        entry.cause = home.Cause.ON_TERMINATION
        entry.ready_s = self._clock()

    def taken_up(self, step: int) -> None:
        """Note that the executor begins with a save. If it begins again, the time in the queue lasts until the last begin."""
        entry = self._saves.get(step)
        if entry is not None and entry.ready_s is not None:
            entry.queued_s = self._clock() - entry.ready_s

    def since_ready(self, step: int, outcome: channel.Persisted) -> channel.Persisted:
        """Return the executor's outcome with the time in the queue added to `persist_s`, which the executor cannot know."""
        entry = self._saves.get(step)
        return replace(outcome, persist_s=outcome.persist_s + (entry.queued_s if entry is not None else 0.0))

    def about(self, step: int) -> About:
        """Return further fields of a save's manifest: its begin and its cause."""
        entry = self._saves.get(step)
        if entry is None:
            return About(0, home.Cause.PERIODIC)
        return About(entry.began_ns, entry.cause, self.run.pending(self._save(step, entry)))

    def journal_with(self, step: int) -> Mapping[str, Any] | None:
        """Return the run's journal for the commit of `step`; see `channel.Persist.run`."""
        return self.about(step).run

    @staticmethod
    def _save(step: int, entry: Entry) -> journal.Save:
        return journal.Save(
            number=0,
            step=step,
            began_ns=entry.began_ns,
            stall_s=round(entry.stall_s, 6),
            queued_s=round(entry.queued_s, 3),
            cause=entry.cause.value,
        )

    def committed(self, step: int, outcome: channel.Persisted) -> None:
        """Note that a save is committed. `outcome`: the result of `since_ready`."""
        metrics, now_s = self.metrics, self._wall()
        metrics.saves_committed += 1
        metrics.persisted_bytes += outcome.size_bytes
        metrics.persist_seconds += outcome.persist_s
        if step in self._saves:
            entry = self._saves[step]
            metrics.queue_seconds += entry.queued_s
            written = replace(
                self._save(step, entry),
                committed_ns=int(now_s * 1e9),
                bytes=outcome.size_bytes,
                persist_s=round(max(0.0, outcome.persist_s - entry.queued_s), 3),
                commit_s=round(outcome.commit_s, 3),
            )
            self.run.committed(written)
            self.last_save_committed = self.last_save_committed or self._saves[step].last
        metrics.commit_seconds += outcome.commit_s
        self._drains_s.append(outcome.persist_s + outcome.commit_s)
        self.measured.committed(outcome.persist_s + outcome.commit_s)
        metrics.last_committed_step = step
        metrics.last_committed_timestamp = now_s
        self.commit = Commit(step, now_s)
        self.storage_problem = ""
        self.save_requests.ended(step, None)
        self._notify()

    def paced(self, interval: Interval) -> None:
        """Note the automatic interval that holds now."""
        self.interval = interval
        self._notify()

    # --- local disks -------------------------------------------------------------------------------------------------

    def held(self, step: int, outcome: channel.Persisted) -> None:
        """Note that every pod has a save on its local disk."""
        self.metrics.saves_held += 1
        self.metrics.last_held_step = step
        self._held_s[step] = self._wall()
        while len(self._held_s) > KEPT_SAVES:
            del self._held_s[next(iter(self._held_s))]
        self.local_disk("")

    def local_disk(self, problem: str) -> None:
        """Note why a save went on without the local disks. Empty: it did not."""
        self.metrics.saves_unheld += bool(problem)
        if problem != self.local_problem:
            self.local_problem = problem
            self._notify()

    def uploads_wait(self, steps: Sequence[int]) -> None:
        """Note the steps that are on the local disks, and not on storage yet; oldest first."""
        self.metrics.uploads_waiting = len(steps)
        self._waiting = tuple(steps)

    def waiting(self) -> tuple[home.HeldSave, ...]:
        """Return the saves that wait for storage on the local disks, newest first."""
        found = []
        for step in reversed(self._waiting[-home.MAX_HELD :]):
            entry = self._saves.get(step)
            cause = entry.cause if entry is not None else home.Cause.PERIODIC
            held = rfc3339(self._held_s[step]) if step in self._held_s else ""
            found.append(home.HeldSave(step=step, held=held, cause=cause.value))
        return tuple(found)

    @property
    def behind_s(self) -> float:
        """Age of the oldest save that is on the local disks and waits for storage, seconds. 0: none waits."""
        since = [self._held_s[step] for step in self._waiting if step in self._held_s]
        return max(0.0, self._wall() - min(since)) if since else 0.0

    def upload_failed(self, step: int, error: PillionError) -> None:
        """Note that an upload has failed. The save is on the local disks, and the upload is tried again."""
        self.metrics.uploads_failed += 1
        self.storage_problem = str(error)
        self._note(step, type(error).__name__, str(error))
        self._notify()

    # --- storage -----------------------------------------------------------------------------------------------------

    def waits(self, wait: Wait | None) -> None:
        """Note the executor's current wait, a few times a minute, and report storage that hangs. None: the executor does not wait."""
        for_s = wait.for_s if wait is not None and wait.kind is WaitKind.STORAGE else 0.0
        stalled = for_s > STALL_REPORTED_S
        self.metrics.storage_stalled_seconds = for_s if stalled else 0.0
        if stalled and wait is not None:
            self.storage_problem = f"storage has not answered for {for_s:.0f} s ({wait.what})"
        elif self._stalled:
            self.storage_problem = ""
        if stalled != self._stalled:
            self._stalled = stalled
            self._notify()

    @property
    def drain_s(self) -> float:
        """Seconds from the seal to the commit, of the slowest of the last RECENT_COMMITS saves. 0: there was no commit."""
        return round(max(self._drains_s, default=0.0), 3)

    def memory(self, problem: str) -> None:
        """Note why the arena is too small. Empty: it is large enough."""
        if problem != self.memory_problem:
            self.memory_problem = problem
            self._notify()

    def quota(self, problem: str) -> None:
        """Note why the checkpoints exceed their quota after a retention. Empty: they do not."""
        if problem != self.quota_problem:
            self.quota_problem = problem
            self._notify()

    def problems(self) -> tuple[str, ...]:
        """Return what is wrong now with storage, memory and quota."""
        return tuple(each for each in (self.storage_problem, self.memory_problem, self.quota_problem) if each)

    def snapshot(self) -> None:
        """Note that a save that stays in memory is sealed on every rank of the job."""
        self.metrics.snapshots += 1
        self.run.snapshot()

    def failed(self, step: int, error: PillionError) -> None:
        """Note that a save has failed. If its trainers ended before the seal, it counts as interrupted instead."""
        kind, text = type(error).__name__, str(error)
        if self.trainers_end or is_interrupted(error):
            self.metrics.saves_interrupted += 1
            self.save_requests.ended(step, f"{kind}: {text}")
            self._notify()
            return
        self.metrics.saves_failed += 1
        self.run.failed()
        self.metrics.failures_by_kind[kind] = self.metrics.failures_by_kind.get(kind, 0) + 1
        if kind in STORAGE_ERRORS:
            self.storage_problem = text
        self._note(step, kind, text)
        self.save_requests.ended(step, f"{kind}: {text}")
        self._notify()

    def abandoned(self, step: int, error: PillionError) -> None:
        """Note that a rank has given up a save before any rank of this pod claimed a slot for it."""
        self.save_requests.began(step)
        self.failed(step, error)

    def dropped(self, step: int, error: PillionError, *, persist: bool) -> None:
        """Note that the policy's `overlap` skipped or replaced a save. It is not a failure, but there is no checkpoint."""
        self.run.dropped()
        if persist and step not in self._saves:
            self.save_requests.began(step)
        self.save_requests.ended(step, str(error))
        self._notify()

    # --- loads -------------------------------------------------------------------------------------------------------

    def refused(self, where: str, why: str) -> None:
        """Note that a load has skipped a corrupt or lost checkpoint. `where`: its tier and step, such as `storage:20`."""
        self.metrics.checkpoints_refused += 1
        step = where.rpartition(":")[2]
        self._note(int(step) if step.isdigit() else -1, home.CHECKPOINT_REFUSED, f"{where}: {why}")
        self._notify()

    def loaded_from(self, step: int, tier: Tier) -> None:
        """Note that every rank of this pod has loaded a checkpoint."""
        self.loaded = Loaded(step, tier, self._wall())
        self._notify()

    def load_failed(self, step: int | None, kind: str, text: str) -> None:
        """Note that a load has failed on every rank of this pod."""
        self._note(-1 if step is None else step, home.LOAD_FAILED, f"{kind}: {text}")
        self._notify()

    def _note(self, step: int, kind: str, text: str) -> None:
        self.failures.append(
            home.Failure(step=step, reason=kind, message=text[: home.TEXT_LIMIT], time=rfc3339(self._wall()))
        )


def is_interrupted(error: PillionError) -> bool:
    """Whether a save failed only because trainers ended."""
    ranks = getattr(error, "failures", {})
    return bool(ranks) and all(failure.type_name == TRAINER_DIED for failure in ranks.values())
