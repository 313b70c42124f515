"""
The story: what a user gets wrong is said in words, at once, and heals when it is put right.

Called from: pytest.
"""

import json

import pytest

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, KubectlFailed, condition

PLAIN: Json = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "plain", "annotations": {"pillion.dev/policy": "llm"}},
    "spec": {"containers": [{"name": "main", "image": jobs.IMAGE, "command": ["sleep", "1"]}]},
}


def pod(**annotations: str) -> Json:
    """A pod that opted in, with more annotations."""
    metadata: Json = {"name": "plain", "annotations": {"pillion.dev/policy": "llm"} | annotations}
    return PLAIN | {"metadata": metadata}


def refused(kube: Kube, document: Json) -> str:
    """What kubectl says when the pod is refused."""
    with pytest.raises(KubectlFailed) as failed:
        kube.create(document)
    return str(failed.value)


@pytest.mark.may_warn("PolicyMissing")
def test_a_job_waits_for_its_policy(training: Training) -> None:
    """Without the policy no pod is made, the Job's events say which one is missing, and it runs once it is there."""
    kube = training.kube
    kube.create(*jobs.job(env={"STEPS": "30"}))

    def explained() -> list[str]:
        return [
            e["message"]
            for e in kube.events("train")
            if "PolicyMissing" in e["message"] and "policy llm" in e["message"]
        ]

    kube.until(explained, Deadline.HOME, "an event that names the policy")
    assert kube.pods("train") == []
    kube.apply(jobs.policy())
    kube.until(lambda: kube.pods("train"), Deadline.RECOVERED, "the Job to try again")
    (found,) = kube.pods("train")
    assert found["metadata"]["labels"]["pillion.dev/injected"] == "true"


def test_each_job_gets_the_policy_that_it_names(training: Training) -> None:
    """Of two policies a pod gets its own."""
    kube = training.kube
    kube.apply(
        jobs.policy("small", staging={"sizeLimit": "32Mi"}), jobs.policy("large", staging={"sizeLimit": "128Mi"})
    )
    for name, size in (("small", "96Mi"), ("large", "192Mi")):
        document = PLAIN | {"metadata": {"name": name, "annotations": {"pillion.dev/policy": name}}}
        kube.create(document)
        found = kube.get("pod", name)
        assert found is not None
        arena = next(each for each in found["spec"]["volumes"] if each["name"] == "pillion-arena")
        assert arena["emptyDir"] == {"medium": "Memory", "sizeLimit": size}


@pytest.mark.may_warn("BadAnnotation")
def test_a_bad_annotation_is_named_with_what_is_allowed(training: Training) -> None:
    """A value that is not allowed, or an annotation that does not exist, is refused with its name."""
    kube = training.kube
    kube.apply(jobs.policy())
    text = refused(kube, pod(**{"pillion.dev/staging-size-limit": "lots"}))
    assert "BadAnnotation" in text
    assert "pillion.dev/staging-size-limit" in text
    assert "did you mean pillion.dev/containers?" in refused(kube, pod(**{"pillion.dev/container": "main"}))
    assert "at most 64Mi, the limit of the policy" in refused(kube, pod(**{"pillion.dev/staging-size-limit": "1Gi"}))


def test_a_pod_that_opts_out_or_does_not_opt_in_is_left_alone(training: Training) -> None:
    """Neither gets anything, and a pod that does not opt in never reaches the webhook."""
    kube = training.kube
    kube.apply(jobs.policy())
    kube.create(pod(**{"pillion.dev/inject": "false"}))
    kube.create(PLAIN | {"metadata": {"name": "stranger"}})
    for name in ("plain", "stranger"):
        found = kube.get("pod", name)
        assert found is not None
        assert "initContainers" not in found["spec"]
        assert "pillion.dev/injected" not in found["metadata"].get("labels", {})


@pytest.mark.may_warn("PolicySuspended")
def test_a_suspended_policy_injects_no_new_pod(training: Training) -> None:
    """While a policy is suspended, new pods start as they are."""
    kube = training.kube
    kube.apply(jobs.policy(suspend=True))
    kube.create(pod())
    found = kube.get("pod", "plain")
    assert found is not None
    assert "initContainers" not in found["spec"]


@pytest.mark.may_warn("BadAnnotation")
def test_a_policy_that_ignores_failures_lets_the_pod_start_untouched(training: Training) -> None:
    """With failurePolicy Ignore, a bad annotation costs the injection, not the pod."""
    kube = training.kube
    kube.apply(jobs.policy(failurePolicy="Ignore"))
    kube.create(pod(**{"pillion.dev/staging-size-limit": "lots"}))
    found = kube.get("pod", "plain")
    assert found is not None
    assert "initContainers" not in found["spec"]


def test_dry_run_shows_the_injection_and_changes_nothing(training: Training) -> None:
    """`kubectl create --dry-run=server` answers with the injected pod, and makes no event."""
    kube = training.kube
    kube.apply(jobs.policy())
    shown = json.loads(kube.run("create", "--dry-run=server", "-o", "json", "-f", "-", given=json.dumps(pod())))
    assert shown["spec"]["initContainers"][0]["name"] == "pillion-sidecar"
    assert kube.all("pods") == []


def test_a_policy_shows_whether_it_can_be_used(training: Training) -> None:
    """The condition Ready is there within seconds, for the generation that it speaks of."""
    kube = training.kube
    kube.apply(jobs.policy())

    def ready() -> bool:
        found = kube.get("checkpointpolicy", "llm")
        assert found is not None
        entry = condition(found, "Ready")
        return bool(entry.get("status") == "True" and entry["observedGeneration"] == found["metadata"]["generation"])

    kube.until(ready, Deadline.API, "Ready")
