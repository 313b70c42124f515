"""
The story: the trainer dies, its container is started again in the same pod, and training goes on from memory.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import container_status


def test_a_crashed_trainer_resumes_from_the_arena(training: Training) -> None:
    """The newest snapshot, 2 steps old and never on storage, is loaded bit for bit; the sidecar did not restart."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000", "DIE_AT": "37"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "loaded"), Deadline.RECOVERED, "a load")
    (pod,) = kube.pods("train")
    (loaded,) = jobs.said(kube, pod["metadata"]["name"], "loaded")
    assert (loaded["step"], loaded["tier"], loaded["equal"]) == (35, "arena", True)
    assert container_status(pod, jobs.CONTAINER)["restartCount"] == 1
    assert container_status(pod, "pillion-sidecar")["restartCount"] == 0
