"""
The whole of: what the API server asks, and how a decision is put in its words.

Called from: pytest.
"""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillion_operator.injection import annotations, checkpoint_policy, decide, status
from pillion_operator.injection.reasons import Reason
from pillion_operator.settings import Settings
from pillion_operator.webhook import review, server
from support import json_patch

POD: dict[str, Any] = {
    "metadata": {"name": "train", "annotations": {"pillion.dev/policy": "llm"}},
    "spec": {"containers": [{"name": "trainer", "image": "example/train:1"}]},
}
POLICY = checkpoint_policy.from_object(
    {
        "apiVersion": "pillion.dev/v1alpha1",
        "kind": "CheckpointPolicy",
        "metadata": {"name": "llm", "uid": "1", "generation": 1},
        "spec": {
            "trigger": {"periodSteps": 10},
            "staging": {"sizeLimit": "1Gi"},
            "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
        },
    }
)


def document(**request: Any) -> dict[str, Any]:
    """A review of the pod's making; what is given replaces or adds."""
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    asked = {"uid": "42", "kind": kind, "operation": "CREATE", "namespace": "team-a", "object": POD}
    return {"apiVersion": review.API_VERSION, "kind": "AdmissionReview", "request": asked | request}


def question(**request: Any) -> review.Question:
    return review.read(json.dumps(document(**request)).encode())


def answered(decision: decide.Decision | None, **request: Any) -> dict[str, Any]:
    """The response to a review."""
    found = json.loads(review.answer(question(**request), decision))
    assert (found["apiVersion"], found["kind"]) == (review.API_VERSION, "AdmissionReview")
    assert found["response"]["uid"] == "42"
    response: dict[str, Any] = found["response"]
    return response


def test_an_injection_is_a_patch_of_the_pod_that_was_sent() -> None:
    """The patch that is answered makes the injected pod of the one in the question."""
    decision = decide.inject(POD, POLICY, Settings())
    assert isinstance(decision, decide.Inject)
    response = answered(decision)
    assert response["allowed"] is True
    # The pod says no user: what will probably not do what its author means is a line for a person.
    assert [each[:9] for each in response["warnings"]] == ["pillion: "]
    assert response["patchType"] == "JSONPatch"
    assert json_patch.apply(POD, json.loads(base64.b64decode(response["patch"]))) == decision.pod
    assert response["auditAnnotations"] == {"decision": "inject", "reason": "Injected"}


def test_a_pod_that_is_injected_already_gets_no_patch() -> None:
    """Reinvocation changes nothing, and says so by saying nothing."""
    first = decide.inject(POD, POLICY, Settings())
    assert isinstance(first, decide.Inject)
    response = answered(decide.inject(first.pod, POLICY, Settings()), object=first.pod)
    assert response["allowed"] is True
    assert "patch" not in response


def test_a_refusal_says_who_why_and_what_is_particular() -> None:
    """kubectl shows the reason's code, its sentence, and the details."""
    response = answered(decide.Deny(reason=Reason.POLICY_MISSING, details=("policy llm",)))
    assert response["allowed"] is False
    assert response["status"]["code"] == review.DENIED
    message = response["status"]["message"]
    assert message.startswith("pillion: PolicyMissing: No CheckpointPolicy of that name")
    assert message.endswith("(policy llm)")


@pytest.mark.parametrize("reason", list(Reason))
def test_a_pod_that_starts_without_its_sidecar_comes_with_a_warning(reason: Reason) -> None:
    """Whoever opted in is warned when nothing is injected; whoever did not, or opted out, is not."""
    response = answered(decide.Skip(reason=reason, details=("because",)))
    assert response["allowed"] is True
    wanted = reason not in (Reason.NOT_OPTED_IN, Reason.OPTED_OUT, Reason.MIRROR_POD)
    assert ("warnings" in response) == wanted
    if wanted:
        assert any("because" in each for each in response["warnings"])
        assert all(each.startswith(f"pillion: {reason}: ") for each in response["warnings"])


@given(st.lists(st.text(max_size=6000), max_size=5))
def test_no_text_breaks_the_bounds_of_an_answer(details: list[str]) -> None:
    """A warning is one header's line of bounded length, and a refusal is bounded, whatever a policy's problems say."""
    for each in answered(decide.Skip(reason=Reason.POLICY_INVALID, details=tuple(details)))["warnings"]:
        assert len(each) <= 256
        assert "\n" not in each
        assert "\r" not in each
    message = answered(decide.Deny(reason=Reason.POLICY_INVALID, details=tuple(details)))["status"]["message"]
    assert len(message) <= 4000


@pytest.mark.parametrize(
    "request_",
    [
        {"operation": "UPDATE"},
        {"subResource": "ephemeralcontainers"},
        {"kind": {"group": "apps", "version": "v1", "kind": "Deployment"}},
    ],
)
def test_what_is_no_making_of_a_pod_passes_untouched(request_: dict[str, Any]) -> None:
    """A webhook that is registered for too much does no harm."""
    assert question(**request_).pod is None
    assert answered(None, **request_) == {"uid": "42", "allowed": True}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        json.dumps(document() | {"apiVersion": "admission.k8s.io/v1beta1"}).encode(),
        json.dumps(document() | {"request": None}).encode(),
        json.dumps(document(uid=None)).encode(),
        json.dumps(document(object=None)).encode(),
    ],
)
def test_what_is_no_question_is_refused_in_words(body: bytes) -> None:
    """Nothing that comes makes the server fail in another way than with the reason."""
    with pytest.raises(review.BadReview, match=r"\w"):
        review.read(body)


def test_a_patch_leaves_what_the_api_server_keeps_of_writers_as_it_is() -> None:
    """The patch of a pod with managedFields is that of one without, and so has no operation about them."""
    fields = [{"manager": "kube-controller-manager", "fieldsV1": {"f:spec": {}}}]
    written = POD | {"metadata": POD["metadata"] | {"managedFields": fields}}
    patches = []
    for each in (POD, written):
        asked = question(object=each)
        assert asked.pod is not None
        patches.append(json.loads(review.answer(asked, decide.inject(asked.pod, POLICY, Settings()))))
    assert patches[0] == patches[1]


def test_a_dry_run_is_seen() -> None:
    """Whether anything may be left behind is part of the question."""
    assert question(dryRun=True).is_dry_run
    assert not question().is_dry_run


def test_an_event_is_about_the_pods_controller() -> None:
    """The pod does not exist yet, so the Event is on its owner, in the namespace of the request."""
    owners = [
        {"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "1"},
        {"apiVersion": "batch/v1", "kind": "Job", "name": "train", "uid": "2", "controller": True},
    ]
    owned = POD | {"metadata": POD["metadata"] | {"ownerReferences": owners}}
    expected = {"apiVersion": "batch/v1", "kind": "Job", "name": "train", "uid": "2", "namespace": "team-a"}
    assert review.about(question(object=owned)) == expected
    assert review.about(question())["name"] == "train"
    assert review.about(question())["kind"] == "Pod"


def test_a_review_parses_annotations_and_status_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a pod that is injected already: a pod may have a quarter of a MiB of annotations, and the API server asks twice."""
    injected = decide.inject(POD, POLICY, Settings())
    assert isinstance(injected, decide.Inject)
    calls: Counter[str] = Counter()

    def counted(name: str, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(value: Any) -> Any:
            calls[name] += 1
            return original(value)

        return call

    monkeypatch.setattr(annotations, "parse", counted("parse", annotations.parse))
    monkeypatch.setattr(status, "read", counted("read", status.read))

    class Policies:
        async def find(self, namespace: str, name: str) -> checkpoint_policy.CheckpointPolicy:
            return POLICY

    policies: Any = Policies()
    refusals: Any = None

    async def decided() -> decide.Decision:
        asked = question(object=injected.pod)
        until_s = asyncio.get_running_loop().time() + server.DEADLINE_S
        return await server.Server(policies, refusals, Settings()).decision(asked, until_s)

    assert isinstance(asyncio.run(decided()), decide.Inject)
    assert calls == {"parse": 1, "read": 1}
