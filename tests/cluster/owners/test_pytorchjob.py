"""
The story: a PyTorchJob of Kubeflow's training operator crashes, loses a pod, and completes.

Called from: pytest.
"""

from typing import Final

import pytest

from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from cluster.owners import launched
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, condition, container_status

CONTAINER: Final = "pytorch"
"""The operator looks for a container of this name."""
MASTER: Final = "train-master-0"
WORKER: Final = "train-worker-0"
STEPS: Final = 700


def pytorch_job() -> Json:
    """A PyTorchJob of a master and a worker."""
    template = launched.template(CONTAINER, {"STEPS": str(STEPS)}, labels={"pillion-test/job": "train"})
    replica = {"replicas": 1, "restartPolicy": "OnFailure", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "train"},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {"Master": replica, "Worker": replica},
        },
    }


def each(kube: Kube, event: str) -> int:
    """The newest step that both trainers have said that of."""
    return min(jobs.last(kube, name, event, container=CONTAINER) for name in (MASTER, WORKER))


def pods(kube: Kube) -> list[Json]:
    """Both pods; to be polled."""
    found = kube.all("pods", "training.kubeflow.org/job-name=train")
    assert len(found) == 2, [pod["metadata"]["name"] for pod in found]
    return found


@pytest.mark.usefixtures("training_operator")
def test_a_pytorchjob_resumes_from_memory_then_from_storage_and_completes(training: Training, cluster: Cluster) -> None:
    """A killed master: both load from the arenas. A deleted worker: both load from storage. The PyTorchJob succeeds, at its last step."""
    kube = training.kube
    training.run(jobs.policy(), pytorch_job())
    kube.until(lambda: each(kube, "step") >= 40, Deadline.TRAINED, "40 steps")
    found = pods(kube)
    assert launched.are_injected(found)
    assert launched.run_ids(found) == {"train"}
    assert len({pod["spec"]["nodeName"] for pod in found}) == 2

    before = each(kube, "snapshot")
    (master,) = [pod for pod in found if pod["metadata"]["name"] == MASTER]
    cluster.kill(master["spec"]["nodeName"], container_status(master, CONTAINER)["containerID"])
    loaded = kube.until(
        lambda: launched.loads(kube, (MASTER, WORKER), "arena", container=CONTAINER),
        Deadline.RECOVERED,
        "both to load from memory",
    )
    assert len({line["step"] for line in loaded}) == 1
    assert all(line["equal"] and line["step"] >= before for line in loaded)
    resumed = loaded[0]["step"]
    assert {pod["metadata"]["uid"] for pod in pods(kube)} == {pod["metadata"]["uid"] for pod in found}

    kube.until(lambda: each(kube, "committed") > resumed, Deadline.TRAINED, "a commit after it")
    before = jobs.newest(training.volume)
    kube.delete("pod", WORKER)
    loaded = kube.until(
        lambda: launched.loads(kube, (MASTER, WORKER), "storage", container=CONTAINER),
        Deadline.RECOVERED,
        "both to load from storage",
    )
    assert len({line["step"] for line in loaded}) == 1
    assert all(line["equal"] and line["step"] >= before for line in loaded)
    assert launched.run_ids(pods(kube)) == {"train"}, "the operator's new pod has the same id"

    kube.until(
        lambda: condition(kube.get("pytorchjob", "train"), "Succeeded").get("status") == "True",
        Deadline.TRAINED,
        "the PyTorchJob to succeed",
    )
    assert jobs.newest(training.volume) == STEPS
    for pod in pods(kube):
        assert container_status(pod, CONTAINER)["state"]["terminated"]["exitCode"] == 0
    kube.until(lambda: kube.newest_checkpoint() == STEPS, Deadline.HOME, "the Checkpoint of the last step")
