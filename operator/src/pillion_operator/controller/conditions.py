"""
The whole of: the status of a CheckpointPolicy, from its spec and the jobs under it.

Called from: `reconcile`. Pure.
Must never: change when nothing happened: a value that grows every second (the age of a commit) is a metric, and not in a status.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, Final

from pillion.wire import home
from pillion_operator.controller import goodput
from pillion_operator.home import times
from pillion_operator.home.registry import Job
from pillion_operator.injection.checkpoint_policy import CheckpointPolicy

Json = dict[str, Any]

READY: Final = "Ready"
STORAGE: Final = "StorageReachable"
DEGRADED: Final = "Degraded"
DRAIN: Final = "DrainTooShort"
MEMORY: Final = "ArenaTooSmall"
LOCAL: Final = "LocalDisks"
QUOTA: Final = "QuotaExceeded"
UPLOAD_LATE_S: Final = 300.0
"""Age of a save on the disks of the nodes above which its upload is reported as late. A large save takes minutes to a bucket."""
TRUE, FALSE, UNKNOWN = "True", "False", "Unknown"
_MAX_NAMED: Final = 3
"""Maximum number of jobs that a message names."""
_MAX_TEXT: Final = 400
"""Maximum characters of one job's text in a message."""
_MAX_STEP: Final = 2**63 - 1
_MAX_INTERVALS: Final = 16
"""Maximum number of jobs whose automatic intervals a status has, the first ones by id. Each takes some 500 bytes."""
_MAX_NUMBER: Final = 1e15
"""Maximum of a number that a sidecar sends: in thousandths it is below the largest int64."""
_MAX_REASON: Final = 1024
"""Maximum characters of an automatic interval's reason."""


class Reason(StrEnum):
    """Reasons of the conditions: codes for tools and for the troubleshooting guide."""

    VALID = "Valid"
    SUSPENDED = "Suspended"
    INVALID = "Invalid"
    NO_JOB = "NoJob"
    WRITABLE = "Writable"
    STORAGE_ERROR = "StorageError"
    SAVING = "Saving"
    SAVE_FAILED = "SaveFailed"
    FITS = "Fits"
    DRAIN_TOO_SHORT = "DrainTooShort"
    ARENA_TOO_SMALL = "ArenaTooSmall"
    QUOTA_EXCEEDED = "QuotaExceeded"
    HELD = "Held"
    LOCAL_DISK_UNUSABLE = "LocalDiskUnusable"
    UPLOAD_BEHIND = "UploadBehind"


def status(
    policy: CheckpointPolicy,
    before: Json,
    jobs: Sequence[Job],
    num_pods: int,
    checkpoint_name: Callable[[Job], str],
    now_s: float,
    claim: Json | None = None,
) -> Json:
    """
    The status that a policy shall have. What is not in it is not to be there.

    Args:
        policy: the policy.
        before: its status now.
        jobs: those that report and run under it.
        num_pods: injected pods that run under it.
        checkpoint_name: the object that stands for a job's newest commit.
        now_s: seconds since 1970.
        claim: name and access modes of the claim of its storage. None: not known.
    """
    last, gap_s = _last_checkpoint(before, jobs, checkpoint_name)
    drafts = (
        (READY, *_ready(policy)),
        (STORAGE, *_storage(policy, jobs)),
        (DEGRADED, *_degraded(jobs)),
        (DRAIN, *_drain(policy, jobs)),
        (MEMORY, *_memory(jobs)),
        *_quota(policy, jobs),
        *_local(policy, jobs, now_s),
    )
    by_type = {each.get("type"): each for each in before.get("conditions") or []}
    result: Json = {
        "observedGeneration": policy.generation,
        "injectedPods": num_pods,
        "conditions": [
            _condition(kind, state, reason, message, policy.generation, by_type.get(kind) or {}, now_s)
            for kind, state, reason, message in drafts
        ],
    }
    if claim:
        result["claim"] = claim
    if last:
        result["lastCheckpoint"] = last
    if gap_s is not None:
        result["recoveryPointSeconds"] = gap_s
    intervals = [_interval(job.report) for job in _paced(jobs)]
    if intervals:
        result["intervals"] = intervals
    spent = goodput.entries(before, jobs)
    if spent:
        result["goodput"] = spent
    return result


def _paced(jobs: Sequence[Job]) -> Sequence[Job]:
    """The jobs that have an automatic interval, as many as a status names."""
    paced = [job for job in jobs if 0 < job.report.interval_steps <= _MAX_STEP]
    return sorted(paced, key=lambda job: job.report.job_id)[:_MAX_INTERVALS]


def _interval(report: home.Report) -> Json:
    """A job's automatic interval: the period, why, and the numbers that it comes from. A sidecar changes it only with the period."""
    numbers = {name: max(0.0, min(float(value), _MAX_NUMBER)) for name, value in report.interval_inputs.items()}
    return {
        "jobID": report.job_id,
        "steps": report.interval_steps,
        "seconds": round(numbers.get("period_s", 0.0)),
        "reason": report.interval_bound,
        "message": report.interval_reason[:_MAX_REASON],
        "stallMilliseconds": round(numbers.get("stall_s", 0.0) * 1000),
        "persistMilliseconds": round(numbers.get("persist_s", 0.0) * 1000),
        "stepMilliseconds": round(numbers.get("step_s", 0.0) * 1000),
        "meanTimeBetweenFailuresSeconds": round(numbers.get("mtbf_s", 0.0)),
        "failures": round(numbers.get("failures", 0.0)),
    }


def patch(before: Json, after: Json) -> Json | None:
    """The merge patch that makes one status of the other; None: they are the same."""
    if before == after:
        return None
    gone = {key: None for key in before if key not in after}
    changed: Json = {key: value for key, value in after.items() if before.get(key) != value}
    for key, value in changed.items():
        old = before.get(key)
        # A merge patch keeps the fields of an object that it does not name.
        if isinstance(value, dict) and isinstance(old, dict):
            changed[key] = {name: None for name in old if name not in value} | value
    return {"status": changed | gone}


def condition(document: Json, kind: str) -> Json:
    """A condition in a status; empty where there is none."""
    return next((each for each in document.get("conditions") or [] if each.get("type") == kind), {})


def is_failing(report: home.Report) -> bool:
    """Whether the newest thing that a job's saves came to is a failure."""
    failed_s = max((times.parse(each.time) or 0.0 for each in report.failures), default=None)
    return failed_s is not None and failed_s > (times.parse(report.committed_time) or 0.0)


def _ready(policy: CheckpointPolicy) -> tuple[str, Reason, str]:
    if policy.spec is None:
        return FALSE, Reason.INVALID, "The policy is invalid: " + "; ".join(policy.problems)
    if policy.spec.suspend:
        text = "The policy is suspended: new pods are not injected, and running jobs save only on request."
        return TRUE, Reason.SUSPENDED, text
    return TRUE, Reason.VALID, "The policy is valid."


def _storage(policy: CheckpointPolicy, jobs: Sequence[Job]) -> tuple[str, Reason, str]:
    if not jobs:
        text = "No job under the policy reports, so the state of the storage is unknown."
        return UNKNOWN, Reason.NO_JOB, " ".join([text, *_needs(policy)])
    failing = [job for job in jobs if job.report.storage_error]
    if failing:
        details = ((job.report.job_id, job.report.storage_error) for job in failing)
        return FALSE, Reason.STORAGE_ERROR, "The storage cannot be used: " + _named(details, len(failing))
    return TRUE, Reason.WRITABLE, "Every job under the policy can use its storage."


def _needs(policy: CheckpointPolicy) -> Iterator[str]:
    """What keeps a pod under the policy from starting while it is missing. The controller may not read it, so it cannot say whether it is."""
    store = policy.spec.storage.object_store if policy.spec else None
    secret = store.credentials.secret if store and store.credentials else None
    config_map = store.ca_bundle.config_map if store and store.ca_bundle else None
    objects = [f"the {kind} {name}" for kind, name in (("Secret", secret), ("ConfigMap", config_map)) if name]
    if objects:
        yield f"A pod starts only once its namespace has {' and '.join(objects)}."


def _degraded(jobs: Sequence[Job]) -> tuple[str, Reason, str]:
    if not jobs:
        return FALSE, Reason.NO_JOB, "No job under the policy reports."
    failing = [job for job in jobs if is_failing(job.report)]
    if failing:
        newest = [max(job.report.failures, key=lambda each: times.parse(each.time) or 0.0) for job in failing]
        details = ((job.report.job_id, describe(each)) for job, each in zip(failing, newest, strict=True))
        return TRUE, Reason.SAVE_FAILED, "Saves or loads fail: " + _named(details, len(failing))
    return FALSE, Reason.SAVING, "No job under the policy fails to save."


def _drain(policy: CheckpointPolicy, jobs: Sequence[Job]) -> tuple[str, Reason, str]:
    """Whether what the end of a pod has to wait for fits into the time that injection adds to its grace period."""
    if not jobs or policy.spec is None:
        return FALSE, Reason.NO_JOB, "No job under the policy reports."
    given_s = policy.spec.drain.timeout_seconds
    slow = [job for job in jobs if job.report.drain_s > given_s]
    if slow:
        details = ((job.report.job_id, f"a save took {math.ceil(job.report.drain_s)} s") for job in slow)
        text = f"drain.timeoutSeconds is {given_s} s, but saves take longer: {_named(details, len(slow))}"
        return TRUE, Reason.DRAIN_TOO_SHORT, text
    return FALSE, Reason.FITS, f"The last saves fit into drain.timeoutSeconds ({given_s} s)."


def _memory(jobs: Sequence[Job]) -> tuple[str, Reason, str]:
    if not jobs:
        return FALSE, Reason.NO_JOB, "No job under the policy reports."
    small = [job for job in jobs if job.report.memory_error]
    if small:
        details = ((job.report.job_id, job.report.memory_error) for job in small)
        return TRUE, Reason.ARENA_TOO_SMALL, "The arena is too small: " + _named(details, len(small))
    return FALSE, Reason.FITS, "The arena is large enough for every job that has reported its size."


def _quota(policy: CheckpointPolicy, jobs: Sequence[Job]) -> Iterator[tuple[str, str, Reason, str]]:
    """Whether the checkpoints of each job have more bytes than the policy allows. Nothing for a policy without a quota."""
    if policy.spec is None or policy.spec.retention.max_bytes is None:
        return
    over = [job for job in jobs if job.report.quota_error]
    if not jobs:
        yield QUOTA, FALSE, Reason.NO_JOB, "No job under the policy reports."
    elif over:
        details = ((job.report.job_id, job.report.quota_error) for job in over)
        yield QUOTA, TRUE, Reason.QUOTA_EXCEEDED, "Checkpoints exceed their quota: " + _named(details, len(over))
    else:
        yield QUOTA, FALSE, Reason.FITS, "The checkpoints of every job have at most retention.maxBytes."


def _local(policy: CheckpointPolicy, jobs: Sequence[Job], now_s: float) -> Iterator[tuple[str, str, Reason, str]]:
    """Whether saves are on the disks of the nodes, and soon on storage. Nothing for a policy without such disks."""
    if policy.spec is None or policy.spec.storage.local is None:
        return
    if not jobs:
        yield LOCAL, UNKNOWN, Reason.NO_JOB, "No job under the policy reports."
        return
    unusable = [job for job in jobs if job.report.local_error]
    late = [(job, oldest) for job in jobs if (oldest := _oldest_late(job.report, now_s)) is not None]
    if unusable:
        details = ((job.report.job_id, job.report.local_error) for job in unusable)
        text = "Saves go to storage at once, because a disk of a node cannot be used: "
        yield LOCAL, FALSE, Reason.LOCAL_DISK_UNUSABLE, text + _named(details, len(unusable))
    elif late:
        details = (
            (job.report.job_id, f"step {oldest.step} has waited since {times.canonical(oldest.held)}")
            for job, oldest in late
        )
        text = "Saves on the disks of the nodes are late on storage: "
        yield LOCAL, FALSE, Reason.UPLOAD_BEHIND, text + _named(details, len(late))
    else:
        yield LOCAL, TRUE, Reason.HELD, "Saves are on the disks of the nodes first, and on storage within minutes."


def _oldest_late(report: home.Report, now_s: float) -> home.HeldSave | None:
    """The save that waits longest for storage, if it is late."""
    oldest = min(report.held, key=lambda each: each.step, default=None)
    since_s = None if oldest is None else times.parse(oldest.held)
    return oldest if since_s is not None and now_s - since_s > UPLOAD_LATE_S else None


def describe(failure: home.Failure) -> str:
    """A failure in one line; a load of the newest names no step."""
    step = f"step {failure.step}: " if failure.step >= 0 else ""
    return f"{step}{failure.reason}: {failure.message}"


def _named(details: Iterable[tuple[str, str]], total: int) -> str:
    shown = [f"job {job_id}: {text[:_MAX_TEXT]}" for job_id, text in list(details)[:_MAX_NAMED]]
    return "; ".join(shown) + (f"; and {total - _MAX_NAMED} more" if total > _MAX_NAMED else "")


def _condition(
    kind: str, state: str, reason: Reason, message: str, generation: int, before: Json, now_s: float
) -> Json:
    is_same = before.get("status") == state and before.get("lastTransitionTime")
    return {
        "type": kind,
        "status": state,
        "observedGeneration": generation,
        "lastTransitionTime": before["lastTransitionTime"] if is_same else times.text(now_s),
        "reason": reason.value,
        "message": message[:32768],
    }


def _last_checkpoint(
    before: Json, jobs: Sequence[Job], checkpoint_name: Callable[[Job], str]
) -> tuple[Json, int | None]:
    """The newest commit under the policy, and the seconds between it and the commit before it, of the same job."""
    committed = []
    for job in jobs:
        done_s = times.parse(job.report.committed_time)
        if done_s is not None and 0 <= job.report.committed_step <= _MAX_STEP:
            committed.append((done_s, job))
    newest_s, newest = max(committed, key=lambda each: each[0], default=(0.0, None))
    kept: Json = before.get("lastCheckpoint") or {}
    kept_s = times.parse(str(kept.get("time") or "")) or 0.0
    # A reporting job names its newest commit itself; for a job that is gone, the last known one stays.
    is_gone = bool(kept) and kept.get("jobID") not in {job.report.job_id for job in jobs}
    if newest is None or (is_gone and kept_s >= newest_s):
        return kept, before.get("recoveryPointSeconds")
    last: Json = {
        "jobID": newest.report.job_id,
        "step": newest.report.committed_step,
        "time": times.text(newest_s),
        "name": checkpoint_name(newest),
    }
    if newest.commit_gap_s is not None:
        return last, round(newest.commit_gap_s)
    is_same = all(kept.get(key) == last[key] for key in ("jobID", "step", "time"))
    return last, before.get("recoveryPointSeconds") if is_same else None
