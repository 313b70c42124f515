"""
The story: a platform team applies a policy, a user annotates a job, and its checkpoints are there.

Called from: pytest.
"""

import torch
import torch.distributed.checkpoint as dcp

from cluster import trainer
from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import condition, container_status

MIB = 4


def test_an_annotated_job_commits_checkpoints_that_stock_dcp_loads(training: Training) -> None:
    """One annotation on the pod template is all: the pod gets a sidecar, commits, and stock torch reads what it wrote."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "60", "MIB": str(MIB)}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "trained"), Deadline.TRAINED, "the end")
    (pod,) = kube.pods("train")

    sidecar = next(each for each in pod["spec"]["initContainers"] if each["name"] == "pillion-sidecar")
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["resources"]["limits"]["memory"]
    assert sidecar["resources"]["requests"]["cpu"]
    assert [each for each in pod["spec"]["containers"][0]["volumeMounts"] if each["name"] == "pillion-storage"] == []
    holders = {
        container["name"]
        for container in [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]
        for mount in container["volumeMounts"]
        if mount["name"].startswith("kube-api-access")
    }
    assert holders == {"trainer"}, "the API token of the pod is the user's affair, not ours"

    (path,) = training.volume.glob("train/step-60")
    state = {"weights0": torch.zeros(MIB * 2**20 // 4)}
    dcp.load(state, checkpoint_id=path)
    assert torch.equal(state["weights0"], trainer.values(60, 0, MIB * 2**20 // 4))


def test_kubectl_tells_the_story(training: Training) -> None:
    """`kubectl get checkpoints` lists what is committed, and the policy's status says that all is well."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))

    def listed() -> list[str]:
        lines = kube.run("get", "checkpoints").splitlines()
        assert lines
        assert lines[0].split()[:5] == ["NAME", "JOB", "STEP", "SIZE", "READY"]
        # A checkpoint is created and then told its state: in between its line ends before READY.
        rows = [line.split() for line in lines[1:]]
        found = [" ".join(row) for row in rows if row[1] == "train" and row[4:5] == ["True"]]
        assert len(found) == 3
        return found

    kube.until(listed, Deadline.TRAINED, "three checkpoints, as the retention says")

    def healthy() -> bool:
        policy = kube.get("checkpointpolicy", "llm")
        assert policy is not None
        status = policy.get("status", {})
        assert status.get("observedGeneration") == policy["metadata"]["generation"]
        assert status.get("injectedPods") == 1
        assert status.get("lastCheckpoint", {}).get("jobID") == "train"
        assert condition(policy, "Ready").get("status") == "True"
        assert condition(policy, "StorageReachable").get("status") == "True"
        return bool(condition(policy, "Degraded").get("status") == "False")

    kube.until(healthy, Deadline.HOME, "a healthy policy")
    (pod,) = kube.pods("train")
    assert container_status(pod, "pillion-sidecar")["restartCount"] == 0
    # Retention removes the objects with the checkpoints.
    on_storage = {int(path.name.removeprefix("step-")) for path in training.volume.glob("train/step-*")}
    assert len(on_storage) <= 4
