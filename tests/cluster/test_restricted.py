"""
The story: namespaces with rules of their own: the restricted Pod Security profile, a quota, the node's network.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline


def test_an_injected_pod_meets_the_restricted_profile(training: Training) -> None:
    """In a namespace that enforces `restricted`, an injected pod is admitted and commits."""
    kube = training.kube
    kube.run("label", "namespace", kube.namespace, "pod-security.kubernetes.io/enforce=restricted")
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: list(training.volume.glob("train/step-*/.metadata")), Deadline.TRAINED, "a commit")


def test_an_injected_pod_fits_a_namespace_with_a_quota(training: Training) -> None:
    """Requests and limits are always set, so that a quota on all four counts the sidecar and admits the pod."""
    kube = training.kube
    kube.apply(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "all"},
            "spec": {
                "hard": {"requests.cpu": "2", "requests.memory": "4Gi", "limits.cpu": "6", "limits.memory": "8Gi"}
            },
        }
    )
    resources = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}, container={"resources": resources}))
    kube.until(lambda: list(training.volume.glob("train/step-*/.metadata")), Deadline.TRAINED, "a commit")
    quota = kube.get("resourcequota", "all")
    assert quota is not None
    assert quota["status"]["used"]["limits.memory"] not in ("0", "2Gi"), "the sidecar is counted"


def test_a_host_network_pod_commits_and_calls_home(training: Training) -> None:
    """In the node's network the sidecar opens no port, and still reaches the controller."""
    kube = training.kube
    pod = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}, pod=pod))
    kube.until(lambda: kube.all("checkpoints"), Deadline.TRAINED, "a checkpoint that the controller heard of")
    (found,) = kube.pods("train")
    containers = [*found["spec"]["initContainers"], *found["spec"]["containers"]]
    assert [each["ports"] for each in containers if each.get("ports")] == []
