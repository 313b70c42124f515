"""
The whole of: what became of each save and load in this pod, written down once: counters, causes, times, the newest failures.

Called from: `supervisor.staging`, `supervisor.persister`, `supervisor.loader` (events), `reporting.prometheus` and `reporting.reporter` (read). No I/O; clocks are arguments of the constructor.
Must never: keep more than a bounded number of anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pillion.errors import PillionError
from pillion.wire import home
from pillion_sidecar.status.metrics import Metrics
from pillion_sidecar.status.save_requests import SaveRequests
from pillion_sidecar.waits import WaitKind

KEPT_SAVES: Final = 256
"""Saves that are remembered from their begin on; far more than are on their way at once."""
STALL_TOLD_S: Final = 10.0
"""Storage that stands still for this long is told, long before it is given up: a block of 8 MiB takes milliseconds."""
SLOWEST_OF: Final = 8
"""Commits whose slowest says what a drain takes: a first save is slow, and a busy hour of the storage is not for ever."""
TRAINER_DIED: Final = "TrainerDied"
"""What a rank's failure is called whose trainer ended before it had sealed."""
STORAGE_ERRORS: Final = frozenset({"PersistError", "CommitError"})
"""Errors of a save that are the storage's, as far as a pod can tell."""


def rfc3339(seconds: float) -> str:
    """A time since 1970 as reports have it: UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Entry:
    """One save."""

    began_s: float
    began_ns: int
    cause: home.Cause
    stall_s: float = 0.0
    ready_s: float | None = None
    """When its last local rank had sealed it, or a rescue had called for it."""
    queued_s: float = 0.0
    """From then until the executor took it up."""
    last: bool = False
    """Begun for storage after the pod was to end."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The newest load since this sidecar started."""

    step: int
    tier: str
    time_s: float


@dataclass(frozen=True, slots=True)
class Commit:
    """The newest commit since this sidecar started."""

    step: int
    time_s: float


class SidecarStatus:
    """
    See the module.

    Args:
        clock: monotonic seconds.
        wall: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.metrics = Metrics()
        self.demands = SaveRequests()
        self.failures: deque[home.Failure] = deque(maxlen=home.MAX_FAILURES)
        self.commit: Commit | None = None
        self.storage_problem = ""
        """Why the last save could not be persisted; empty again with the next commit."""
        self.memory_problem = ""
        """Why the arena is too small for what the trainers will stage; empty: it is not."""
        self.loaded: Loaded | None = None
        self._drains_s: deque[float] = deque(maxlen=SLOWEST_OF)
        self._stalled = False
        self.terminating = False
        """The pod is to end: saves are made for that from here on."""
        self.last_save_committed = False
        """A save that was begun after that is on storage."""
        self.trainers_end = False
        """They are ended, or end by themselves: what they were staging is no failure."""
        self._listeners: list[Callable[[], None]] = []
        self._clock = clock
        self._wall = wall
        self._saves: dict[int, Entry] = {}

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` when something happens that others wait for: a commit, a failure, an answer to a save that was requested."""
        self._listeners.append(listener)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    # --- saves -------------------------------------------------------------------------------------------------------

    def began(self, step: int, *, persist: bool) -> None:
        """The first rank of this pod claimed a slot for `step`."""
        cause = home.Cause.PERIODIC
        if persist:
            if self.terminating:
                cause = home.Cause.ON_TERMINATION
            elif self.demands.waiting:
                cause = home.Cause.ON_DEMAND
            self.demands.began(step)
        self._saves[step] = Entry(
            self._clock(), int(self._wall() * 1e9), cause, last=cause is home.Cause.ON_TERMINATION
        )
        while len(self._saves) > KEPT_SAVES:
            del self._saves[next(iter(self._saves))]

    def sealed(self, step: int, stall_s: float) -> None:
        """A rank sealed its slot; `stall_s` is how long its training loop was held up, 0 where it does not say."""
        entry = self._saves.get(step)
        if entry is not None:
            entry.stall_s = max(entry.stall_s, stall_s)

    def complete(self, step: int) -> None:
        """The last rank of this pod sealed its slot."""
        entry = self._saves.get(step)
        if entry is None:
            return
        entry.ready_s = self._clock()
        self.metrics.stages += 1
        self.metrics.stage_seconds += entry.ready_s - entry.began_s
        if entry.stall_s:
            self.metrics.stalls += 1
            self.metrics.stall_seconds += entry.stall_s

    def rescued(self, step: int) -> None:
        """A snapshot goes to storage, as its trainer cannot make another."""
        entry = self._saves.setdefault(step, Entry(self._clock(), 0, home.Cause.ON_TERMINATION))
        entry.cause = home.Cause.ON_TERMINATION
        entry.ready_s = self._clock()

    def taken_up(self, step: int) -> None:
        """The executor begins with a save; one that it begins again has waited for as long as until the last time."""
        entry = self._saves.get(step)
        if entry is not None and entry.ready_s is not None:
            entry.queued_s = self._clock() - entry.ready_s

    def since_ready(self, step: int, outcome: Mapping[str, Any]) -> dict[str, Any]:
        """The executor's outcome with a `persist_s` that begins at the seal: the executor knows only its own part."""
        entry = self._saves.get(step)
        return {**outcome, "persist_s": float(outcome["persist_s"]) + (entry.queued_s if entry is not None else 0.0)}

    def about(self, step: int) -> dict[str, Any]:
        """What a save's manifest says of it besides what is in it."""
        entry = self._saves.get(step)
        if entry is None:
            return {"started_ns": 0, "cause": home.Cause.PERIODIC.value}
        return {"started_ns": entry.began_ns, "cause": entry.cause.value}

    def committed(self, step: int, outcome: Mapping[str, Any]) -> None:
        """A save is on storage, and visible; `outcome` is that of `since_ready`."""
        metrics, now_s = self.metrics, self._wall()
        metrics.saves_committed += 1
        metrics.persisted_bytes += int(outcome["size_bytes"])
        metrics.persist_seconds += float(outcome["persist_s"])
        if step in self._saves:
            metrics.queue_seconds += self._saves[step].queued_s
            self.last_save_committed = self.last_save_committed or self._saves[step].last
        metrics.commit_seconds += float(outcome["commit_s"])
        self._drains_s.append(float(outcome["persist_s"]) + float(outcome["commit_s"]))
        metrics.last_committed_step = step
        metrics.last_committed_timestamp = now_s
        self.commit = Commit(step, now_s)
        self.storage_problem = ""
        self.demands.ended(step, None)
        self._notify()

    def waits(self, waits: Mapping[str, Any] | None) -> None:
        """What the executor waits for, a few times a minute; None: nothing. A storage that hangs is told while it does."""
        for_s = float(waits["for_s"]) if waits is not None and waits["kind"] == WaitKind.STORAGE else 0.0
        stalled = for_s > STALL_TOLD_S
        self.metrics.storage_stalled_seconds = for_s if stalled else 0.0
        if stalled and waits is not None:
            self.storage_problem = f"storage has not answered for {for_s:.0f} s ({waits['what']})"
        elif self._stalled:
            self.storage_problem = ""
        if stalled != self._stalled:
            self._stalled = stalled
            self._notify()

    @property
    def drain_s(self) -> float:
        """The slowest of the last commits, from the seal until it was visible; 0: there was none."""
        return round(max(self._drains_s, default=0.0), 3)

    def memory(self, problem: str) -> None:
        """What was found of the arena's room."""
        if problem != self.memory_problem:
            self.memory_problem = problem
            self._notify()

    def snapshot(self) -> None:
        """A save that stays in memory is sealed on every rank of the job."""
        self.metrics.snapshots += 1

    def failed(self, step: int, error: PillionError) -> None:
        """A save is lost. One whose trainers ended before they had sealed it is no failure of saving."""
        kind, text = type(error).__name__, str(error)
        if self.trainers_end or is_interrupted(error):
            self.metrics.saves_interrupted += 1
            self.demands.ended(step, f"{kind}: {text}")
            self._notify()
            return
        self.metrics.saves_failed += 1
        self.metrics.failures_by_kind[kind] = self.metrics.failures_by_kind.get(kind, 0) + 1
        if kind in STORAGE_ERRORS:
            self.storage_problem = text
        self._note(step, kind, text)
        self.demands.ended(step, f"{kind}: {text}")
        self._notify()

    def abandoned(self, step: int, error: PillionError) -> None:
        """A rank gave a save up before any rank of this pod had claimed a slot for it."""
        self.demands.began(step)
        self.failed(step, error)

    def dropped(self, step: int, error: PillionError, *, persist: bool) -> None:
        """A save was skipped or replaced, as the policy's `overlap` says: no failure, yet no checkpoint either."""
        if persist and step not in self._saves:
            self.demands.began(step)
        self.demands.ended(step, str(error))
        self._notify()

    # --- loads -------------------------------------------------------------------------------------------------------

    def refused(self, where: str, why: str) -> None:
        """A load passed a checkpoint over that is corrupt or lost; `where` is its tier and step."""
        self.metrics.checkpoints_refused += 1
        step = where.rpartition(":")[2]
        self._note(int(step) if step.isdigit() else -1, home.CHECKPOINT_REFUSED, f"{where}: {why}")
        self._notify()

    def loaded_from(self, step: int, tier: str) -> None:
        """A load gave every rank of this pod a checkpoint."""
        self.loaded = Loaded(step, tier, self._wall())
        self._notify()

    def load_failed(self, step: int | None, kind: str, text: str) -> None:
        """A load ended with an error on every rank of this pod."""
        self._note(-1 if step is None else step, home.LOAD_FAILED, f"{kind}: {text}")
        self._notify()

    def _note(self, step: int, kind: str, text: str) -> None:
        self.failures.append(
            home.Failure(step=step, reason=kind, message=text[: home.TEXT_LIMIT], time=rfc3339(self._wall()))
        )


def is_interrupted(error: PillionError) -> bool:
    """Whether a save came to nothing for no other reason than the end of trainers."""
    ranks = getattr(error, "failures", {})
    return bool(ranks) and all(failure.type_name == TRAINER_DIED for failure in ranks.values())
