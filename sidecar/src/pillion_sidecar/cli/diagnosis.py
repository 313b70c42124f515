"""
What the facts about a root or a job mean: findings for `pillion doctor`. Pure.

Called from: `cli.doctor`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pillion_sidecar.cli import inventory, kubernetes, output

SHOWN_EVENTS: Final = 8
"""Maximum of warnings of a job that are shown, the newest ones."""


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor."""

    check: str
    level: Level
    what: str


def of_steps(steps: Sequence[inventory.Step]) -> Iterator[Finding]:
    """Say what a restart would find on storage."""
    newest = next((each for each in steps if each.is_newest), None)
    if newest is None:
        yield Finding("checkpoints", Level.WARNING, "none is committed: a restart begins from nothing, or from memory")
    else:
        when = output.timestamp(newest.saved_ns) if newest.saved_ns else "an unknown time"
        committed = sum(each.state in inventory.IS_COMMITTED for each in steps)
        yield Finding(
            "checkpoints", Level.OK, f"{committed} committed; a restart loads step {newest.step}, saved {when}"
        )
    for each in steps:
        if each.state is inventory.State.DAMAGED:
            yield Finding("checkpoints", Level.PROBLEM, f"step {each.step} is damaged: its manifest cannot be read")
        elif each.state is inventory.State.COMPLETE:
            yield Finding(
                "checkpoints", Level.OK, f"step {each.step} has all parts and no commit: the next load commits it"
            )
        elif each.state is inventory.State.TORN:
            ranks = f"{each.ranks_there} of {each.ranks} ranks have written" if each.ranks else "no rank has finished"
            yield Finding(
                "checkpoints", Level.WARNING, f"step {each.step} has no commit: {ranks}; running, or interrupted"
            )


def of_job(job: kubernetes.Job, now_s: float) -> Iterator[Finding]:
    """Say what the API server tells of a job."""
    where = f"{job.namespace}/{job.name}"
    if not job.pods:
        yield Finding(
            "pods",
            Level.PROBLEM,
            f"no pod of {where} has Pillion's sidecar: does its template have pillion.dev/policy?",
        )
    for pod in job.pods:
        yield from _of_pod(pod)
    yield from _of_policies(job)
    yield from _of_checkpoints(job, now_s)
    warnings = [each for each in job.events if each.get("type") == "Warning"]
    for event in sorted(warnings, key=_time)[-SHOWN_EVENTS:]:
        what = f"{event['involvedObject'].get('name')}: {event.get('reason')}: {event.get('message')}"
        yield Finding("event", Level.WARNING, " ".join(what.split()))


def _time(event: kubernetes.Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or "")


def _of_pod(pod: kubernetes.Object) -> Iterator[Finding]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    injected = kubernetes.status_of(pod)
    states = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    sidecar = next((each for each in states if each.get("name") == kubernetes.SIDECAR), None)
    phase = status.get("phase", "Unknown")
    if sidecar is None:
        yield Finding("pod", Level.WARNING, f"{name} is {phase}, and its sidecar has not started")
        return
    state, restarts = _state(sidecar), int(sidecar.get("restartCount", 0))
    # A sidecar that ended with its pod has done its work.
    works = state == "running" or phase in ("Succeeded", "Failed")
    level = Level.PROBLEM if not works else Level.WARNING if restarts else Level.OK
    image = injected.get("image") or sidecar.get("image")
    yield Finding("pod", level, f"{name} is {phase}; sidecar {state}, {restarts} restarts, image {image}")
    for warning in injected.get("warnings", ()):
        yield Finding("pod", Level.WARNING, f"{name}: {warning}")


def _state(container: kubernetes.Object) -> str:
    for kind, detail in (container.get("state") or {}).items():
        reason = (detail or {}).get("reason")
        return f"{kind} ({reason})" if reason and kind != "running" else str(kind)
    return "waiting"


def _of_policies(job: kubernetes.Job) -> Iterator[Finding]:
    wanted = {str(kubernetes.status_of(pod).get("policy", "")) for pod in job.pods} - {""}
    found = {each["metadata"]["name"] for each in job.policies}
    for name in sorted(wanted - found):
        yield Finding("policy", Level.PROBLEM, f"{name} is not in {job.namespace} any more")
    for each in job.policies:
        yield from _conditions("policy", each["metadata"]["name"], each)


def _conditions(check: str, name: str, document: kubernetes.Object) -> Iterator[Finding]:
    conditions: Sequence[Any] = document.get("status", {}).get("conditions", ())
    bad = [each for each in conditions if each.get("status") == "False"]
    if not bad:
        yield Finding(
            check, Level.OK, f"{name}: " + (", ".join(str(each.get("type")) for each in conditions) or "no conditions")
        )
    for each in bad:
        yield Finding(
            check, Level.PROBLEM, f"{name}: {each.get('type')} is False, {each.get('reason')}: {each.get('message')}"
        )


def _of_checkpoints(job: kubernetes.Job, now_s: float) -> Iterator[Finding]:
    committed = [each for each in job.checkpoints if each.get("status", {}).get("completionTime")]
    if not committed:
        yield Finding("checkpoints", Level.WARNING, "the cluster knows none of this job")
        return
    newest = max(committed, key=lambda each: str(each["status"]["completionTime"]))
    status = newest["status"]
    age_s = now_s - datetime.datetime.fromisoformat(status["completionTime"]).timestamp()
    yield Finding(
        "checkpoints",
        Level.OK,
        f"{len(committed)}; the newest is step {status.get('step')}, {output.age(age_s)} ago, in {status.get('path')}",
    )
