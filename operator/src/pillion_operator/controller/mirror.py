"""
The whole of: Checkpoint objects that mirror the storage: one for each committed checkpoint of a job that reports.

Called from: `reconcile`, for one job at a time, whenever something about it changed. Pure: earlier decisions are not
remembered, so that a restart needs no repair.
Must never: delete an object that the controller did not create; conclude anything from a report that could not list the storage, or from no report.
"""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from pillion.wire import home
from pillion_operator.controller import checkpoints
from pillion_operator.controller.checkpoints import FALSE, TRUE, Checkpoint, Json, Status
from pillion_operator.home import times

JOB_LABEL: Final = "pillion.dev/job-id"
POLICY_LABEL: Final = "pillion.dev/policy"
COMMITTED: Final = "Committed"
REMOVED: Final = "Removed"
COMMITTED_TEXT: Final = "The checkpoint is committed and can be loaded."
REMOVED_TEXT: Final = "The checkpoint was committed but is no longer on storage."
_NAME_MOST: Final = 253
"""Source: Kubernetes documentation, "Object Names and IDs"."""
_PATH_MOST: Final = 4096
_STEP_MOST: Final = 2**63 - 1
_WORLD_MOST: Final = 2**31 - 1
_SIZE_MOST: Final = 10**18 - 1
"""Maximum size that the CRD accepts. A larger one is clamped, so that one wrong report does not block the others."""
_ROUND_AT: Final = 100
"""Minimum count of a unit for a rounded size: the size is within half a percent and easy to read."""
_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_UNITS: Final = (("Pi", 2**50), ("Ti", 2**40), ("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10))


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """Make an object, then give it its status."""

    namespace: str
    name: str
    body: Json
    status: Status


@dataclass(frozen=True, slots=True, kw_only=True)
class SetStatus:
    """Write the status of an object."""

    checkpoint: Checkpoint
    status: Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Remove an object that we made."""

    checkpoint: Checkpoint


Operation = Create | SetStatus | Delete


def plan(report: home.Report, objects: Collection[Checkpoint], now_s: float) -> list[Operation]:
    """
    The operations that make the objects of a job mirror its storage; none if they already do.

    Args:
        report: the job's newest.
        objects: all that name the job.
        now_s: seconds since 1970.
    """
    if not report.listed:
        return []
    stored = {each.step: each for each in report.checkpoints if _can_be_stored(each)}
    # A full list is truncated, and proves nothing about older checkpoints.
    is_full = len(report.checkpoints) >= home.MAX_CHECKPOINTS
    oldest = min(stored, default=0) if is_full else 0
    by_name = {each.name: each for each in objects}
    of_users = [each for each in objects if _stands(each)]
    taken = _taken(objects)
    operations: list[Operation] = []
    kept: set[str] = set()

    def write(checkpoint: Checkpoint, status: Status) -> None:
        if checkpoint.status != status:
            operations.append(SetStatus(checkpoint=checkpoint, status=status))

    for each in of_users:
        status, step = each.status, each.status.step
        if step in stored:
            write(each, committed(stored[step], report, status, now_s))
        # Before it has a path it was never seen on storage: the list is older than the news that it is done.
        elif step is not None and step >= oldest and status.path and status.ready == TRUE:
            changed = times.text(now_s)
            write(each, dataclasses.replace(status, ready=FALSE, reason=REMOVED, message=REMOVED_TEXT, changed=changed))
    for step in sorted(stored.keys() - {each.status.step for each in of_users}, reverse=True):
        name = object_name(report.job_id, step, taken)
        kept.add(name)
        if name in by_name:
            write(by_name[name], committed(stored[step], report, by_name[name].status, now_s))
        else:
            body, status = _body(report, name, stored[step]), committed(stored[step], report, Status(), now_s)
            operations.append(Create(namespace=report.namespace, name=name, body=body, status=status))
    for each in objects:
        is_known = each.status.step is None or each.status.step >= oldest
        if each.is_ours and each.name not in kept and is_known:
            operations.append(Delete(checkpoint=each))
    return operations


def object_name(job_id: str, step: int, taken: Collection[str] = ()) -> str:
    """
    The name of the object for a step: the job's id and the step, where that is a name and nobody else has it.

    Else there is a piece of a digest in it, so that no two jobs, however they are spelled, share one.
    """
    suffix = f"-{step:09d}"
    plain = f"{job_id}{suffix}"
    if _SUBDOMAIN.fullmatch(plain) and len(plain) <= _NAME_MOST and plain not in taken:
        return plain
    digest = hashlib.sha256(job_id.encode()).hexdigest()[:8]
    safe = re.sub("[^a-z0-9]+", "-", job_id.lower()).strip("-")
    safe = safe[: _NAME_MOST - len(digest) - len(suffix) - 1].rstrip("-")
    return f"{safe}-{digest}{suffix}"


def name_of(report: home.Report, step: int, objects: Collection[Checkpoint]) -> str:
    """The object that stands for a step, or will."""
    existing = next((each.name for each in objects if _stands(each) and each.status.step == step), "")
    return existing or object_name(report.job_id, step, _taken(objects))


def committed(stored: home.CommittedCheckpoint, report: home.Report, before: Status, now_s: float) -> Status:
    """The status of an object that stands for a checkpoint on storage; `before` is what it was."""
    return Status(
        # The policy that it was made under: the job may have gone over to another.
        policy=before.policy or report.policy,
        step=stored.step,
        path=stored.path,
        size=size(stored.size_bytes),
        world_size=stored.world_size if 0 < stored.world_size <= _WORLD_MOST else before.world_size,
        started=times.canonical(stored.started) or before.started,
        completed=times.canonical(stored.completed) or before.completed,
        ready=TRUE,
        reason=COMMITTED,
        message=COMMITTED_TEXT,
        changed=before.changed if before.ready == TRUE and before.changed else times.text(now_s),
    )


def size(num_bytes: int) -> str:
    """A size as a quantity that is read at a glance: exact where a unit divides it, else rounded; see `_ROUND_AT`."""
    num_bytes = min(max(num_bytes, 0), _SIZE_MOST)
    for unit, factor in _UNITS:
        if num_bytes >= factor and (num_bytes % factor == 0 or num_bytes >= _ROUND_AT * factor):
            return f"{(num_bytes + factor // 2) // factor}{unit}"
    return str(num_bytes)


def is_label(value: str) -> bool:
    """Whether a text can be the value of a label."""
    return _LABEL.fullmatch(value) is not None


def _stands(checkpoint: Checkpoint) -> bool:
    """Whether an object that a user made stands for a checkpoint, also for one that was removed and may be back."""
    status = checkpoint.status
    is_known = status.ready == TRUE or status.reason == REMOVED
    return checkpoint.is_request and status.step is not None and is_known


def _can_be_stored(stored: home.CommittedCheckpoint) -> bool:
    return 0 <= stored.step <= _STEP_MOST and 0 < len(stored.path) <= _PATH_MOST


def _taken(objects: Iterable[Checkpoint]) -> set[str]:
    return {each.name for each in objects if not each.is_ours}


def _body(report: home.Report, name: str, stored: home.CommittedCheckpoint) -> Json:
    labels = {checkpoints.MIRROR_LABEL: checkpoints.mark(report.namespace, name, report.job_id)}
    labels |= {JOB_LABEL: report.job_id} if is_label(report.job_id) else {}
    labels |= {POLICY_LABEL: report.policy} if is_label(report.policy) else {}
    is_cause = stored.cause in {each.value for each in home.Cause}
    return {
        "apiVersion": checkpoints.API_VERSION,
        "kind": checkpoints.KIND,
        "metadata": {"name": name, "namespace": report.namespace, "labels": labels},
        "spec": {"jobID": report.job_id, "trigger": stored.cause if is_cause else home.Cause.PERIODIC.value},
    }
