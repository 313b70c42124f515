"""
The whole of: when the controller says that a pod was injected, and on what.

Called from: pytest.
"""

import dataclasses
from typing import Any

import pytest

from pillion_operator.controller import arrivals
from pillion_operator.home import injected
from pillion_operator.injection import annotations, status
from support import reports


def said(now_s: float, **metadata: Any) -> list[tuple[str, str, str, str]]:
    return said_of(reports.pod(**metadata), now_s)


def said_of(document: dict[str, Any], now_s: float) -> list[tuple[str, str, str, str]]:
    found = injected.project(document)
    assert found is not None
    posted: list[tuple[str, str, str, str]] = []

    def post(about: dict[str, str], reason: str, message: str) -> None:
        posted.append((about["kind"], about["name"], reason, message))

    arrivals.arrived(found, post, now_s)
    return posted


def test_an_injected_pod_is_news_on_its_owner() -> None:
    """The Event is on the Job that made the pod, with the policy and the job that it belongs to; without an owner on the pod."""
    made = {"creationTimestamp": reports.at(0)}
    message = f"The sidecar was injected. (policy {reports.POLICY}, job {reports.JOB})"
    assert said(reports.NOW_S + 2, **made) == [("Job", reports.JOB, "Injected", message)]
    assert said(reports.NOW_S + 2, **made, ownerReferences=[]) == [("Pod", "run-0", "Injected", message)]


def test_the_news_has_the_warnings_about_the_pod() -> None:
    """A person who creates a Job sees no answer about its pods: the Event on the Job has what injection warns of."""
    document = reports.pod(creationTimestamp=reports.at(0))
    record = status.read(document)
    assert record is not None
    doubts = ("the pod may take 700 s to terminate", "it is unclear which container trains")
    text = status.dump(dataclasses.replace(record, warnings=doubts))
    document["metadata"]["annotations"][annotations.STATUS] = text
    ((_, _, _, message),) = said_of(document, reports.NOW_S)
    assert message.endswith(f"job {reports.JOB}) Warning: {doubts[0]}. Warning: {doubts[1]}.")


@pytest.mark.parametrize("created", [reports.at(-3600), reports.at(3600), "", "no time"])
def test_a_pod_that_was_there_before_is_no_news(created: str) -> None:
    """A new leader lists five thousand pods, and says nothing of them."""
    assert said(reports.NOW_S, creationTimestamp=created) == []
