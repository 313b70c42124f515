"""
The whole of: what is kept of an injected pod, when an annotation asks for something, and finding the pod that reports.

Called from: pytest.
"""

import asyncio
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillion_operator.cluster import client
from pillion_operator.home import injected, times
from pillion_operator.home.refusal import Refused
from pillion_operator.injection import annotations, status
from support import reports
from support.api_in_memory import ApiInMemory

PATH = "/api/v1/namespaces/team-a/pods/run-0"


class Cache:
    def __init__(self, *pods: injected.Pod) -> None:
        self.pods = {(pod.namespace, pod.name): pod for pod in pods}

    def get(self, namespace: str, name: str) -> injected.Pod | None:
        return self.pods.get((namespace, name))


def projected(**metadata: Any) -> injected.Pod:
    found = injected.project(reports.pod(**metadata))
    assert found is not None
    return found


def annotated(at: str, *, value: str = "1", created: str = "2027-01-15T07:00:00Z") -> reports.Json:
    field: reports.Json = {"f:metadata": {"f:annotations": {f"f:{annotations.SAVE_NOW}": {}}}}
    return {
        "metadata": {
            "creationTimestamp": created,
            "annotations": {annotations.SAVE_NOW: value},
            "managedFields": [
                {"manager": "other", "time": "2027-01-15T09:00:00Z", "fieldsV1": {"f:metadata": {}}},
                {"manager": "kubectl-annotate", "time": at, "fieldsV1": field},
            ],
        }
    }


def test_a_pod_is_its_policy_its_job_and_its_owner() -> None:
    """The status annotation says what was injected; the owner is what made the pod."""
    found = projected()
    assert (found.policy, found.job_id, found.uid) == (reports.POLICY, reports.JOB, "pod-uid-0")
    assert found.owner == injected.Owner(api_version="batch/v1", kind="Job", name=reports.JOB, uid="job-uid")
    assert found.save_now == ""


@pytest.mark.parametrize(
    "metadata",
    [
        {"labels": {}},
        {"labels": None},
        {"annotations": {}},
        {"annotations": {annotations.STATUS: "{}"}},
        {"annotations": {annotations.STATUS: "no JSON"}},
    ],
)
def test_a_pod_that_was_not_injected_is_none(metadata: reports.Json) -> None:
    """Neither a label nor an annotation alone makes a pod ours."""
    assert injected.project(reports.pod(**metadata)) is None


def test_warnings_in_a_pods_annotation_are_bounded() -> None:
    """Everybody who creates a pod can write thousands of long ones, and there may be five thousand pods."""
    document = reports.pod()
    record = status.read(document)
    assert record is not None
    text = status.dump(dataclasses.replace(record, warnings=("w" * 10_000,) * 1000))
    found = projected(annotations={annotations.STATUS: text})
    assert found.warnings == ("w" * injected.MAX_WARNING,) * injected.MAX_WARNINGS


def test_an_annotation_asks_from_the_moment_that_it_was_set() -> None:
    """The time is that of whoever set it, and not of others who wrote to the object."""
    assert injected.save_now(annotated("2027-01-15T08:00:00Z")) == ("1", "2027-01-15T08:00:00Z")


def test_an_annotation_that_an_object_was_made_with_asks_for_nothing() -> None:
    """A pod template repeats it with every pod, which nobody means as a request."""
    assert injected.save_now(annotated("2027-01-15T07:00:00Z")) == ("", "")


def test_without_managed_fields_an_annotation_still_asks() -> None:
    """Only the time is not known then."""
    assert injected.save_now({"metadata": {"annotations": {annotations.SAVE_NOW: "x"}}}) == ("x", "")


def test_a_pod_in_the_cache_costs_no_question() -> None:
    """Name and UID have to fit."""
    api = ApiInMemory()
    pods = injected.Pods(Cache(projected()), api)
    assert asyncio.run(pods.find("team-a", "run-0", "pod-uid-0")) == projected()
    assert api.calls == []


def test_a_pod_that_is_not_in_the_cache_is_asked_for_once_in_a_while() -> None:
    """A new pod, or one that has ended and drains, is found; the answer, also a no, is remembered for ten seconds."""

    async def scenario() -> None:
        api = ApiInMemory()
        api.objects[PATH] = reports.pod()
        pods = injected.Pods(Cache(), api)
        for _ in range(3):
            assert await pods.find("team-a", "run-0", "pod-uid-0") == projected()
            assert await pods.find("team-a", "run-0", "another") is None
            assert await pods.find("team-a", "gone", "uid") is None
        assert len(api.calls) == 3

    asyncio.run(scenario())


def test_a_pod_of_the_same_name_is_not_the_one_that_reports() -> None:
    """A pod that was made anew does not speak for its predecessor, nor the other way round."""
    api = ApiInMemory()
    api.objects[PATH] = reports.pod(uid="new")
    pods = injected.Pods(Cache(projected(uid="new")), api)
    assert asyncio.run(pods.find("team-a", "run-0", "old")) is None


def test_when_the_api_server_is_away_nobody_is_refused_for_good() -> None:
    """The answer is 503, and nothing is remembered."""
    api = ApiInMemory()
    api.fails = [client.Unreachable("away")]
    api.objects[PATH] = reports.pod()
    pods = injected.Pods(Cache(), api)
    with pytest.raises(Refused) as caught:
        asyncio.run(pods.find("team-a", "run-0", "pod-uid-0"))
    assert caught.value.status == 503
    assert asyncio.run(pods.find("team-a", "run-0", "pod-uid-0")) is not None


def test_answers_about_pods_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many strangers call, only so many are remembered."""
    monkeypatch.setattr(injected, "MAX_REMEMBERED", 3)

    async def scenario() -> None:
        pods = injected.Pods(Cache(), ApiInMemory())
        for number in range(10):
            await pods.find("team-a", f"p{number}", "uid")
        assert len(pods._answers) == 3

    asyncio.run(scenario())


def test_questions_about_unknown_pods_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who makes up pods is told to come again after the first few, and a pod that is in the cache is found all the same."""
    monkeypatch.setattr(injected, "ASKED_BURST", 3.0)
    monkeypatch.setattr(injected, "ASKED_PER_S", 0.0)

    async def scenario() -> None:
        api = ApiInMemory()
        pods = injected.Pods(Cache(projected()), api)
        for number in range(3):
            assert await pods.find("team-a", f"p{number}", "uid") is None
        with pytest.raises(Refused) as caught:
            await pods.find("team-a", "p4", "uid")
        assert (caught.value.status, len(api.calls)) == (503, 3)
        assert await pods.find("team-a", "run-0", "pod-uid-0") == projected()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("namespace", "name"), [("team-a", "../secrets/x"), ("a/b", "p"), ("", "p"), ("team-a", "P?x")]
)
def test_what_is_no_name_is_not_asked_about(namespace: str, name: str) -> None:
    """A token that nobody has checked yet says both; neither can lead a question to another object."""
    api = ApiInMemory()
    assert asyncio.run(injected.Pods(Cache(), api).find(namespace, name, "uid")) is None
    assert api.calls == []


@given(st.text(max_size=50) | st.datetimes().map(lambda each: each.isoformat() + "Z"))
def test_a_time_is_one_that_the_api_server_takes_or_none(text: str) -> None:
    """Whatever a report holds in place of a time, what is written is RFC 3339 to the second, or empty."""
    found = times.canonical(text)
    assert found == "" or times.parse(found) is not None
    assert times.canonical(found) == found


@pytest.mark.parametrize("text", ["2027-01-15", "2027-02-30T00:00:00Z", "2027-01-15T00:00:00", "now", "", "0" * 100])
def test_what_is_no_time_is_none(text: str) -> None:
    """A date alone, a day that is not in the calendar, and a time of no zone are not stored."""
    assert times.parse(text) is None


def test_times_of_other_zones_are_the_same_moment() -> None:
    """An offset and fractions are understood."""
    assert times.canonical("2027-01-15T09:30:00.250+01:30") == "2027-01-15T08:00:00Z"
