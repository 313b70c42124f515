"""
The whole of: the HTTP of calling home, with a real client and a real server on the loopback interface.

Called from: pytest. The API server is in memory; tests/cluster has a real one.
"""

import asyncio
import dataclasses
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pillion.wire import home
from pillion_operator import metrics
from pillion_operator.cluster import client
from pillion_operator.home import authenticate, injected, registry, server
from pillion_operator.home.registry import JobKey, Received
from support import reports
from support.api_in_memory import ApiInMemory

SPEC = {"trigger": {"periodSteps": 10}}


class Called:
    """A server, and what it was asked and told."""

    def __init__(self) -> None:
        self.api = ApiInMemory()
        self.api.review = lambda _: reports.review()
        self.pods: dict[tuple[str, str], injected.Pod] = {}
        found = injected.project(reports.pod())
        assert found is not None
        self.put(found)
        self.received: list[Received] = []
        self.commands: tuple[home.Command, ...] = ()
        self.registry = registry.Registry()
        self.policy = server.PolicyNow(SPEC, 7)
        self.url = ""
        self.session: aiohttp.ClientSession
        pods = injected.Pods(self, self.api)
        self.home = server.Home(
            authenticate.Authenticator(self.api, reports.AUDIENCE, pods, clock=lambda: reports.NOW_S),
            pods,
            self.registry,
            policy_of=self._policy_of,
            commands_of=self._commands_of,
            on_report=self.received.append,
        )

    def put(self, pod: injected.Pod) -> None:
        self.pods[pod.namespace, pod.name] = pod

    def get(self, namespace: str, name: str) -> injected.Pod | None:
        return self.pods.get((namespace, name))

    async def post(self, body: Any, *, token: str | None = None, path: str = home.REPORT_PATH) -> tuple[int, str]:
        given = reports.token() if token is None else token
        data = home.encode(body) if isinstance(body, home.Report) else body
        async with self.session.post(
            f"{self.url}{path}", data=data, headers={"Authorization": f"Bearer {given}"}
        ) as response:
            return response.status, await response.text()

    def _policy_of(self, namespace: str, name: str) -> server.PolicyNow:
        return self.policy if (namespace, name) == (reports.NAMESPACE, reports.POLICY) else server.NO_POLICY

    def _commands_of(self, key: JobKey) -> tuple[home.Command, ...]:
        return self.commands if key == JobKey(reports.NAMESPACE, reports.JOB) else ()


@asynccontextmanager
async def serving() -> AsyncIterator[Called]:
    called = Called()
    runner = web.AppRunner(called.home.application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    called.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as called.session:
        yield called
    await runner.cleanup()


def run(scenario: Callable[[Called], Awaitable[None]]) -> None:
    async def within() -> None:
        async with serving() as called:
            await scenario(called)

    asyncio.run(within())


def test_a_report_is_answered_with_policy_commands_and_interval() -> None:
    """What the job is to do comes back at once, and the report is known."""

    async def scenario(called: Called) -> None:
        called.commands = (home.Command(id="one"),)
        status, text = await called.post(reports.report(10))
        assert status == 200
        answer = home.decode_answer(text.encode())
        assert (answer.policy, answer.policy_generation) == (SPEC, 7)
        assert answer.commands == (home.Command(id="one"),)
        assert answer.interval_s == home.DEFAULT_INTERVAL_S
        found = called.registry.get(JobKey(reports.NAMESPACE, reports.JOB))
        assert found is not None
        assert found.report == reports.report(10)
        assert [each.changed for each in called.received] == [True]

    run(scenario)


def test_a_policy_that_is_gone_is_no_policy() -> None:
    """The answer says so, and the job goes on with what it has."""

    async def scenario(called: Called) -> None:
        called.policy = server.NO_POLICY
        _, text = await called.post(reports.report(10))
        answer = home.decode_answer(text.encode())
        assert (answer.policy, answer.policy_generation) == (None, 0)

    run(scenario)


@pytest.mark.parametrize(
    "claim",
    [{"namespace": "team-b"}, {"pod": "run-1"}, {"pod_uid": "x"}, {"policy": "other"}, {"job_id": "other"}],
    ids=lambda claim: next(iter(claim)),
)
def test_a_job_cannot_report_for_another(claim: dict[str, str]) -> None:
    """Whatever a report says of itself that its pod is not, is refused by name, and nothing is taken in."""

    async def scenario(called: Called) -> None:
        status, text = await called.post(dataclasses.replace(reports.report(10), **claim))  # type: ignore[arg-type]  # all are text
        assert status == 403
        assert next(iter(claim)) in text
        assert (len(called.registry), called.received) == (0, [])

    run(scenario)


def test_a_pod_that_was_not_injected_cannot_report() -> None:
    """A good token alone is not enough."""

    async def scenario(called: Called) -> None:
        called.pods.clear()
        status, text = await called.post(reports.report(10))
        assert status == 403
        assert "not injected" in text

    run(scenario)


def test_a_token_of_another_audience_is_refused() -> None:
    """The status is 401, and the words say which audience it has to be."""

    async def scenario(called: Called) -> None:
        status, text = await called.post(reports.report(10), token=reports.token("other"))
        assert status == 401
        assert reports.AUDIENCE in text

    run(scenario)


def test_without_the_api_server_a_job_is_told_to_come_again() -> None:
    """A token that cannot be checked is neither taken nor refused for good."""

    async def scenario(called: Called) -> None:
        called.api.fails = [client.Unreachable("away")]
        assert (await called.post(reports.report(10)))[0] == 503
        assert (await called.post(reports.report(10)))[0] == 200

    run(scenario)


@pytest.mark.parametrize("body", [b"", b"[]", b"no json", b'{"version":99}', b'{"version":1}'])
def test_what_is_no_report_is_refused_with_the_reason(body: bytes) -> None:
    """The status is 400 and the text names what is wrong."""

    async def scenario(called: Called) -> None:
        status, text = await called.post(body)
        assert status == 400
        assert "report" in text

    run(scenario)


def test_a_report_that_is_too_long_is_not_read() -> None:
    """The bound holds before the body is in memory; and a stranger's body is not read at all."""

    async def scenario(called: Called) -> None:
        status, text = await called.post(io.BytesIO(b"x" * (home.MAX_REPORT_BYTES + 1)))
        assert status == 400
        assert str(home.MAX_REPORT_BYTES) in text
        assert (await called.post(io.BytesIO(b"x" * (home.MAX_REPORT_BYTES + 1)), token="bad"))[0] == 401

    run(scenario)


def test_a_stale_report_is_answered_and_changes_nothing() -> None:
    """A pod of the attempt before goes on with the policy, gets no commands, and does not speak for the job."""

    async def scenario(called: Called) -> None:
        called.commands = (home.Command(id="one"),)
        newer = injected.project(reports.pod("run-1", creationTimestamp=reports.at(0)))
        assert newer is not None
        called.put(newer)
        called.api.review = lambda token: (
            reports.review() if token == reports.token() else reports.review(pod="run-1", uid="pod-uid-1")
        )
        new = reports.report(20, pod="run-1", pod_uid="pod-uid-1", session="b" * 32)
        assert (await called.post(new, token=reports.token(pod="run-1", uid="pod-uid-1")))[0] == 200
        status, text = await called.post(reports.report(10))
        assert status == 200
        assert home.decode_answer(text.encode()).commands == ()
        found = called.registry.get(JobKey(reports.NAMESPACE, reports.JOB))
        assert found is not None
        assert found.report == new
        assert len(called.received) == 1

    run(scenario)


def test_a_report_that_does_not_come_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that is never sent to its end, and a question that is never answered, end with 408."""
    monkeypatch.setattr(server, "DEADLINE_S", 0.05)

    async def scenario(called: Called) -> None:
        async def half() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        status, _ = await called.post(half())
        assert status == 408
        called.api.gate = asyncio.Event()
        status, _ = await called.post(reports.report(10), token=reports.token(name="new"))
        assert status == 408

    run(scenario)


def test_more_requests_than_the_bound_are_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in memory at one time is bounded, and a place is free again afterwards."""
    monkeypatch.setattr(server, "MAX_IN_FLIGHT", 2)

    async def scenario(called: Called) -> None:
        called.api.gate = asyncio.Event()
        held = [asyncio.create_task(called.post(reports.report(10))) for _ in range(2)]
        while called.home._in_flight < 2:
            await asyncio.sleep(0)
        assert (await called.post(reports.report(10)))[0] == 503
        called.api.gate.set()
        assert [status for status, _ in await asyncio.gather(*held)] == [200, 200]
        assert (await called.post(reports.report(10)))[0] == 200

    run(scenario)


def test_only_reports_are_served() -> None:
    """Nothing else is on this port."""

    async def scenario(called: Called) -> None:
        assert (await called.post(b"", path="/metrics"))[0] == 404
        async with called.session.get(f"{called.url}{home.REPORT_PATH}") as response:
            assert response.status == 405

    run(scenario)


def test_reports_are_counted_by_what_became_of_them() -> None:
    """One count for each outcome."""

    def count(result: str) -> float:
        return metrics.REGISTRY.get_sample_value("pillion_reports_total", {"result": result}) or 0.0

    async def scenario(called: Called) -> None:
        before = {each: count(each) for each in ("accepted", "forbidden", "unauthenticated", "bad")}
        await called.post(reports.report(10))
        await called.post(reports.report(10, job_id="other"))
        await called.post(reports.report(10), token="bad")
        await called.post(b"{}")
        assert {each: count(each) - value for each, value in before.items()} == dict.fromkeys(before, 1.0)

    run(scenario)
