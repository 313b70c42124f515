"""
The story: Kueue preempts a Job for a more urgent one, and admits a gang of plain pods as one.

Called from: pytest.
"""

import contextlib
from collections.abc import Iterator
from typing import Final

import pytest

from cluster.conftest import Training
from cluster.owners import launched
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, condition

API: Final = "kueue.x-k8s.io/v1beta2"
QUEUE: Final = "team"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
GROUP_LABEL: Final = "kueue.x-k8s.io/pod-group-name"
GROUP_TOTAL: Final = "kueue.x-k8s.io/pod-group-total-count"
PRIORITY_LABEL: Final = "kueue.x-k8s.io/priority-class"
HALF: Final = {"requests": {"cpu": "500m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}}
"""Of a trainer: two of them do not fit into the queue."""
DRAIN_S: Final = 10
STEPS: Final = 300


@contextlib.contextmanager
def queue(kube: Kube, cpu: str) -> Iterator[None]:
    """A queue in the namespace with so many cores, in which the urgent preempt the others."""
    name = kube.namespace
    flavor = {
        "name": name,
        "resources": [{"name": "cpu", "nominalQuota": cpu}, {"name": "memory", "nominalQuota": "64Gi"}],
    }
    kube.apply(
        {"apiVersion": API, "kind": "ResourceFlavor", "metadata": {"name": name}},
        {"apiVersion": API, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": 1000},
        {
            "apiVersion": API,
            "kind": "ClusterQueue",
            "metadata": {"name": name},
            "spec": {
                "namespaceSelector": {},
                "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": [flavor]}],
                "preemption": {"withinClusterQueue": "LowerPriority"},
            },
        },
        {"apiVersion": API, "kind": "LocalQueue", "metadata": {"name": QUEUE}, "spec": {"clusterQueue": name}},
    )
    try:
        yield
    finally:
        for kind in ("clusterqueue", "workloadpriorityclass", "resourceflavor"):
            kube.delete(kind, name)


def queued(document: Json, **labels: str) -> Json:
    """The same object, for the queue."""
    document["metadata"]["labels"] = {QUEUE_LABEL: QUEUE} | labels
    return document


@pytest.mark.usefixtures("kueue")
def test_a_preempted_job_resumes_where_it_was(training: Training) -> None:
    """A more urgent Job takes the quota: what the preempted one had in memory is committed before its pod is gone, and is loaded later."""
    kube = training.kube
    with queue(kube, "700m"):
        policy = jobs.policy(trigger={"periodSteps": 100000, "snapshotSteps": 5}, drain={"timeoutSeconds": DRAIN_S})
        *_, job = jobs.job(
            env={"STEPS": str(STEPS)},
            container={"resources": HALF},
            pod={"terminationGracePeriodSeconds": launched.GRACE_S},
        )
        training.run(policy, queued(job))
        kube.until(lambda: jobs.last(kube, kube.pod_name("train"), "step") >= 40, Deadline.TRAINED, "40 steps")
        (first,) = kube.pods("train")
        assert launched.run_ids([first]) == {"train"}
        before = jobs.last(kube, first["metadata"]["name"], "snapshot")
        assert jobs.newest(training.volume) == -1, "nothing but the end of the pod brings it to storage"

        *_, urgent = jobs.job(
            "urgent", annotations={}, container={"resources": HALF, "command": [jobs.PYTHON, "-c", "print('urgent')"]}
        )
        kube.create(queued(urgent, **{PRIORITY_LABEL: kube.namespace}))
        kube.until(
            lambda: any(event["reason"] == "Preempted" for event in kube.events()),
            Deadline.API,
            "Kueue to preempt the Job",
        )
        kube.until(
            # Also not as one that is being deleted: its sidecar writes until its end.
            lambda: first["metadata"]["uid"] not in {pod["metadata"]["uid"] for pod in kube.all("pods")},
            Deadline.POD_GONE,
            "the preempted pod to be gone",
        )
        committed = jobs.newest(training.volume)
        assert committed >= before
        kube.until(
            lambda: condition(kube.get("job", "urgent"), "Complete"), Deadline.TRAINED, "the urgent Job to complete"
        )

        def loaded() -> Json:
            lines = jobs.said(kube, kube.pod_name("train"), "loaded")
            assert lines, "it has not loaded yet"
            return lines[0]

        line = kube.until(loaded, Deadline.RECOVERED, "the preempted Job to load")
        assert (line["tier"], line["step"], line["equal"]) == ("storage", committed, True)
        kube.until(lambda: condition(kube.get("job", "train"), "Complete"), Deadline.TRAINED, "the Job to complete")


def gang(size: int) -> list[Json]:
    """A group of plain pods, and the Service that gives them names."""
    documents: list[Json] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "gang"},
            "spec": {"clusterIP": "None", "selector": {GROUP_LABEL: "gang"}, "publishNotReadyAddresses": True},
        }
    ]
    for index in range(size):
        env = {"RANK": str(index), "WORLD_SIZE": str(size), "MASTER_ADDR": "gang-0.gang", "MASTER_PORT": "29500"}
        found = launched.template(jobs.CONTAINER, {"STEPS": "60", "STEP_S": "0.2"} | env)
        found["metadata"] |= {"name": f"gang-{index}", "labels": {QUEUE_LABEL: QUEUE, GROUP_LABEL: "gang"}}
        found["metadata"]["annotations"][GROUP_TOTAL] = str(size)
        found["spec"] |= {"restartPolicy": "Never", "hostname": f"gang-{index}", "subdomain": "gang"}
        documents.append({"apiVersion": "v1", "kind": "Pod"} | found)
    return documents


@pytest.mark.usefixtures("kueue")
def test_a_gang_of_plain_pods_is_one_training(training: Training) -> None:
    """Pods of one group have one id, the group's name; they are admitted together, commit together, and Kueue sees the group finish."""
    kube = training.kube
    with queue(kube, "2"):
        service, first, second = gang(2)
        training.run(jobs.policy(), service, first)
        pod = kube.get("pod", "gang-0")
        assert pod is not None
        assert pod["spec"]["schedulingGates"], "one alone is not admitted"
        assert launched.are_injected([pod])
        kube.create(second)
        names = ("gang-0", "gang-1")
        kube.until(
            lambda: all(jobs.said(kube, name, "trained") for name in names), Deadline.TRAINED, "both trainers to end"
        )
        found = kube.all("pods", f"{GROUP_LABEL}=gang")
        assert launched.are_injected(found)
        assert launched.run_ids(found) == {"gang"}
        path = training.volume / "gang" / "step-60"
        assert (path / ".metadata").exists()
        assert {each.name.split("_")[2] for each in path.glob("*.distcp")} == {"0", "1"}, "each rank wrote its own"
        kube.until(
            lambda: {condition(each, "Finished").get("status") for each in kube.all("workloads")} == {"True"},
            Deadline.POD_GONE,
            "the group to finish",
        )
