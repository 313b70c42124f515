"""
The whole of: whose token it is, how often the API server is asked, and what is refused, with which words.

Called from: pytest.
"""

import asyncio
import base64
import json
from typing import Any

import pytest

from pillion_operator.cluster import client, paths
from pillion_operator.home import authenticate
from pillion_operator.home.refusal import Refused, Result
from support import reports
from support.api_in_memory import ApiInMemory


class Clock:
    def __init__(self) -> None:
        self.s = reports.NOW_S

    def __call__(self) -> float:
        return self.s


class Pods:
    """Injected pods: those of these UIDs, or all."""

    def __init__(self, *uids: str) -> None:
        self.uids = uids

    async def find(self, namespace: str, name: str, uid: str) -> object | None:
        del namespace, name
        return object() if not self.uids or uid in self.uids else None


def made(*uids: str, **review: Any) -> tuple[authenticate.Authenticator, ApiInMemory, Clock]:
    """An authenticator that knows the injected pods of these UIDs; none given: all that are named."""
    api, clock = ApiInMemory(), Clock()
    api.review = lambda _: reports.review(**review)
    return authenticate.Authenticator(api, reports.AUDIENCE, Pods(*uids), clock=clock), api, clock


def ask(authenticator: authenticate.Authenticator, token: str) -> authenticate.Identity:
    return asyncio.run(authenticator.authenticate(f"Bearer {token}"))


def refused(authenticator: authenticate.Authenticator, header: str) -> Refused:
    with pytest.raises(Refused) as caught:
        asyncio.run(authenticator.authenticate(header))
    return caught.value


def test_a_token_is_the_pod_that_it_was_made_for() -> None:
    """Namespace, pod, UID and service account come from the API server's answer."""
    authenticator, api, _ = made(namespace="team-b", pod="p", uid="u")
    assert ask(authenticator, reports.token()) == authenticate.Identity(
        namespace="team-b", pod="p", pod_uid="u", service_account="default"
    )
    assert api.calls == [("review", paths.TOKEN_REVIEWS.everywhere)]


def test_a_token_is_asked_about_once_a_minute() -> None:
    """Within `KNOWN_S` the answer is remembered, afterwards it is asked for again."""
    authenticator, api, clock = made()
    for _ in range(3):
        ask(authenticator, reports.token())
    assert len(api.calls) == 1
    clock.s += authenticate.KNOWN_S + 1
    ask(authenticator, reports.token())
    assert len(api.calls) == 2


def test_an_answer_never_outlives_the_token() -> None:
    """A token that ends in ten seconds is refused in eleven, though the answer about it is younger than a minute."""
    authenticator, api, clock = made()
    token = reports.token(end_s=reports.NOW_S + 10)
    ask(authenticator, token)
    clock.s += 11
    assert refused(authenticator, f"Bearer {token}").status == 401
    assert len(api.calls) == 1


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("", "Authorization"),
        ("Basic abc", "Authorization"),
        ("Bearer ", "Authorization"),
        ("Bearer garbage", "not a service account token"),
        ("Bearer a.b.c", "not a service account token"),
        (f"Bearer {'x' * (authenticate.MAX_TOKEN + 1)}", "longer"),
        (f"Bearer {reports.token('other')}", "another audience"),
        (f"Bearer {reports.token(end_s=reports.NOW_S - 1)}", "expired"),
    ],
)
def test_what_cannot_be_a_token_of_ours_is_refused_without_a_question(header: str, part: str) -> None:
    """The words say what is wrong, the status is 401, and the API server is left alone."""
    authenticator, api, _ = made()
    found = refused(authenticator, header)
    assert (found.status, found.headers) == (401, {"WWW-Authenticate": "Bearer"})
    assert part in str(found)
    assert api.calls == []


def test_what_the_api_server_refuses_is_refused_and_remembered_for_a_while() -> None:
    """A token that looks right and is not known costs one question in ten seconds."""
    authenticator, api, clock = made()
    api.review = lambda _: {"status": {"authenticated": False, "error": "unknown"}}
    for _ in range(3):
        assert refused(authenticator, f"Bearer {reports.token()}").status == 401
    assert len(api.calls) == 1
    clock.s += authenticate.REFUSED_S + 1
    refused(authenticator, f"Bearer {reports.token()}")
    assert len(api.calls) == 2


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({}, 401),
        (reports.review(audience="other")["status"], 401),
        (reports.review()["status"] | {"audiences": None}, 401),
        (reports.review()["status"] | {"user": {"username": "alice"}}, 403),
        (reports.review()["status"] | {"user": {"username": "system:serviceaccount:a:b"}}, 403),
        (reports.review(uid="")["status"], 403),
    ],
)
def test_a_token_that_names_no_pod_is_refused(answer: dict[str, Any], status: int) -> None:
    """An audience that was not looked at, a person's token, and one that is bound to no pod are all refused."""
    found = authenticate.judge(answer, reports.AUDIENCE)
    assert isinstance(found, Refused)
    assert found.status == status


@pytest.mark.parametrize("error", [client.Unreachable("away"), client.ApiError(403, "Forbidden", "no"), None])
def test_an_api_server_that_cannot_be_asked_is_nobodys_fault(error: Exception | None) -> None:
    """The answer is 503 with Retry-After, nothing is remembered, and the next try succeeds."""
    authenticator, api, _ = made()
    api.fails = [error] if error else [client.Unreachable("away"), client.Unreachable("away")]
    for _ in range(len(api.fails)):
        found = refused(authenticator, f"Bearer {reports.token()}")
        assert (found.status, found.result) == (503, Result.UNAVAILABLE)
        assert "Retry-After" in found.headers
    assert ask(authenticator, reports.token()).pod == "run-0"


def test_many_who_ask_at_once_are_one_question() -> None:
    """Single flight: the one that asked first may be cancelled, and the others still get their answer."""

    async def scenario() -> int:
        authenticator, api, _ = made()
        api.gate = asyncio.Event()
        header = f"Bearer {reports.token()}"
        first, *others = [asyncio.create_task(authenticator.authenticate(header)) for _ in range(5)]
        while not api.calls:
            await asyncio.sleep(0)
        first.cancel()
        api.gate.set()
        found = await asyncio.gather(*others)
        assert {each.pod for each in found} == {"run-0"}
        return len(api.calls)

    assert asyncio.run(scenario()) == 1


def test_questions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many are asked at one time, only so many wait, and what is remembered does not grow."""
    monkeypatch.setattr(authenticate, "MAX_WAITING", 12)
    monkeypatch.setattr(authenticate, "MAX_REMEMBERED", 5)

    async def scenario() -> None:
        authenticator, api, _ = made()
        api.gate = asyncio.Event()
        tasks = [
            asyncio.create_task(authenticator.authenticate(f"Bearer {reports.token(uid=str(number))}"))
            for number in range(13)
        ]
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(api.calls) == authenticate.ASKED_AT_ONCE
        assert tasks[12].done()
        error = tasks[12].exception()
        assert isinstance(error, Refused)
        assert error.result is Result.BUSY
        api.gate.set()
        await asyncio.gather(*tasks[:12])
        assert len(authenticator._identities) == 5
        assert authenticator._asking == {}
        assert authenticator._asking_for == {}

    asyncio.run(scenario())


def test_a_token_that_names_no_injected_pod_costs_no_question() -> None:
    """A stranger's token, however many there are, is refused with 403 before the API server is asked, and nothing is kept of it."""
    authenticator, api, _ = made("pod-uid-0")
    for number in range(50):
        found = refused(authenticator, f"Bearer {reports.token(uid=str(number))}")
        assert (found.status, found.result) == (403, Result.FORBIDDEN)
    assert api.calls == []
    assert (len(authenticator._refused), len(authenticator._asking)) == (0, 0)
    assert ask(authenticator, reports.token()).pod == "run-0"


@pytest.mark.parametrize(
    "bound", [None, [], {}, {"namespace": "a"}, {"namespace": "a", "pod": {"name": "p", "uid": 5}}]
)
def test_a_token_that_is_bound_to_no_pod_costs_no_question(bound: Any) -> None:
    """A person's token, or one of a Secret, says itself that no pod has it."""
    authenticator, api, _ = made()
    claims = json.dumps({"aud": [reports.AUDIENCE], "exp": reports.NOW_S + 60, "kubernetes.io": bound}).encode()
    found = refused(authenticator, f"Bearer a.{base64.urlsafe_b64encode(claims).decode()}.b")
    assert (found.status, api.calls) == (403, [])


def test_refusals_push_no_good_token_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows an injected pod may make up tokens for it; the good one is remembered, and they are bounded."""
    monkeypatch.setattr(authenticate, "MAX_REMEMBERED", 2)
    monkeypatch.setattr(authenticate, "MAX_REFUSALS", 3)
    authenticator, api, _ = made()
    ask(authenticator, reports.token())
    api.review = lambda _: {"status": {"authenticated": False}}
    for number in range(10):
        assert refused(authenticator, f"Bearer {reports.token(name=str(number))}").status == 401
    assert len(authenticator._refused) == 3
    before = len(api.calls)
    ask(authenticator, reports.token())
    assert len(api.calls) == before


def test_one_pods_tokens_do_not_keep_anothers_waiting() -> None:
    """While as many tokens of one pod are asked about as may be, its next is told to come again, and another pod's is taken."""

    async def scenario() -> None:
        authenticator, api, _ = made()
        api.gate = asyncio.Event()
        mine = [
            asyncio.create_task(authenticator.authenticate(f"Bearer {reports.token(name=str(number))}"))
            for number in range(authenticate.ASKED_FOR_A_POD + 1)
        ]
        other = asyncio.create_task(authenticator.authenticate(f"Bearer {reports.token(uid='another')}"))
        while not mine[-1].done():
            await asyncio.sleep(0)
        error = mine[-1].exception()
        assert isinstance(error, Refused)
        assert error.result is Result.BUSY
        api.gate.set()
        await asyncio.gather(*mine[:-1], other)

    asyncio.run(scenario())


def test_a_token_is_not_kept() -> None:
    """What is remembered is a digest."""
    authenticator, _, _ = made()
    ask(authenticator, reports.token())
    assert reports.token() not in repr(vars(authenticator))
