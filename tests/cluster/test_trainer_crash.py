"""
The story: the trainer dies, its container is started again in the same pod, and training goes on from memory.

Called from: pytest.
"""

from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import container_status


def test_a_crashed_trainer_resumes_from_the_arena(training: Training, cluster: Cluster) -> None:
    """The newest snapshot, never on storage, is loaded bit for bit by the next container; the sidecar did not restart."""
    kube = training.kube
    # Persisted so rarely that memory is all there is.
    policy = jobs.policy(trigger={"periodSteps": 100000, "snapshotSteps": 5, "onTermination": "Skip"})
    training.run(policy, *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: jobs.last(kube, kube.pod_name("train"), "step") >= 40, Deadline.TRAINED, "40 steps")
    (pod,) = kube.pods("train")
    name = pod["metadata"]["name"]
    cluster.kill(pod["spec"]["nodeName"], container_status(pod, jobs.CONTAINER)["containerID"])

    kube.until(lambda: jobs.said(kube, name, "loaded"), Deadline.RECOVERED, "a load")
    (loaded,) = jobs.said(kube, name, "loaded")
    assert (loaded["tier"], loaded["equal"]) == ("arena", True)
    assert loaded["step"] >= jobs.last(kube, name, "snapshot", "--previous") >= 40
    assert list(training.volume.glob("train/step-*/.metadata")) == []
    (pod,) = kube.pods("train")
    assert container_status(pod, jobs.CONTAINER)["restartCount"] == 1
    assert container_status(pod, "pillion-sidecar")["restartCount"] == 0
