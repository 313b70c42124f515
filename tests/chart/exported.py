"""
The whole of: the metrics that operator and sidecar really have, as they tell a scrape.

Called from: the tests about rules, dashboard and the page on metrics.
Must never: read a name from the source, or touch the process's own registry: what is collected is what there is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase

from pillion.wire import home
from pillion_operator import metrics as operator
from pillion_sidecar.reporting import prometheus
from pillion_sidecar.run import journal
from pillion_sidecar.status import metrics as sidecar

OURS: Final = "pillion_"
SERIES: Final = {
    "counter": ("",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}
"""By type: what a series' name has behind the metric's."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Exported:
    """One metric, by the name that a query has; of a histogram and a summary, without what its series add."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str

    @property
    def series(self) -> set[str]:
        """The names that can stand in a query."""
        return {self.name + end for end in SERIES[self.kind]}


def of_operator() -> list[Exported]:
    """Those of webhook and controller: the counted ones, and the ones of a fleet of one job."""
    row = operator.JobRow(
        namespace="team",
        job="llm",
        policy="hourly",
        gauges=dict.fromkeys(operator._JOB_GAUGES, 1.0),
        counters=dict.fromkeys(operator._JOB_COUNTERS, 1.0),
        seconds=dict.fromkeys(home.RUN_KINDS, 1.0),
    )
    fleet = operator.Fleet()
    fleet.jobs, fleet.pods = (lambda: [row]), (lambda: [(("team", "hourly"), 1)])
    counted = [each for each in vars(operator).values() if isinstance(each, MetricWrapperBase)]
    # Labels that nothing was counted under yet are in no sample.
    labels = {next(iter(each.describe())).name: tuple(each._labelnames) for each in counted}
    registered = [each for each in operator.REGISTRY.collect() if each.name in labels]
    assert len(registered) == len(counted), "a metric is in no registry"
    return sorted([*_exported(registered, labels), *_exported(fleet.collect(), {})])


def of_sidecar() -> list[Exported]:
    """Those of one sidecar that has committed, and failed once."""
    numbers = sidecar.Metrics(last_committed_timestamp=1.0, failures_by_kind={"StorageFull": 1})
    status = SimpleNamespace(metrics=numbers, behind_s=0.0, run=SimpleNamespace(journal=journal.Journal))
    supervisor: Any = SimpleNamespace(sidecar_status=status, pod=None)
    return sorted(_exported(prometheus.Exporter(supervisor).collect(), {}))


def _exported(found: Iterable[Metric], labels: dict[str, tuple[str, ...]]) -> Iterable[Exported]:
    for each in found:
        sampled = dict.fromkeys(name for sample in each.samples for name in sample.labels if name != "le")
        yield Exported(
            name=each.name + ("_total" if each.type == "counter" else ""),
            kind=each.type,
            labels=labels.get(each.name, tuple(sampled)),
            text=each.documentation,
        )
