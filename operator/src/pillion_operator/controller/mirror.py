"""
The whole of: Checkpoint objects that mirror the storage: one for each committed checkpoint of a job that reports.

Called from: `reconcile`, for one job at a time, whenever something about it changed. Pure: earlier decisions are not
remembered, so that a restart needs no repair.
Must never: delete an object that the controller did not create; conclude anything from a report that could not list the storage, or from no report.
"""

import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pillion.wire import home, remarks
from pillion_operator.controller import checkpoints, pinning
from pillion_operator.controller.checkpoints import FALSE, TRUE, UNKNOWN, Checkpoint, Json, Status
from pillion_operator.home import times

JOB_LABEL: Final = "pillion.dev/job-id"
POLICY_LABEL: Final = "pillion.dev/policy"
COMMITTED: Final = "Committed"
REMOVED: Final = "Removed"
HELD: Final = "Held"
HELD_TEXT: Final = "Every node has the save on its disk, and it waits for storage."
COMMITTED_TEXT: Final = "The checkpoint is committed and can be loaded."
REMOVED_TEXT: Final = "The checkpoint was committed but is no longer on storage."
_MAX_NAME: Final = 253
"""Source: Kubernetes documentation, "Object Names and IDs"."""
_MAX_PATH: Final = 4096
_MAX_METRIC: Final = remarks.MAX_NAME_CHARS
_MAX_STEP: Final = 2**63 - 1
_MAX_WORLD: Final = 2**31 - 1
_MAX_SIZE: Final = 10**18 - 1
"""Maximum size that the CRD accepts. A larger one is clamped, so that one wrong report does not block the others."""
_ROUND_AT: Final = 100
"""Minimum count of a unit for a rounded size: the size is within half a percent and easy to read."""
_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_HOLDERS: Final = re.compile(r"([a-z][-,a-z0-9]{0,127})?")
"""What the CRD takes as holders, so that one wrong report does not block the object."""
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
        return _show_held(report, objects, now_s)
    stored = {each.step: each for each in report.checkpoints if _can_be_stored(each)}
    # A full list is truncated, and proves nothing about older checkpoints.
    is_full = len(report.checkpoints) >= home.MAX_CHECKPOINTS
    oldest = min(stored, default=0) if is_full else 0
    by_name = {each.name: each for each in objects}
    of_users = [each for each in objects if _stands(each)]
    taken = _foreign_names(objects)
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
            write(each, removed(status, now_s))
    for step in sorted(stored.keys() - {each.status.step for each in of_users}, reverse=True):
        name = object_name(report.job_id, step, taken)
        kept.add(name)
        if name in by_name:
            write(by_name[name], committed(stored[step], report, by_name[name].status, now_s))
        else:
            body, status = _body(report, name, stored[step].cause), committed(stored[step], report, Status(), now_s)
            if pinning.holds(stored[step]):
                # Somebody deleted its object. The pin on storage counts, and can be removed by the annotation only if there is one.
                body["metadata"]["annotations"] = {checkpoints.PIN: "true"}
            operations.append(Create(namespace=report.namespace, name=name, body=body, status=status))
    # Newer ones only: of a step that storage has had, a held save says nothing.
    for held in [each for each in report.held if 0 <= each.step <= _MAX_STEP and each.step not in stored]:
        name = object_name(report.job_id, held.step, taken)
        if held.step in {each.status.step for each in of_users}:
            continue
        kept.add(name)
        if name in by_name:
            write(by_name[name], _held(held, report, by_name[name].status, now_s))
        else:
            body, status = _body(report, name, held.cause), _held(held, report, Status(), now_s)
            operations.append(Create(namespace=report.namespace, name=name, body=body, status=status))
    for each in objects:
        is_known = each.status.step is None or each.status.step >= oldest
        if not each.is_ours or each.name in kept or not is_known:
            continue
        if each.pin is False:
            operations.append(Delete(checkpoint=each))
        elif each.status.path:
            # Somebody wants to keep it, and shall see that it is gone.
            write(each, removed(each.status, now_s))
    return operations


def _show_held(report: home.Report, objects: Collection[Checkpoint], now_s: float) -> list[Operation]:
    """
    The operations that show the saves on the nodes' disks while storage cannot be listed, when they are all that there is of the newest steps.

    No object of a checkpoint that may be committed is changed or removed: what storage has is not known. A held save that is passed over goes.
    """
    by_name = {each.name: each for each in objects}
    steps = {each.status.step for each in objects}
    taken, held = _foreign_names(objects), {each.step: each for each in report.held if 0 <= each.step <= _MAX_STEP}
    operations: list[Operation] = []
    for each in held.values():
        name = object_name(report.job_id, each.step, taken)
        if each.step not in steps and name not in by_name:
            body, status = _body(report, name, each.cause), _held(each, report, Status(), now_s)
            operations.append(Create(namespace=report.namespace, name=name, body=body, status=status))
    for shown in objects:
        status = shown.status
        is_passed = status.reason == HELD and status.step is not None and status.step > report.committed_step
        if shown.is_ours and is_passed and status.step not in held:
            operations.append(Delete(checkpoint=shown))
    return operations


def object_name(job_id: str, step: int, taken: Collection[str] = ()) -> str:
    """
    The name of the object for a step: the job's id and the step, where that is a name and nobody else has it.

    Else there is a piece of a digest in it, so that no two jobs, however they are spelled, share one.
    """
    suffix = f"-{step:09d}"
    plain = f"{job_id}{suffix}"
    if _SUBDOMAIN.fullmatch(plain) and len(plain) <= _MAX_NAME and plain not in taken:
        return plain
    digest = hashlib.sha256(job_id.encode()).hexdigest()[:8]
    safe = re.sub("[^a-z0-9]+", "-", job_id.lower()).strip("-")
    safe = safe[: _MAX_NAME - len(digest) - len(suffix) - 1].rstrip("-")
    return f"{safe}-{digest}{suffix}"


def name_of(report: home.Report, step: int, objects: Collection[Checkpoint]) -> str:
    """The object that stands for a step, or will."""
    existing = next((each.name for each in objects if _stands(each) and each.status.step == step), "")
    return existing or object_name(report.job_id, step, _foreign_names(objects))


def committed(stored: home.CommittedCheckpoint, report: home.Report, before: Status, now_s: float) -> Status:
    """The status of an object that stands for a checkpoint on storage; `before` is what it was."""
    return Status(
        # The policy that it was made under: the job may have gone over to another.
        policy=before.policy or report.policy,
        step=stored.step,
        path=stored.path,
        size=size(stored.size_bytes),
        world_size=stored.world_size if 0 < stored.world_size <= _MAX_WORLD else before.world_size,
        started=times.canonical(stored.started) or before.started,
        completed=times.canonical(stored.completed) or before.completed,
        metrics=metrics(stored.metrics),
        pinned_by=stored.pinned_by if _HOLDERS.fullmatch(stored.pinned_by) else "",
        ready=TRUE,
        reason=COMMITTED,
        message=COMMITTED_TEXT,
        changed=before.changed if before.ready == TRUE and before.changed else times.text(now_s),
    )


def removed(before: Status, now_s: float) -> Status:
    """The status of an object whose checkpoint is not on storage any more."""
    changed = before.changed if before.ready == FALSE and before.changed else times.text(now_s)
    return dataclasses.replace(before, ready=FALSE, reason=REMOVED, message=REMOVED_TEXT, changed=changed, pinned_by="")


def metrics(reported: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """The metrics of a report as the CRD takes them: numbers as texts. What is none is left out, so that one cannot block the object."""
    read = remarks.read({"metrics": {name: value for name, value in reported.items() if 0 < len(name) <= _MAX_METRIC}})
    return tuple((name, f"{value:.12g}") for name, value in list(read.metrics.items())[: home.MAX_METRICS])


def _held(held: home.HeldSave, report: home.Report, before: Status, now_s: float) -> Status:
    """The status of an object that stands for a save on the disks of the nodes."""
    is_same = before.ready == UNKNOWN and before.reason == HELD and before.changed
    return Status(
        policy=before.policy or report.policy,
        step=held.step,
        ready=UNKNOWN,
        reason=HELD,
        message=HELD_TEXT,
        changed=before.changed if is_same else times.canonical(held.held) or times.text(now_s),
    )


def size(num_bytes: int) -> str:
    """A size as a quantity that is read at a glance: exact where a unit divides it, else rounded; see `_ROUND_AT`."""
    num_bytes = min(max(num_bytes, 0), _MAX_SIZE)
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
    return 0 <= stored.step <= _MAX_STEP and 0 < len(stored.path) <= _MAX_PATH


def _foreign_names(objects: Iterable[Checkpoint]) -> set[str]:
    return {each.name for each in objects if not each.is_ours}


def _body(report: home.Report, name: str, cause: str) -> Json:
    labels = {checkpoints.MIRROR_LABEL: checkpoints.mark(report.namespace, name, report.job_id)}
    labels |= {JOB_LABEL: report.job_id} if is_label(report.job_id) else {}
    labels |= {POLICY_LABEL: report.policy} if is_label(report.policy) else {}
    is_cause = cause in {each.value for each in home.Cause}
    return {
        "apiVersion": checkpoints.API_VERSION,
        "kind": checkpoints.KIND,
        "metadata": {"name": name, "namespace": report.namespace, "labels": labels},
        "spec": {"jobID": report.job_id, "trigger": cause if is_cause else home.Cause.PERIODIC.value},
    }
