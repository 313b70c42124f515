"""
The whole of: every metric of the operator, declared once, in a registry of its own.

Called from: every module that counts; the health server, which serves `REGISTRY`. Each process has all of them, and those of the other at zero.
Must never: have a label whose values a user chooses (a pod, a policy, a job): events and status are for those. The
exception is `FLEET`, whose series are bounded and end with the job.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

# When a series began is of no use here, and doubles their number.
disable_created_metrics()  # type: ignore[no-untyped-call]  # it lacks an annotation

REGISTRY: Final = CollectorRegistry()
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)


def render() -> bytes:
    """All of them in Prometheus' text format."""
    return generate_latest(REGISTRY)


# --- webhook -----------------------------------------------------------------------------------------------------

ADMISSION_REQUESTS: Final = Counter(
    "pillion_admission_requests",
    "Reviewed pods, by decision (inject, skip, deny) and reason code.",
    ["decision", "reason"],
    registry=REGISTRY,
)
ADMISSION_BAD_REQUESTS: Final = Counter(
    "pillion_admission_bad_requests",
    "Requests that were not an AdmissionReview of a pod or could not be read, by HTTP status.",
    ["status"],
    registry=REGISTRY,
)
ADMISSION_DURATION: Final = Histogram(
    "pillion_admission_duration_seconds",
    "Time from a whole request to its answer.",
    # The goal is 50 ms at the 99th percentile; the API server gives up after 5 s.
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    registry=REGISTRY,
)
ADMISSION_IN_FLIGHT: Final = Gauge(
    "pillion_admission_requests_in_flight", "Requests that are being answered.", registry=REGISTRY
)
POLICY_LOOKUPS: Final = Counter(
    "pillion_policy_lookups",
    "Lookups of policies, by source (cache, api), or refused because there were too many at one time.",
    ["source"],
    registry=REGISTRY,
)
POLICY_CACHE_SYNCED: Final = Gauge(
    "pillion_policy_cache_synced", "1 once every CheckpointPolicy was listed.", registry=REGISTRY
)
POLICY_CACHE_SIZE: Final = Gauge(
    "pillion_policy_cache_size", "CheckpointPolicy objects in the cache.", registry=REGISTRY
)

# --- access to the API server ------------------------------------------------------------------------------------

API_REQUESTS: Final = Counter(
    "pillion_api_requests",
    "Requests to the API server, by verb and status; status 0 means no answer.",
    ["verb", "status"],
    registry=REGISTRY,
)
WATCH_RESTARTS: Final = Counter(
    "pillion_watch_restarts",
    "Restarts of watches, by resource and cause (ended, idle, gone, refused, unreachable).",
    ["resource", "why"],
    registry=REGISTRY,
)
WATCH_UNREADABLE: Final = Counter(
    "pillion_watch_unreadable_objects",
    "Objects that a cache could not read because of an internal error, by resource.",
    ["resource"],
    registry=REGISTRY,
)
EVENTS_POSTED: Final = Counter("pillion_events_posted", "Events that the API server accepted.", registry=REGISTRY)
EVENTS_DROPPED: Final = Counter(
    "pillion_events_dropped",
    "Events that were dropped, by cause (queue, refused, unverified).",
    ["why"],
    registry=REGISTRY,
)
LEADER: Final = Gauge("pillion_leader", "1 while this replica holds the Lease.", registry=REGISTRY)

# --- certificates ------------------------------------------------------------------------------------------------

CERTIFICATE_EXPIRY: Final = Gauge(
    "pillion_certificate_expiry_timestamp_seconds",
    "End of the served certificate's life, in seconds since 1970; 0 before there is one.",
    registry=REGISTRY,
)
CERTIFICATE_LOADS: Final = Counter(
    "pillion_certificate_loads",
    "Certificates that were taken from the Secret, by result (loaded, refused).",
    ["result"],
    registry=REGISTRY,
)
CERTIFICATE_ROTATIONS: Final = Counter(
    "pillion_certificate_rotations",
    "Certificates and bundles that the leader renewed, by what (leaf, authority, bundle).",
    ["what"],
    registry=REGISTRY,
)

# --- controller and jobs -----------------------------------------------------------------------------------------

REPORTS: Final = Counter(
    "pillion_reports",
    "Reports of sidecars, by result (accepted, stale, bad, unauthenticated, forbidden, unavailable, busy, slow).",
    ["result"],
    registry=REGISTRY,
)
CHECKPOINT_WRITES: Final = Counter(
    "pillion_checkpoint_writes",
    "Writes of Checkpoint objects, by operation (create, status, delete) and result (done, failed).",
    ["op", "result"],
    registry=REGISTRY,
)
POLICY_STATUS_WRITES: Final = Counter(
    "pillion_policy_status_writes", "Writes of a CheckpointPolicy's status.", registry=REGISTRY
)
RECONCILE_WAITING: Final = Gauge(
    "pillion_reconcile_waiting", "Jobs and policies that wait for processing.", registry=REGISTRY
)
RECONCILE_ERRORS: Final = Counter(
    "pillion_reconcile_errors", "Jobs and policies whose processing failed with an internal error.", registry=REGISTRY
)

MAX_JOBS: Final = 2000
"""Maximum number of jobs with series of their own. Each job has some thirty, which end with the job."""
_JOB_LABELS: Final = ("namespace", "job", "policy")
_JOB_GAUGES: Final = {
    "last_committed_step": "Training step of the job's newest committed checkpoint.",
    "last_committed_timestamp_seconds": "Time of the newest commit, in seconds since 1970.",
    "recovery_point_seconds": "Age of the newest committed checkpoint: the work that would be lost if nothing in memory survived.",
    "snapshot_recovery_point_seconds": "Age of the newest snapshot or committed checkpoint: the work that would be lost otherwise.",
    "lag_steps": "Training steps between the newest snapshot in memory and the newest commit.",
    "storage_reachable": "1 while the job's sidecars can use the storage.",
    "pods": "Pods of the job.",
    "checkpoints": "Checkpoints of the job on storage.",
    "goodput_ratio": "Share of the run's time that trained, and whose training was kept.",
    "attempts": "Attempts of the training.",
}
_JOB_SECONDS: Final = "run_seconds"
_JOB_COUNTERS: Final = {
    # By the name in a report: the metric, its help, and the label that tells it from its siblings.
    "saves_committed": ("saves", "Saves, by outcome.", ("outcome", "committed")),
    "saves_failed": ("saves", "", ("outcome", "failed")),
    "saves_skipped": ("saves", "", ("outcome", "skipped")),
    "saves_replaced": ("saves", "", ("outcome", "replaced")),
    "saves_interrupted": ("saves", "", ("outcome", "interrupted")),
    "saves_waited": ("save_waits", "Saves that had to wait for a slot.", None),
    "snapshots": ("snapshots", "Snapshots in memory.", None),
    "stalls": ("stalls", "Saves that delayed training, in the coordinator's pod.", None),
    "stall_seconds": ("stall_seconds", "Delay of the slowest rank by these saves.", None),
    "loads_arena": ("loads", "Loads, by source.", ("source", "arena")),
    "loads_local": ("loads", "", ("source", "local")),
    "loads_storage": ("loads", "", ("source", "storage")),
    "checkpoints_refused": ("checkpoints_refused", "Checkpoints that a load skipped as corrupt.", None),
    "executor_restarts": ("executor_restarts", "Restarts of executors.", None),
    "persisted_bytes": ("persisted_bytes", "Bytes committed, of all ranks.", None),
    "persist_seconds": (
        "persist_seconds",
        "Time from the seal in the coordinator's pod to its last durable byte.",
        None,
    ),
    "queue_seconds": ("queue_seconds", "Part of the persist time that sealed saves waited for the executor.", None),
    "commit_seconds": ("commit_seconds", "Time of commits.", None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """The values of one job's series."""

    namespace: str
    job: str
    policy: str
    gauges: Mapping[str, float]
    """By the name in `_JOB_GAUGES`; what is not known is left out."""
    counters: Mapping[str, float]
    """By the name in `_JOB_COUNTERS`, since the sidecar started."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What the time of the run went to, by `home.RUN_KINDS`. Empty: not known."""


class Fleet(Collector):
    """
    Series of the jobs that report and of the policies that have pods, computed for each scrape.

    So they are there as long as the job is, and cost nothing in between.
    """

    def __init__(self) -> None:
        self.is_named = True
        """Whether there are series with the names of namespaces, jobs and policies; without them there is the number of jobs."""
        self.jobs: Callable[[], Iterable[JobRow]] = tuple
        self.pods: Callable[[], Iterable[tuple[tuple[str, str], int]]] = tuple

    def collect(self) -> Iterator[Metric]:
        rows = list(self.jobs())
        yield GaugeMetricFamily("pillion_jobs", "Jobs that report.", value=len(rows))
        if not self.is_named:
            return
        pods = GaugeMetricFamily(
            "pillion_policy_injected_pods", "Injected pods that run under the policy.", labels=("namespace", "policy")
        )
        for labels, number in islice(self.pods(), MAX_JOBS):
            pods.add_metric(labels, number)
        yield pods
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, text in _JOB_GAUGES.items():
            families[name] = GaugeMetricFamily(f"pillion_job_{name}", text, labels=_JOB_LABELS)
        for name, text, label in _JOB_COUNTERS.values():
            names = _JOB_LABELS + ((label[0],) if label else ())
            families.setdefault(name, CounterMetricFamily(f"pillion_job_{name}", text, labels=names))
        families[_JOB_SECONDS] = GaugeMetricFamily(
            f"pillion_job_{_JOB_SECONDS}", "Time of the run, by what it went to.", labels=(*_JOB_LABELS, "kind")
        )
        for row in rows[:MAX_JOBS]:
            own = (row.namespace, row.job, row.policy)
            for name in _JOB_GAUGES.keys() & row.gauges.keys():
                families[name].add_metric(own, row.gauges[name])
            for key in _JOB_COUNTERS.keys() & row.counters.keys():
                name, _, label = _JOB_COUNTERS[key]
                families[name].add_metric(own + ((label[1],) if label else ()), row.counters[key])
            for kind, spent_s in row.seconds.items():
                families[_JOB_SECONDS].add_metric((*own, kind), spent_s)
        yield from families.values()


FLEET: Final = Fleet()
REGISTRY.register(FLEET)
