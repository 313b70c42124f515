"""
The whole of: the one writer: what it writes, how often, what it does when a write fails, and which events it posts.

Called from: pytest. The API server is in memory; tests/cluster has a real one.
"""

import asyncio
import copy
import dataclasses
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pillion.wire import home
from pillion_operator import metrics
from pillion_operator.cluster import client
from pillion_operator.controller import checkpoints, commands, mirror, policies, reconcile, work_queue
from pillion_operator.home.registry import Registry
from support import reports
from support.api_in_memory import ApiInMemory
from support.deadlines import Deadline

POLICIES = f"/apis/pillion.dev/v1alpha1/namespaces/{reports.NAMESPACE}/checkpointpolicies"
CHECKPOINTS = f"/apis/pillion.dev/v1alpha1/namespaces/{reports.NAMESPACE}/checkpoints"
SPEC: dict[str, Any] = {
    "trigger": {"periodSteps": 10},
    "staging": {"sizeLimit": "1Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "c"}},
}


class Writer:
    """A writer, its API server, and the jobs that it knows."""

    def __init__(self) -> None:
        self.api = ApiInMemory()
        self.jobs = Registry()
        self.events: list[tuple[str, str, bool]] = []
        api: Any = self.api
        self.reconciler = reconcile.Reconciler(api, self.jobs, lambda _: 2, self._post, clock=lambda: reports.NOW_S)

    def policy(self, **spec: Any) -> None:
        before = self.api.objects.get(f"{POLICIES}/{reports.POLICY}", {"metadata": {"resourceVersion": "0"}})
        document = {
            "apiVersion": "pillion.dev/v1alpha1",
            "kind": "CheckpointPolicy",
            "metadata": {
                "name": reports.POLICY,
                "namespace": reports.NAMESPACE,
                "uid": "policy-uid",
                "generation": 1,
                "resourceVersion": before["metadata"]["resourceVersion"] + "1",
            },
            "spec": SPEC | spec,
            "status": before.get("status") or {},
        }
        self.api.objects[f"{POLICIES}/{reports.POLICY}"] = document
        self.reconciler.policies.put(policies.project(copy.deepcopy(document)))

    def report(self, *steps: int, **changes: Any) -> None:
        received = self.jobs.receive(reports.report(*steps, **changes), created="t", now_s=time.monotonic())
        self.reconciler.mark_job(received.job.key)
        self.reconciler.mark_policy((reports.NAMESPACE, reports.POLICY))

    def status(self) -> dict[str, Any]:
        found = self.api.objects[f"{POLICIES}/{reports.POLICY}"].get("status") or {}
        return {each["type"]: each["status"] for each in found.get("conditions") or []}

    def names(self) -> list[str]:
        return [each["metadata"]["name"] for each in self.api.items("checkpoints")]

    def _post(self, about: Any, reason: str, message: str, *, warning: bool = False, action: str = "") -> None:
        del message, action
        self.events.append((str(about["name"]), str(reason), warning))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses of the product, a hundredth as long."""
    monkeypatch.setattr(reconcile, "DEBOUNCE_S", 0.002)
    monkeypatch.setattr(reconcile, "POLICY_PAUSE_S", 0.02)
    monkeypatch.setattr(reconcile, "TICK_S", 0.01)
    monkeypatch.setattr(work_queue, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(reconcile, "WRITES_PER_S", 10_000.0)


def run(scenario: Callable[[Writer], Awaitable[None]]) -> None:
    async def within() -> None:
        writer = Writer()
        running = asyncio.create_task(writer.reconciler.run())
        try:
            async with asyncio.timeout(Deadline.REPLY.s):
                await scenario(writer)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(within())


async def until(predicate: Callable[[], object]) -> None:
    """The scenario's deadline bounds it."""
    while not predicate():
        await asyncio.sleep(0.001)


async def quiet(writer: Writer) -> None:
    """Nothing is due, and nothing is being written."""
    await until(lambda: not waiting(writer))
    turn_s = writer.reconciler.last_turn_s
    await until(lambda: writer.reconciler.last_turn_s > turn_s)
    await until(lambda: not waiting(writer))


def waiting(writer: Writer) -> int:
    of = writer.reconciler
    return len(of._due_policies) + len(of._due_requests) + len(of._due_jobs)


def test_objects_follow_what_jobs_report() -> None:
    """Created with their status, then removed; and nothing is written when nothing changed."""

    async def scenario(writer: Writer) -> None:
        writer.policy()
        writer.report(10, 20)
        await until(lambda: writer.names() == ["run-000000010", "run-000000020"])
        await until(lambda: all(each["status"] for each in writer.api.items("checkpoints")))
        writer.report(20)
        await until(lambda: writer.names() == ["run-000000020"])
        await until(lambda: writer.status().get("StorageReachable") == "True")
        await quiet(writer)
        writer.api.calls.clear()
        writer.report(20, step=31)
        await quiet(writer)
        assert writer.api.writes() == []

    run(scenario)


def test_a_policys_status_is_written_and_its_turns_are_events() -> None:
    """A condition that turns bad is a warning, and good again is a word; the first time all is well says nothing."""

    async def scenario(writer: Writer) -> None:
        writer.policy()
        await until(lambda: writer.status().get("Ready") == "True")
        assert writer.events == []
        writer.report(10, storage_error="ENOSPC")
        await until(lambda: writer.status()["StorageReachable"] == "False")
        await until(lambda: len(writer.events) >= 1)
        assert writer.events == [(reports.POLICY, "StorageError", True)]
        writer.report(10)
        await until(lambda: writer.status()["StorageReachable"] == "True")
        await until(lambda: len(writer.events) >= 2)
        assert writer.events[1:] == [(reports.POLICY, "Writable", False)]
        writer.policy(trigger={})
        await until(lambda: writer.status()["Ready"] == "False")
        await until(lambda: len(writer.events) >= 3)
        assert writer.events[2:] == [(reports.POLICY, "Invalid", True)]

    run(scenario)


def test_a_job_that_falls_silent_leaves_its_objects_and_is_in_no_condition() -> None:
    """The policy says that no job reports; the checkpoints are still there."""

    async def scenario(writer: Writer) -> None:
        writer.policy()
        writer.report(10)
        await until(lambda: writer.status().get("StorageReachable") == "True")
        (job,) = writer.jobs.jobs()
        writer.jobs._jobs[job.key] = dataclasses.replace(job, seen_s=job.seen_s - 1000)
        await until(lambda: writer.status()["StorageReachable"] == "Unknown")
        assert writer.names() == ["run-000000010"]

    run(scenario)


def test_a_request_is_answered_with_events_on_it() -> None:
    """Saving and committed are worth an event; that it was asked is not."""

    async def scenario(writer: Writer) -> None:
        writer.report(10)
        made = await writer.api.create(CHECKPOINTS, {"metadata": {"name": "now"}, "spec": {"jobID": reports.JOB}})
        made["metadata"]["namespace"] = reports.NAMESPACE
        writer.api.objects[f"{CHECKPOINTS}/now"] = made
        request = checkpoints.project(made)
        writer.reconciler.checkpoints.changed(("", ""), None, request)

        def reason() -> str:
            conditions = writer.api.objects[f"{CHECKPOINTS}/now"]["status"].get("conditions") or [{"reason": ""}]
            return str(conditions[0]["reason"])

        def is_said(expected: str) -> bool:
            return reason() == expected

        await until(functools.partial(is_said, "Requested"))
        for progress, expected in ((home.Progress.ACCEPTED, "Saving"), (home.Progress.DONE, "Committed")):
            answer = home.Acknowledgement(id=commands.command_id(request), progress=progress.value, step=20)
            writer.report(10, 20, acknowledgements=(answer,))
            await until(functools.partial(is_said, expected))
        await quiet(writer)
        assert [each for each in writer.events if each[0] == "now"] == [
            ("now", "Saving", False),
            ("now", "Committed", False),
        ]
        assert writer.names() == ["now", "run-000000010"]

    run(scenario)


@pytest.mark.parametrize(
    "error", [client.Unreachable("away"), client.ApiError(403, "Forbidden", "no"), client.ApiError(500, "", "oops")]
)
def test_a_write_that_fails_is_worked_out_anew(error: Exception) -> None:
    """Nothing is lost, whatever it was that failed, and nothing is written twice."""

    async def scenario(writer: Writer) -> None:
        writer.api.fails = [error, error]
        writer.report(10, 20)
        await until(lambda: len(writer.names()) == 2)
        await until(lambda: all(each["status"] for each in writer.api.items("checkpoints")))
        await quiet(writer)
        assert len([each for each in writer.api.writes() if each[0] == "create"]) <= 4

    run(scenario)


def test_an_object_that_cannot_be_made_does_not_hold_up_the_others() -> None:
    """A namespace on its way out refuses for ever; other jobs have their objects meanwhile."""

    async def scenario(writer: Writer) -> None:
        create = writer.api.create

        async def refusing(path: str, body: Any) -> Any:
            if "/leaving/" in path:
                raise client.ApiError(403, "Forbidden", "the namespace is being terminated")
            return await create(path, body)

        writer.api.create = refusing  # type: ignore[method-assign]
        writer.report(10, namespace="leaving")
        writer.report(10)
        await until(lambda: writer.names() == ["run-000000010"])

    run(scenario)


def test_a_state_that_we_cannot_deal_with_is_counted_and_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One job's error of ours is not all jobs' end."""
    plan = mirror.plan

    def failing(report: home.Report, *rest: Any) -> Any:
        if report.job_id == "bad":
            raise RuntimeError("a mistake of ours")
        return plan(report, *rest)

    monkeypatch.setattr(mirror, "plan", failing)

    def errors() -> float:
        return metrics.REGISTRY.get_sample_value("pillion_reconcile_errors_total") or 0.0

    async def scenario(writer: Writer) -> None:
        before = errors()
        writer.report(10, job_id="bad")
        writer.report(10)
        await until(lambda: writer.names() == ["run-000000010"])
        await until(lambda: errors() > before)

    run(scenario)


def test_what_is_gone_is_forgotten() -> None:
    """An object that somebody removed while we were about to write to it is no error, and a mirrored one is made again."""

    async def scenario(writer: Writer) -> None:
        writer.policy()
        writer.report(10)
        await until(lambda: writer.names() == ["run-000000010"] and writer.status())
        await quiet(writer)
        del writer.api.objects[f"{CHECKPOINTS}/run-000000010"]
        writer.report(10, 20)
        writer.reconciler.checkpoints.remove(*writer.reconciler.checkpoints.for_job(next(iter(writer.jobs.jobs())).key))
        await until(lambda: writer.names() == ["run-000000010", "run-000000020"])
        del writer.api.objects[f"{POLICIES}/{reports.POLICY}"]
        writer.report(30)
        await until(lambda: writer.reconciler.policies.get(reports.NAMESPACE, reports.POLICY) is None)

    run(scenario)


def test_another_object_of_the_same_name_is_not_written_to() -> None:
    """The UID is part of each write."""

    async def scenario(writer: Writer) -> None:
        writer.report(10)
        await until(lambda: [each for each in writer.api.items("checkpoints") if each["status"]])
        await quiet(writer)
        writer.api.objects[f"{CHECKPOINTS}/run-000000010"]["metadata"]["uid"] = "another"
        writer.report()
        await quiet(writer)
        assert writer.names() == ["run-000000010"]

    run(scenario)


def test_a_job_with_many_checkpoints_does_not_keep_the_others_waiting() -> None:
    """Its writes come in batches, and another job's turn is between two of them."""

    async def scenario(writer: Writer) -> None:
        writer.report(*range(10, 200), job_id="large")
        writer.report(10, job_id="small")
        await until(lambda: len(writer.names()) == 191)
        created = [path for verb, path in writer.api.calls if verb == "patch status"]
        assert next(index for index, path in enumerate(created) if "small" in path) <= 2 * reconcile.BATCH

    run(scenario)


def test_writes_are_paced() -> None:
    """A burst, then the rate, whatever waits."""

    async def scenario() -> float:
        pace = reconcile.Pace(per_s=200.0, burst=5.0)
        begun_s = time.monotonic()
        for _ in range(25):
            await pace.wait()
        return time.monotonic() - begun_s

    assert asyncio.run(scenario()) >= 0.095
    assert reconcile.WRITES_PER_S >= 20.0
    assert reconcile.BURST <= 20.0
