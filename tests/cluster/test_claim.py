"""
The story: a claim for one node under a training of several pods is said before its pods wait in vain.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json

OPTED_IN: Json = {"pillion.dev/policy": "llm"}
ALONE: Json = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "alone", "annotations": OPTED_IN},
    "spec": {
        "securityContext": {"runAsUser": 1000},
        "containers": [{"name": "main", "image": jobs.IMAGE, "command": ["sleep", "1"]}],
    },
}


def member(number: int) -> Json:
    """One pod of a training of two."""
    metadata: Json = {
        "name": f"gang-{number}",
        "labels": {"kueue.x-k8s.io/pod-group-name": "gang"},
        "annotations": OPTED_IN | {"kueue.x-k8s.io/pod-group-total-count": "2"},
    }
    return ALONE | {"metadata": metadata}


def claim(name: str, *modes: str) -> Json:
    spec = {"accessModes": list(modes), "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "none"}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def test_a_claim_for_one_node_is_said_to_a_training_of_several_pods(training: Training) -> None:
    """The controller reads the claim of a policy, its status has the access modes, and the webhook warns; one pod alone is not warned."""
    kube = training.kube
    kube.apply(claim("one-node", "ReadWriteOnce"))
    kube.apply(jobs.policy(storage={"persistentVolumeClaim": {"claimName": "one-node"}}))

    def seen() -> Json:
        return ((kube.get("checkpointpolicy", "llm") or {}).get("status") or {}).get("claim") or {}

    kube.until(lambda: seen() == {"name": "one-node", "accessModes": ["ReadWriteOnce"]}, Deadline.API, "the claim")
    kube.until(lambda: "the claim one-node is ReadWriteOnce" in kube.warned(member(0)), Deadline.API, "the warning")
    assert kube.warned(ALONE) == ""
    kube.create(member(0))
    kube.until(
        lambda: [
            each
            for each in kube.events("gang-0")
            if each["reason"] == "Injected" and "Warning: the claim one-node is ReadWriteOnce" in each["message"]
        ],
        Deadline.HOME,
        "the event that has the warning, for those who see no answer of the API server",
    )
    kube.apply(jobs.policy())
    kube.until(lambda: seen().get("accessModes") == ["ReadWriteMany"], Deadline.API, "the other claim")
    kube.until(lambda: kube.warned(member(1)) == "", Deadline.API, "no warning of a claim for many nodes")
