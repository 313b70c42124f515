"""
The whole of: what a report sets off: marks, events, commands, metrics; and the parts of the controller that are too small for a file.

Called from: pytest.
"""

import dataclasses
from typing import Any

import pytest
from kopf._core.intents import registries

from pillion.wire import home
from pillion_operator import metrics
from pillion_operator.controller import checkpoints, endpoint, handlers, policies
from pillion_operator.controller.pod_index import PodIndex
from pillion_operator.controller.reconcile import Reconciler
from pillion_operator.controller.report_handler import ReportHandler
from pillion_operator.home import injected
from pillion_operator.home.registry import JobKey, Registry
from pillion_operator.settings import Settings
from support import reports
from support.api_in_memory import ApiInMemory

KEY = JobKey(reports.NAMESPACE, reports.JOB)
FAILURE = home.Failure(step=30, reason="PersistError", message="No space left", time=reports.at(-5))


class Handled:
    """A handler of reports, and the events that it posted."""

    def __init__(self) -> None:
        self.jobs = Registry()
        self.events: list[tuple[str, str, bool]] = []
        self.pod_index = PodIndex(lambda _: None, lambda _: None)
        api: Any = ApiInMemory()
        self.reconciler = Reconciler(api, self.jobs, lambda _: 0, self._post)
        self.report_handler = ReportHandler(
            self.jobs, self.pod_index, self.reconciler, self, self._post, clock=lambda: reports.NOW_S
        )
        self.pod = injected.project(reports.pod())

    def get(self, namespace: str, name: str) -> injected.Pod | None:
        return self.pod if (namespace, name) == (reports.NAMESPACE, "run-0") else None

    def report(self, *steps: int, now_s: float = 0.0, **changes: Any) -> None:
        received = self.jobs.receive(reports.report(*steps, **changes), created="t", now_s=now_s)
        self.report_handler.reported(received)

    def _post(self, about: Any, reason: str, message: str, *, warning: bool = False, action: str = "") -> None:
        del message, action
        self.events.append((f"{about['kind']}/{about['name']}", str(reason), warning))


@pytest.fixture
def handled() -> Handled:
    return Handled()


def test_a_failure_is_an_event_on_the_pod_and_on_what_made_it(handled: Handled) -> None:
    """Once, though it stands in many reports."""
    handled.report(10)
    for _ in range(3):
        handled.report(10, failures=(FAILURE,))
    assert handled.events == [("Pod/run-0", "SaveFailed", True), ("Job/run", "SaveFailed", True)]
    again = dataclasses.replace(FAILURE, step=31)
    handled.report(10, failures=(again, FAILURE))
    assert len(handled.events) == 4


@pytest.mark.parametrize("reason", ["LoadFailed", "CheckpointRefused"])
def test_a_load_that_failed_or_passed_a_checkpoint_over_is_an_event_of_its_own(handled: Handled, reason: str) -> None:
    """Nobody takes a lost or corrupt checkpoint for a save that failed."""
    handled.report(10)
    handled.report(10, failures=(dataclasses.replace(FAILURE, reason=reason, step=-1),))
    assert handled.events == [("Pod/run-0", reason, True), ("Job/run", reason, True)]


def test_failures_from_before_a_restart_of_ours_are_no_news(handled: Handled) -> None:
    """What is older than a minute was told by the controller before; what is younger may not have been."""
    old = dataclasses.replace(FAILURE, time=reports.at(-100))
    handled.report(10, failures=(FAILURE, old))
    assert [each[0] for each in handled.events] == ["Pod/run-0", "Job/run"]


def test_a_change_marks_the_job_and_its_policies(handled: Handled) -> None:
    """A job that goes over to another policy concerns both."""
    handled.report(10)
    assert handled.reconciler._due_policies.take(1e9) == ((reports.NAMESPACE, reports.POLICY), 0)
    handled.report(10, step=20)
    assert handled.reconciler._due_policies.take(1e9) is None
    handled.report(10, policy="other")
    found = [handled.reconciler._due_policies.take(1e9) for _ in range(2)]
    assert {each[0][1] for each in found if each} == {reports.POLICY, "other"}


def test_a_job_is_told_of_requests_by_object_and_by_annotation(handled: Handled) -> None:
    """And of nothing that is asked of another job."""
    handled.report(10)
    assert handled.report_handler.commands_of(KEY) == ()
    handled.reconciler.checkpoints.put(reports.request())
    assert handled.pod is not None
    asked = dataclasses.replace(handled.pod, save_now="1", save_now_time=reports.at(0))
    handled.pod_index.pod_changed(("", ""), None, asked)
    assert [each.id.split("-")[0] for each in handled.report_handler.commands_of(KEY)] == ["checkpoint", "note"]
    assert handled.report_handler.commands_of(JobKey(reports.NAMESPACE, "other")) == ()
    assert handled.report_handler.commands_of(JobKey("other", reports.JOB)) == ()


def test_a_job_is_told_of_pins_by_annotation(handled: Handled) -> None:
    """As long as its report does not have the pin, and beside the saves that are asked for."""
    handled.report(10)
    ready = checkpoints.Status(step=10, ready=checkpoints.TRUE)
    handled.reconciler.checkpoints.put(
        reports.request("kept", trigger="Periodic", is_ours=True, pin=True, status=ready)
    )
    handled.reconciler.checkpoints.put(reports.request())
    told = [(each.kind, each.step) for each in handled.report_handler.commands_of(KEY)]
    assert told == [("SaveNow", -1), ("Pin", 10)]
    handled.report(10, checkpoints=(reports.stored(10, pinned_by="cluster"),))
    assert [each.kind for each in handled.report_handler.commands_of(KEY)] == ["SaveNow"]


def test_the_metrics_of_a_job_end_with_it(handled: Handled, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from its newest report, with the age of its newest commit; no series of a job that is gone is left."""
    numbers = {"saves_committed": 3, "saves_failed": 1, "persist_seconds": 2.5, "unknown": 1}
    spent = dict.fromkeys(home.RUN_KINDS, 1.0) | {"trained": 15.0}
    handled.report(10, 20, metrics=numbers, storage_error="x", run_seconds=spent, run_attempts=2)
    monkeypatch.setattr(metrics.FLEET, "jobs", handled.report_handler.rows)
    monkeypatch.setattr(metrics.FLEET, "pods", lambda: [((reports.NAMESPACE, reports.POLICY), 4)])

    def value(name: str, **labels: str) -> float | None:
        own = {"namespace": reports.NAMESPACE, "job": reports.JOB, "policy": reports.POLICY}
        return metrics.REGISTRY.get_sample_value(f"pillion_job_{name}", own | labels)

    assert value("last_committed_step") == 20
    assert value("recovery_point_seconds") == 3579
    assert value("storage_reachable") == 0
    assert value("checkpoints") == 2
    assert value("saves_total", outcome="committed") == 3
    assert value("saves_total", outcome="failed") == 1
    assert value("persist_seconds_total") == 2.5
    assert value("goodput_ratio") == 0.75
    assert value("attempts") == 2
    assert value("run_seconds", kind="down") == 1.0
    assert (
        metrics.REGISTRY.get_sample_value(
            "pillion_policy_injected_pods", {"namespace": reports.NAMESPACE, "policy": reports.POLICY}
        )
        == 4
    )
    assert metrics.REGISTRY.get_sample_value("pillion_jobs") == 1
    assert b"unknown" not in metrics.render()
    handled.jobs.forget_silent(1000.0)
    assert value("last_committed_step") is None
    assert reports.JOB.encode() + b'"' not in metrics.render()


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More jobs than the bound are counted, and have no series."""
    monkeypatch.setattr(metrics, "MAX_JOBS", 3)
    rows = [
        metrics.JobRow(namespace="n", job=f"j{number}", policy="p", gauges={"pods": 1.0}, counters={})
        for number in range(10)
    ]
    monkeypatch.setattr(metrics.FLEET, "jobs", lambda: rows)
    text = metrics.render().decode()
    assert text.count("pillion_job_pods{") == 3
    assert "pillion_jobs 10.0" in text


def test_kopf_has_no_handler_that_would_write() -> None:
    """Only raw events are handled: no annotation, no finalizer, no daemon, no timer, on anything."""
    api: Any = ApiInMemory()
    watcher = handlers.Watcher(api, policies.Policies(lambda _: None))
    found = watcher._registry()
    writing = (found._changing, found._spawning, found._indexing, found._webhooks)
    assert isinstance(found, registries.OperatorRegistry)
    assert [list(each.get_all_handlers()) for each in writing] == [[], [], [], []]
    (handler,) = found._watching.get_all_handlers()
    assert handler.selector is not None
    assert handler.selector.any_name == "checkpointpolicies"


def test_a_list_of_policies_makes_good_what_a_watch_missed() -> None:
    """What is not in it is gone."""
    changed: list[tuple[str, str]] = []
    known = policies.Policies(changed.append)

    def policy(name: str, version: str) -> policies.Policy:
        metadata = {"name": name, "namespace": "n", "resourceVersion": version, "generation": 1}
        spec = {"trigger": {"periodSteps": 1}}
        document = {"apiVersion": "pillion.dev/v1alpha1", "kind": "CheckpointPolicy", "metadata": metadata}
        return policies.project(document | {"spec": spec})

    known.replace_all([policy("a", "1"), policy("b", "1")])
    changed.clear()
    known.replace_all([policy("b", "1"), policy("c", "1")])
    assert changed == [("n", "a"), ("n", "c")]
    assert (known.get("n", "a"), known.now("n", "a").spec) == (None, None)
    assert known.now("n", "b").spec is None, "a policy that cannot be used is none to a job"


@pytest.mark.parametrize(("address", "family"), [("10.1.2.3", "IPv4"), ("fd00::1", "IPv6")])
def test_the_endpoint_is_the_leaders_own(address: str, family: str) -> None:
    """Of the Service without a selector, with the port's name, managed by nobody else; and empty when it goes."""
    settings = Settings(namespace="pillion-system", pod_name="c-0", pod_ip=address)
    found = endpoint.endpoint_slice(settings, [address], 8444)
    assert found["addressType"] == family
    assert found["metadata"]["labels"] == {
        "kubernetes.io/service-name": "pillion-home",
        "endpointslice.kubernetes.io/managed-by": "pillion.dev",
    }
    assert found["endpoints"][0]["addresses"] == [address]
    assert found["ports"] == [{"name": "https", "port": 8444, "protocol": "TCP"}]
    assert endpoint.endpoint_slice(settings, [], 8444)["endpoints"] == []
