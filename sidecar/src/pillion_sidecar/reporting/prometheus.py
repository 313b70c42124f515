"""
The sidecar's Prometheus endpoint: serves the supervisor's counters as `/metrics` on PILLION_METRICS_PORT.

Called from: `app`, which imports it only if a port is set. A thread of prometheus_client serves it, and reads plain numbers.
Must never: keep the sidecar from running. Pods in the host's network share its ports. If the port is taken, there is no endpoint; the
controller's metrics still include the job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from pillion_sidecar.run import account

if TYPE_CHECKING:
    from pillion_sidecar.supervisor.dispatcher import Supervisor

_log = logging.getLogger(__name__)

OUTCOMES: Final = {
    "committed": "saves_committed",
    "failed": "saves_failed",
    "skipped": "saves_skipped",
    "replaced": "saves_replaced",
    "interrupted": "saves_interrupted",
    "waited": "saves_waited",
    "held": "saves_held",
    "unheld": "saves_unheld",
    "passed_over": "saves_passed_over",
}


class Exporter(Collector):
    """Collects the current numbers at each scrape. Counters begin at the sidecar's start."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        metrics, pod = self._supervisor.sidecar_status.metrics, self._supervisor.pod
        for name, text, count, total in (
            (
                "stage",
                "From the first claim of a save in this pod to its last seal.",
                metrics.stages,
                metrics.stage_seconds,
            ),
            ("stall", "How long a save held up its slowest rank's training.", metrics.stalls, metrics.stall_seconds),
            ("queue", "From the seal until the executor took it up.", metrics.saves_committed, metrics.queue_seconds),
            ("persist", "From the seal to the last durable byte.", metrics.saves_committed, metrics.persist_seconds),
            ("commit", "From there until it was visible.", metrics.saves_committed, metrics.commit_seconds),
        ):
            yield SummaryMetricFamily(f"pillion_{name}_seconds", text, count_value=count, sum_value=total)
        yield CounterMetricFamily(
            "pillion_persisted_bytes", "Bytes committed, all ranks.", value=metrics.persisted_bytes
        )
        saves = CounterMetricFamily(
            "pillion_saves", "Saves by outcome; waited: a claim had no free slot.", labels=["outcome"]
        )
        for outcome, field in OUTCOMES.items():
            saves.add_metric([outcome], getattr(metrics, field))
        yield saves
        failures = CounterMetricFamily("pillion_save_failures", "Failed saves by error.", labels=["reason"])
        for kind, number in sorted(metrics.failures_by_kind.items()):
            failures.add_metric([kind], number)
        yield failures
        yield CounterMetricFamily("pillion_snapshots", "Saves that stayed in memory.", value=metrics.snapshots)
        yield CounterMetricFamily(
            "pillion_snapshots_verified",
            "Snapshots verified while no trainer lived.",
            value=metrics.snapshots_verified,
        )
        loads = CounterMetricFamily("pillion_loads", "Loads by where they came from.", labels=["tier"])
        loads.add_metric(["arena"], metrics.loads_arena)
        loads.add_metric(["local"], metrics.loads_local)
        loads.add_metric(["storage"], metrics.loads_storage)
        yield loads
        yield CounterMetricFamily("pillion_executor_restarts", "Executors replaced.", value=metrics.executor_restarts)
        yield CounterMetricFamily(
            "pillion_checkpoints_refused", "Checkpoints found corrupt by a load.", value=metrics.checkpoints_refused
        )
        yield GaugeMetricFamily(
            "pillion_storage_stalled_seconds",
            "How long storage has stood still now; 0 while it answers.",
            value=metrics.storage_stalled_seconds,
        )
        yield GaugeMetricFamily(
            "pillion_uploads_waiting",
            "Saves on the local disks that wait for storage.",
            value=metrics.uploads_waiting,
        )
        yield GaugeMetricFamily(
            "pillion_upload_behind_seconds",
            "Age of the oldest save that waits for storage on the local disks; 0: none waits.",
            value=self._supervisor.sidecar_status.behind_s,
        )
        yield CounterMetricFamily(
            "pillion_uploads_failed",
            "Uploads from the local disks that failed, and are tried again.",
            value=metrics.uploads_failed,
        )
        journal = self._supervisor.sidecar_status.run.journal()
        if journal is not None:
            run = account.of(journal)
            seconds = GaugeMetricFamily("pillion_run_seconds", "Time of the run, by what it went to.", labels=["kind"])
            for kind, spent_s in run.seconds().items():
                seconds.add_metric([kind], spent_s)
            yield seconds
            yield GaugeMetricFamily(
                "pillion_run_goodput_ratio", "Share of the run's time that trained and was kept.", value=run.goodput
            )
            yield GaugeMetricFamily("pillion_run_attempts", "Attempts of the training.", value=run.attempts)
        held = len(pod.table.held()) if pod is not None else 0
        yield GaugeMetricFamily("pillion_slots_in_use", "Slots of each segment that hold a save.", value=held)
        if metrics.last_committed_timestamp:
            at_s = metrics.last_committed_timestamp
            yield GaugeMetricFamily(
                "pillion_last_committed_step", "Step of the newest commit.", value=metrics.last_committed_step
            )
            yield GaugeMetricFamily(
                "pillion_last_committed_timestamp_seconds", "When that was, since 1970.", value=at_s
            )
            yield GaugeMetricFamily(
                "pillion_recovery_point_seconds",
                "Age of the newest commit: the training that a loss of the pod costs.",
                value=max(0.0, time.time() - at_s),
            )


def start(supervisor: Supervisor, port: int) -> None:
    """Serve the endpoint in a daemon thread until the process ends. If the port is taken, log a warning and serve nothing."""
    registry = CollectorRegistry()
    registry.register(Exporter(supervisor))
    try:
        prometheus_client.start_http_server(port, registry=registry)
    except OSError as err:
        _log.warning("metrics endpoint disabled: cannot listen on port %d: %s", port, err.strerror)
