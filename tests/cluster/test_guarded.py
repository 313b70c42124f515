"""
The story: what the chart's admission policies hold: the controller to its caBundle, and a pod to what injection wrote on it.

Called from: pytest. The requests are those of an attacker who has the account's token, or may edit pods.
"""

import base64
import json

import pytest

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, KubectlFailed
from support.release import NAMESPACE, Release

CONTROLLER = f"--as=system:serviceaccount:{NAMESPACE}:pillion-controller"
CONFIGURATION = "mutatingwebhookconfiguration"
ANOTHER = {
    "name": "another.pillion.dev",
    "clientConfig": {"url": "https://example.com"},
    "sideEffects": "None",
    "admissionReviewVersions": ["v1"],
}


def patched(kube: Kube, *operations: Json) -> str:
    """What the API server says to the controller's account; nothing is changed."""
    command = ("patch", CONFIGURATION, "pillion", "--type=json", "--dry-run=server", CONTROLLER, "-p")
    return kube.run(*command, json.dumps(operations))


@pytest.mark.parametrize(
    "operations",
    [
        [{"op": "replace", "path": "/webhooks/0/rules/0/resources", "value": ["*"]}],
        [
            {"op": "remove", "path": "/webhooks/0/clientConfig/service"},
            {"op": "add", "path": "/webhooks/0/clientConfig/url", "value": "https://example.com"},
        ],
        [{"op": "remove", "path": "/webhooks/0/matchConditions"}],
        [{"op": "replace", "path": "/webhooks/0/failurePolicy", "value": "Ignore"}],
        [{"op": "add", "path": "/webhooks/0/objectSelector", "value": {"matchLabels": {"a": "b"}}}],
        [{"op": "add", "path": "/webhooks/-", "value": ANOTHER}],
        [{"op": "remove", "path": "/webhooks/0"}],
        [{"op": "add", "path": "/metadata/labels/a", "value": "b"}],
    ],
    ids=["rules", "address", "conditions", "failure policy", "selector", "another", "none", "labels"],
)
def test_the_controller_changes_nothing_but_the_bundle(release: Release, operations: list[Json]) -> None:
    """Its account is refused each other change of its webhook configuration, which by its rights alone it could make."""
    with pytest.raises(KubectlFailed, match="pillion: the controller may change only the caBundle"):
        patched(release.kube, *operations)


def test_the_controller_changes_the_bundle(release: Release) -> None:
    """The one thing that it has to do is let through."""
    found = release.kube.get(CONFIGURATION, "pillion")
    assert found is not None
    bundle = base64.b64decode(found["webhooks"][0]["clientConfig"]["caBundle"]) * 2
    value = base64.b64encode(bundle).decode()
    assert "patched" in patched(
        release.kube, {"op": "replace", "path": "/webhooks/0/clientConfig/caBundle", "value": value}
    )


def test_what_injection_wrote_on_a_pod_stays(training: Training) -> None:
    """Neither the status nor the label can be changed or taken away; asking for a save, a label of one's own and deletion are as before."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    name = kube.until(lambda: kube.pods("train"), Deadline.RECOVERED, "the pod")[0]["metadata"]["name"]
    for change in (
        ("annotate", "--overwrite", "pod", name, "pillion.dev/status={}"),
        ("annotate", "pod", name, "pillion.dev/status-"),
        ("label", "pod", name, "pillion.dev/injected-"),
    ):
        with pytest.raises(KubectlFailed, match="must not change; create a new pod"):
            kube.run(*change)
    kube.annotate("pod", name, "pillion.dev/save-now=1")
    kube.run("label", "pod", name, "a=b")
    kube.delete("pod", name, "--wait=false")
