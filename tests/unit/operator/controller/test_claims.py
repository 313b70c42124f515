"""
The whole of: what the controller reads of the claims that policies name, how often, and what it says where it cannot.

Called from: pytest. The API server is in memory; tests/cluster/test_claim.py has a real one.
"""

import asyncio
from typing import Any

import pytest

from pillion_operator.cluster import client, paths
from pillion_operator.controller import claims, policies
from support.api_in_memory import ApiInMemory

NAMESPACE = "team-a"
SPEC: dict[str, Any] = {
    "trigger": {"periodSteps": 10},
    "staging": {"sizeLimit": "1Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "c"}},
}
ONE_NODE = {"name": "c", "accessModes": ["ReadWriteOnce"]}


def entry(claim: Any = None, *, name: str = "c") -> policies.Policy:
    """A policy that names a claim, with what its status says of it."""
    return policies.project(
        {
            "apiVersion": "pillion.dev/v1alpha1",
            "kind": "CheckpointPolicy",
            "metadata": {"name": "llm", "namespace": NAMESPACE},
            "spec": SPEC | {"storage": {"persistentVolumeClaim": {"claimName": name}}},
            "status": {"claim": claim} if claim else {},
        }
    )


class Cluster:
    """An API server with claims, and what reads them."""

    def __init__(self) -> None:
        self.api = ApiInMemory()
        api: Any = self.api
        self.now_s = 1000.0
        self.claims = claims.Claims(api, clock=lambda: self.now_s)

    def put(self, *modes: str, name: str = "c") -> None:
        path = paths.VOLUME_CLAIMS.one(NAMESPACE, name)
        self.api.objects[path] = {"metadata": {"name": name}, "spec": {"accessModes": list(modes)}}

    def of(self, policy: policies.Policy) -> Any:
        return asyncio.run(self.claims.of_policy(policy))


def test_the_access_modes_of_a_claim_are_read_once() -> None:
    """They never change, so each further look at the policy costs no request."""
    cluster = Cluster()
    cluster.put("ReadWriteOnce")
    assert [cluster.of(entry()) for _ in range(3)] == [ONE_NODE] * 3
    assert cluster.api.calls == [("get", "/api/v1/namespaces/team-a/persistentvolumeclaims/c")]


def test_a_claim_that_comes_after_its_policy_is_found() -> None:
    """An absent claim is asked for again after a pause, and not before it."""
    cluster = Cluster()
    assert cluster.of(entry()) is None
    cluster.put("ReadWriteMany")
    assert cluster.of(entry()) is None
    cluster.now_s += claims.ABSENT_S
    assert cluster.of(entry()) == {"name": "c", "accessModes": ["ReadWriteMany"]}


@pytest.mark.parametrize("error", [client.ApiError(403, "Forbidden", "no right"), client.Unreachable("away")])
def test_a_claim_that_cannot_be_read_leaves_what_is_known(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """The status stays as it is, unless it is of another claim; the log has it once."""
    cluster = Cluster()
    cluster.api.fails = [error, error]
    assert cluster.of(entry(ONE_NODE)) == ONE_NODE
    assert cluster.of(entry(ONE_NODE, name="d")) is None
    assert cluster.of(entry(ONE_NODE)) == ONE_NODE
    assert [each.getMessage().split(":")[0] for each in caplog.records] == [f"cannot read the claim {n}" for n in "cd"]


def test_answers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the oldest answer is asked for again."""
    monkeypatch.setattr(claims, "MAX_KEPT", 2)
    cluster = Cluster()
    for name in "abc":
        cluster.put("ReadWriteMany", name=name)
        cluster.of(entry(name=name))
    cluster.api.calls.clear()
    for name in "cba":
        cluster.of(entry(name=name))
    assert [path[-1] for _, path in cluster.api.calls] == ["a"]


def test_a_policy_that_cannot_be_used_asks_for_nothing() -> None:
    """An invalid policy names no claim."""
    cluster = Cluster()
    invalid = policies.project({"metadata": {"name": "llm", "namespace": NAMESPACE}, "spec": {}})
    assert cluster.of(invalid) is None
    assert cluster.api.calls == []
