"""
The story: the sidecar is killed, training never notices, and the next one adopts what is in memory.

Called from: pytest.
"""

import itertools
from typing import Final

import pytest

from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import container_status

LONGEST_PAUSE_S: Final = 20.0
"""Between two words of a trainer that says one every 4 s, on a machine that is busy with starting a container."""


@pytest.mark.may_warn("SaveFailed: .*SidecarUnavailable")
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


@pytest.mark.may_warn("SaveFailed")
def test_training_of_two_pods_goes_on_when_the_coordinator_loses_its_sidecar(
    training: Training, cluster: Cluster
) -> None:
    """The save that the dead sidecar could not take is given up by the other pod too, at once: no rank waits for it."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(pods=2, env={"STEPS": "100000", "STEP_S": "0.2"}))
    kube.until(lambda: jobs.newest(training.volume) > 0, Deadline.TRAINED, "a commit")
    pod = kube.pods("train")[0]
    name = pod["metadata"]["name"]
    cluster.kill(pod["spec"]["nodeName"], container_status(pod, "pillion-sidecar")["containerID"])

    killed_at = jobs.last(kube, name, "step")
    kube.until(lambda: jobs.last(kube, name, "committed") > killed_at + 60, Deadline.RECOVERED, "commits after it")
    for each in kube.pods("train"):
        times = [line["time"] for line in jobs.said(kube, each["metadata"]["name"], "step")]
        pauses_s = [after - before for before, after in itertools.pairwise(times)]
        assert max(pauses_s) < LONGEST_PAUSE_S, pauses_s
        assert container_status(each, jobs.CONTAINER)["restartCount"] == 0
