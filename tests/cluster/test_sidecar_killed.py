"""
The story: the sidecar is killed, training never notices, and the next one adopts what is in memory.

Called from: pytest.
"""

from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import container_status


def test_a_killed_sidecar_is_replaced_and_adopts_the_arena(training: Training, cluster: Cluster) -> None:
    """After SIGKILL of its sidecar the trainer goes on stepping, and later saves commit again."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "committed"), Deadline.TRAINED, "a commit")
    (pod,) = kube.pods("train")
    name = pod["metadata"]["name"]
    status = container_status(pod, "pillion-sidecar")
    killed_at = jobs.last(kube, name, "committed")
    inode = _inode(training, name)
    cluster.kill(pod["spec"]["nodeName"], status["containerID"])

    def again() -> bool:
        return any(line["step"] > killed_at + 40 for line in jobs.said(kube, name, "committed"))

    kube.until(again, Deadline.RECOVERED, "commits after the kill")
    (pod,) = kube.pods("train")
    assert container_status(pod, "pillion-sidecar")["restartCount"] == 1
    assert container_status(pod, jobs.CONTAINER)["restartCount"] == 0
    assert _inode(training, name) == inode, "the arena is the same: adopted, not made anew"


def _inode(training: Training, pod: str) -> str:
    return training.kube.exec(pod, jobs.CONTAINER, "stat", "-c", "%i", "/pillion/arena/segment-0.arena")
