"""
The whole of: the state of each job that reports: its newest report, the time of it, and the time until the next.

Called from: the server, which brings reports; the controller, which draws conclusions. Pure: time is an argument, monotonic seconds
where it measures a wait, seconds since 1970 where it is compared with a job's own times.
Must never: accept reports of an attempt that has a successor, or keep a job that stopped reporting.
"""

import dataclasses
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from pillion.wire import home
from pillion_operator.home import times

REPORTS_PER_S: Final = 200.0
"""
Maximum reports a second that all jobs together send. One costs the controller two thirds of a millisecond
(benchmarks/bench_controller.py), so reports take a seventh of a core however many jobs there are: up to 600 jobs report each 3 s,
1,000 each 5 s, 12,000 each 60 s.
"""
GONE_INTERVALS: Final = 3
"""Number of missed intervals after which a job is gone; two reports may be lost."""
MIN_GONE_S: Final = 30.0
"""Minimum silence before a job is gone. A sidecar whose storage hangs spends ten seconds on it before each report."""
LATE_INTERVALS: Final = 1.5
"""Number of missed intervals after which another pod of the same age may report for the job."""
PAST_SESSIONS: Final = 8
"""
Maximum number of past sessions that are remembered for a job. A pod of an earlier attempt is older than the pod that reports.
"""
MAX_NUMBERS: Final = 64
"""Maximum number of metrics kept from a report; the sidecar sends a third of it."""
MAX_NAME: Final = 64
"""Maximum characters of a metric's name, of a session, or of an error's class."""


class JobKey(NamedTuple):
    """Which job: ids are unique in a namespace."""

    namespace: str
    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job that reports."""

    report: home.Report
    created: str
    """When the API server made the pod that reports."""
    seen_s: float
    """When the report came; monotonic."""
    interval_s: float
    """Interval until its next report, as the last answer set it."""
    commit_gap_s: float | None
    """Seconds between the last two commits. None: there were no two, or nobody knows."""

    @property
    def key(self) -> JobKey:
        return JobKey(self.report.namespace, self.report.job_id)

    @property
    def gone_s(self) -> float:
        """After how long without a report it is gone."""
        return max(GONE_INTERVALS * self.interval_s, MIN_GONE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A received report, and its effect."""

    job: Job
    """The job after the report."""
    before: Job | None
    """None: it is new."""
    stale: bool = False
    """The report is of an attempt that has a successor, and was not taken."""
    changed: bool = False
    """Whether anything but passing numbers is new."""


class Registry:
    """The jobs that report."""

    def __init__(self) -> None:
        self._jobs: dict[JobKey, Job] = {}
        self._past: dict[JobKey, deque[str]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, key: JobKey) -> Job | None:
        """The job, or None while it does not report."""
        return self._jobs.get(key)

    def jobs(self) -> Collection[Job]:
        """All of them; not to be held across an await."""
        return self._jobs.values()

    def under(self, namespace: str, policy: str) -> list[Job]:
        """The jobs under a policy, by id."""
        jobs = [job for job in self._jobs.values() if (job.report.namespace, job.report.policy) == (namespace, policy)]
        return sorted(jobs, key=lambda job: job.report.job_id)

    def interval_s(self) -> float:
        """When a job that reports now shall report again."""
        return interval_s(len(self._jobs))

    def receive(self, report: home.Report, *, created: str, now_s: float) -> Received:
        """
        Take a report in.

        Args:
            report: as it came, from a pod that may speak for the job.
            created: when the API server made that pod.
            now_s: monotonic.
        """
        key = JobKey(report.namespace, report.job_id)
        before = self._jobs.get(key)
        if before is not None and not self._follows(key, before, report, created, now_s):
            return Received(job=before, before=before, stale=True)
        report = _bounded(report)
        if before is not None and before.report.checkpoints == report.checkpoints:
            # One copy of a long list, not a new one with each report.
            report = dataclasses.replace(report, checkpoints=before.report.checkpoints)
        changed = before is None or _lasting(before.report) != _lasting(report)
        if before is None:
            self._past.pop(key, None)
        elif before.report.session not in ("", report.session):
            self._past.setdefault(key, deque(maxlen=PAST_SESSIONS)).append(before.report.session)
        job = Job(
            report=report,
            created=created,
            seen_s=now_s,
            interval_s=interval_s(len(self._jobs) + (before is None)),
            commit_gap_s=_commit_gap_s(report, before),
        )
        self._jobs[key] = job
        return Received(job=job, before=before, changed=changed)

    def forget_silent(self, now_s: float) -> list[Job]:
        """The jobs that are gone by now, which are no longer known from here on."""
        gone = [job for job in self._jobs.values() if now_s - job.seen_s > job.gone_s]
        for job in gone:
            del self._jobs[job.key]
            self._past.pop(job.key, None)
        return gone

    def _follows(self, key: JobKey, before: Job, report: home.Report, created: str, now_s: float) -> bool:
        """
        Whether a report may take the place of the one before.

        A pod follows itself: its sidecar sends one report after the other. Another pod follows when it has trainers and the other
        none, when it is younger, or has the higher attempt; of two that are equal, the one that goes on reporting stays. What was
        followed never comes back while the job reports; when it is silent, the next pod to report speaks for it, so that no order of a
        few restarts can shut a job out.
        """
        if before.report.pod_uid == report.pod_uid:
            return True
        silent_s = now_s - before.seen_s
        if silent_s > before.gone_s:
            return True
        if report.session in self._past.get(key, ()):
            return False
        order = bool(report.session), created, report.attempt
        previous_order = bool(before.report.session), before.created, before.report.attempt
        return order > previous_order or (order == previous_order and silent_s > LATE_INTERVALS * before.interval_s)


def interval_s(num_jobs: int) -> float:
    """Seconds until the next report of each of so many jobs; see `REPORTS_PER_S`."""
    return min(max(home.DEFAULT_INTERVAL_S, num_jobs / REPORTS_PER_S), home.MAX_INTERVAL_S)


def recovery_point_s(job: Job, now_s: float, *, with_snapshot: bool = False) -> float | None:
    """
    How much work would be lost now, in seconds: the age of the newest commit, or of the newest snapshot where it counts.

    None: there is neither. The clocks of pod and controller differ a little, so no age is below zero.
    """
    report = job.report
    times_s = [times.parse(report.committed_time), times.parse(report.snapshot_time) if with_snapshot else None]
    newest_s = max((each for each in times_s if each is not None), default=None)
    return None if newest_s is None else max(0.0, now_s - newest_s)


def lag_steps(report: home.Report) -> float | None:
    """Training steps that are in memory and not on storage. None: there was no commit, or no snapshot, to count between."""
    if report.step < 0 or report.committed_step < 0:
        return None
    # Behind a rollback the newest commit may be of a larger step, which training went back behind.
    return float(max(0, report.step - report.committed_step))


def _commit_gap_s(report: home.Report, before: Job | None) -> float | None:
    last_s = times.parse(report.committed_time)
    if last_s is None:
        return None
    if before is not None and before.report.committed_time == report.committed_time and before.commit_gap_s is not None:
        return before.commit_gap_s
    # The list of the storage survives a restart of the controller; the previous report helps where only one checkpoint is kept.
    completed_s = [times.parse(each.completed) for each in report.checkpoints if each.step != report.committed_step]
    earlier = [each for each in completed_s if each is not None and each < last_s]
    if before is not None and (said_s := times.parse(before.report.committed_time)) is not None and said_s < last_s:
        earlier.append(said_s)
    return last_s - max(earlier) if earlier else None


def _lasting(report: home.Report) -> tuple[Any, ...]:
    """The fields from which objects and conditions are made; none of them changes with each step."""
    return tuple(getattr(report, name) for name in _LASTING)


_PASSING: Final = ("metrics", "run_seconds", "step", "snapshot_time")
_LASTING: Final = tuple(each.name for each in dataclasses.fields(home.Report) if each.name not in _PASSING)


def _bounded(report: home.Report) -> home.Report:
    """The report without what would cost memory and means nothing to us."""
    failures = tuple(
        dataclasses.replace(each, reason=each.reason[:MAX_NAME], message=each.message[: home.TEXT_LIMIT])
        for each in report.failures
    )
    return dataclasses.replace(
        report,
        session=report.session[:MAX_NAME],
        storage_error=report.storage_error[: home.TEXT_LIMIT],
        memory_error=report.memory_error[: home.TEXT_LIMIT],
        quota_error=report.quota_error[: home.TEXT_LIMIT],
        local_error=report.local_error[: home.TEXT_LIMIT],
        held=tuple(
            dataclasses.replace(each, held=each.held[:MAX_NAME], cause=each.cause[:MAX_NAME]) for each in report.held
        ),
        interval_bound=report.interval_bound[:MAX_NAME],
        interval_reason=report.interval_reason[: home.TEXT_LIMIT],
        interval_inputs=_numbers(report.interval_inputs),
        run_seconds=_numbers(report.run_seconds),
        loaded_from=report.loaded_from[:MAX_NAME],
        failures=failures,
        metrics=_numbers(report.metrics),
    )


def _numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is a number under a short name, at most MAX_NUMBERS of them."""
    numbers = (
        (name, value)
        for name, value in given.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and len(name) <= MAX_NAME
    )
    return dict(sorted(numbers)[:MAX_NUMBERS])
