"""
The whole of: what the time of each job went to, in the status of its policy, and as series. docs/reference/goodput.md has the definition.

Called from: `conditions` and `report_handler`. Pure.
Must never: change a status between two commits of a job: what grows every second is a metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pillion.wire import home
from pillion_operator.home import times
from pillion_operator.home.registry import Job

Json = dict[str, Any]

_MAX_JOBS: Final = 16
"""Maximum number of jobs whose goodput a status has, the first ones by id. Each takes some 300 bytes."""
_MAX_SECONDS: Final = 1e12
"""Maximum of a number that a sidecar sends: thirty thousand years. One wrong report does not block the status of the policy."""
_MAX_ATTEMPTS: Final = 2**31 - 1


def seconds(report: home.Report) -> dict[str, float]:
    """The seconds of each kind; empty while the sidecar does not know the run."""
    reported = report.run_seconds
    if any(kind not in reported for kind in home.RUN_KINDS):
        return {}
    return {kind: max(0.0, min(float(reported[kind]), _MAX_SECONDS)) for kind in home.RUN_KINDS}


def ratio(spent: Mapping[str, float]) -> float | None:
    """The share of the time that trained, 0 to 1. None: there is no time yet, or it is not known."""
    wall_s = sum(spent.values())
    return spent["trained"] / wall_s if wall_s > 0 else None


def entries(before: Json, jobs: Iterable[Job]) -> list[Json]:
    """
    The `goodput` of a status: for each job, as of its newest commit.

    Args:
        before: the status now.
        jobs: those that report and run under the policy.
    """
    kept = {each.get("jobID"): each for each in before.get("goodput") or []}
    made = []
    for job in sorted(jobs, key=lambda each: each.report.job_id):
        report = job.report
        spent, committed = seconds(report), times.canonical(report.committed_time)
        share = ratio(spent)
        if not committed or share is None:
            continue
        old = kept.get(report.job_id)
        made.append(
            old if old is not None and old.get("time") == committed else _entry(report, committed, share, spent)
        )
    return made[:_MAX_JOBS]


def _entry(report: home.Report, committed: str, share: float, spent: Mapping[str, float]) -> Json:
    return {
        "jobID": report.job_id,
        "time": committed,
        "percent": round(100 * share),
        "attempts": max(1, min(report.run_attempts, _MAX_ATTEMPTS)),
        **{f"{kind}Seconds": round(spent_s) for kind, spent_s in spent.items()},
    }
