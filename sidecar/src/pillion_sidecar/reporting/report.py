"""
Builds a report from the supervisor's state and the inventory of the storage. Pure.

Called from: `reporting.reporter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pillion.wire import home
from pillion_sidecar.run import account
from pillion_sidecar.status.status import rfc3339
from pillion_sidecar.supervisor.dispatcher import Supervisor

FIRST_INDEX = ("", "0")
"""Completion indexes of pods that report before a trainer has named the pod of rank 0: the first pod of an Indexed Job, or all pods of a job
without indexes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """The result of the last look at the storage."""

    checkpoints: Sequence[home.CommittedCheckpoint] = ()
    listed: bool = False
    """Whether the storage could be listed."""
    problem: str = ""
    """Why the storage cannot be listed or written. Empty: it can."""


def speaks(supervisor: Supervisor) -> bool:
    """Whether this pod's sidecar reports for the job. Only the coordinator's sidecar does."""
    if supervisor.pod is None:
        return supervisor.settings.completion_index in FIRST_INDEX
    return supervisor.pod.identity.local_ranks[0] == 0


def make(supervisor: Supervisor, storage: Storage) -> home.Report:
    """Return a report of the job's current state."""
    settings, sidecar_status, pod = supervisor.settings, supervisor.sidecar_status, supervisor.pod
    identity = pod.identity if pod is not None else None
    newest = pod.table.newest_complete() if pod is not None else None
    committed_step, committed_time = _committed(supervisor, storage)
    interval = sidecar_status.interval
    journal = sidecar_status.run.journal()
    run = account.of(journal) if journal is not None else None
    return home.Report(
        namespace=settings.pod_namespace,
        pod=settings.pod_name,
        pod_uid=settings.pod_uid,
        policy=settings.policy_name,
        job_kind=settings.job_kind,
        job_name=settings.job_name,
        job_id=settings.job_id,
        session=identity.session if identity is not None else "",
        attempt=identity.attempt if identity is not None else 0,
        world_size=identity.world_size if identity is not None else 0,
        num_pods=len(identity.pods) if identity is not None else 0,
        policy_generation=supervisor.policy.policy_generation,
        step=newest.step if newest is not None else -1,
        snapshot_time=rfc3339(newest.sealed_ns / 1e9) if newest is not None and newest.sealed_ns else "",
        committed_step=committed_step,
        committed_time=committed_time,
        storage_error=(storage.problem or sidecar_status.storage_problem)[: home.TEXT_LIMIT],
        memory_error=sidecar_status.memory_problem[: home.TEXT_LIMIT],
        quota_error=sidecar_status.quota_problem[: home.TEXT_LIMIT],
        local_error=sidecar_status.local_problem[: home.TEXT_LIMIT],
        held=sidecar_status.waiting(),
        interval_steps=interval.steps if interval is not None else 0,
        interval_bound=interval.bound.value if interval is not None else "",
        interval_reason=interval.reason[: home.TEXT_LIMIT] if interval is not None else "",
        interval_inputs=interval.inputs() if interval is not None else {},
        run_attempts=run.attempts if run is not None else 0,
        run_seconds=run.seconds() if run is not None else {},
        drain_s=sidecar_status.drain_s,
        loaded_step=sidecar_status.loaded.step if sidecar_status.loaded is not None else -1,
        loaded_from=sidecar_status.loaded.tier if sidecar_status.loaded is not None else "",
        loaded_time=rfc3339(sidecar_status.loaded.time_s) if sidecar_status.loaded is not None else "",
        draining=sidecar_status.terminating,
        checkpoints=tuple(storage.checkpoints),
        listed=storage.listed,
        failures=tuple(sidecar_status.failures),
        acknowledgements=sidecar_status.save_requests.acknowledgements(),
        metrics=sidecar_status.metrics.to_document(),
    )


def _committed(supervisor: Supervisor, storage: Storage) -> tuple[int, str]:
    """Return step and time of the newest commit since the sidecar's start; if there is none, of the newest checkpoint on storage."""
    commit = supervisor.sidecar_status.commit
    if commit is not None:
        return commit.step, rfc3339(commit.time_s)
    if storage.checkpoints:
        return storage.checkpoints[0].step, storage.checkpoints[0].completed
    return -1, ""
