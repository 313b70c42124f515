"""
The whole of: the effects of a report: marks for the writer, events for people, commands for the job, metrics.

Called from: the server of reports, for each report; `app`, once a minute.
Must never: wait: slow work is left to the tasks that are marked.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from pillion.wire import home
from pillion_operator import metrics
from pillion_operator.controller import commands, conditions, goodput, news, pinning
from pillion_operator.controller.pod_index import PodIndex
from pillion_operator.controller.reconcile import Reconciler
from pillion_operator.home import injected, registry, times
from pillion_operator.home.registry import JobKey, Received, Registry

RECENT_S: Final = 60.0
"""
Maximum age of a failure in the first report of a job for which an event is posted. The previous controller has posted older ones.
"""


class Post(Protocol):
    """`cluster.events.Events.post`."""

    def __call__(
        self, about: dict[str, Any], reason: str, message: str, *, warning: bool = False, action: str = "Inject"
    ) -> None: ...


class ReportHandler:
    """Handles reports of jobs for the rest of the controller."""

    def __init__(
        self,
        jobs: Registry,
        pod_index: PodIndex,
        reconciler: Reconciler,
        pods: injected.Cache,
        post: Post,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._jobs = jobs
        self._pod_index = pod_index
        self._reconciler = reconciler
        self._pods = pods
        self._post = post
        self._clock = clock
        self._save_annotations = commands.SaveAnnotations(clock())
        self._news = news.News()

    def reported(self, received: Received) -> None:
        """Handle a report that the registry accepted."""
        report, before = received.job.report, received.before
        if not received.stale:
            for reason, text in self._news.notices(received.job.key, report, self._clock()):
                # On the pod's owner, which people look at.
                action = "Load" if reason is commands.NoticeReason.LOADED else "Save"
                self._post(self._abouts(report)[-1], reason, text, action=action)
        if not received.changed:
            return
        self._reconciler.mark_job(received.job.key)
        self._reconciler.mark_policy((report.namespace, report.policy))
        if before is not None and before.report.policy != report.policy:
            self._reconciler.mark_policy((report.namespace, before.report.policy))
        reported_before = before.report.failures if before else ()
        for failure in report.failures:
            age_s = self._clock() - (times.parse(failure.time) or 0.0)
            if failure not in reported_before and (before is not None or age_s < RECENT_S):
                self._failed(report, failure)

    def commands_of(self, key: JobKey) -> tuple[home.Command, ...]:
        """The commands for a job. Posts events about the progress of annotation requests."""
        open_annotations = self._open_annotations(key)
        saves = commands.commands(self._reconciler.checkpoints.open_requests(key), open_annotations)
        job = self._jobs.get(key)
        if job is None:
            return saves
        return (*saves, *pinning.commands(job.report, self._reconciler.checkpoints.for_job(key)))

    def sweep(self) -> None:
        """Expire the requests to jobs that do not report, and forget what was announced of those jobs."""
        for key in self._pod_index.jobs_with_save_annotations():
            if self._jobs.get(key) is None:
                self._open_annotations(key)
        self._news.keep([job.key for job in self._jobs.jobs()])

    def rows(self) -> Iterable[metrics.JobRow]:
        """The jobs' metrics."""
        now_s = self._clock()
        for job in self._jobs.jobs():
            report = job.report
            spent = goodput.seconds(report)
            gauges = {
                "last_committed_step": float(report.committed_step) if report.committed_step >= 0 else None,
                "last_committed_timestamp_seconds": times.parse(report.committed_time),
                "recovery_point_seconds": registry.recovery_point_s(job, now_s),
                "snapshot_recovery_point_seconds": registry.recovery_point_s(job, now_s, with_snapshot=True),
                "lag_steps": registry.lag_steps(report),
                "storage_reachable": float(not report.storage_error),
                "pods": float(report.num_pods),
                "checkpoints": float(len(report.checkpoints)) if report.listed else None,
                "goodput_ratio": goodput.ratio(spent),
                "attempts": float(report.run_attempts) if spent else None,
            }
            yield metrics.JobRow(
                namespace=report.namespace,
                job=report.job_id,
                policy=report.policy,
                gauges={name: value for name, value in gauges.items() if value is not None},
                counters=report.metrics,
                seconds=spent,
            )

    def _open_annotations(self, key: JobKey) -> list[commands.SaveAnnotation]:
        save_annotations = self._pod_index.save_annotations(key)
        if not save_annotations:
            return []
        still_open, notices = self._save_annotations.open(save_annotations, self._jobs.get(key), self._clock())
        for notice in notices:
            self._post(notice.about, notice.reason, notice.message, warning=notice.warning, action="Save")
        return still_open

    def _failed(self, report: home.Report, failure: home.Failure) -> None:
        """Post a failure on the pod that reports it, and on the pod's owner, which people look at."""
        own = {each.value: each for each in (commands.NoticeReason.LOAD_FAILED, commands.NoticeReason.REFUSED)}
        reason = own.get(failure.reason, commands.NoticeReason.FAILED)
        for about in self._abouts(report):
            self._post(
                about,
                reason,
                conditions.describe(failure),
                warning=True,
                action="Save" if reason is commands.NoticeReason.FAILED else "Load",
            )

    def _abouts(self, report: home.Report) -> list[dict[str, Any]]:
        """The pod that reports, and what made it."""
        abouts = [{"apiVersion": "v1", "kind": "Pod", "name": report.pod, "uid": report.pod_uid}]
        pod = self._pods.get(report.namespace, report.pod)
        if pod is not None and (owner := pod.owner) is not None:
            abouts.append({"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid})
        return [about | {"namespace": report.namespace} for about in abouts]
