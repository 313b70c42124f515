"""
The story: the volume is full, training goes on, everybody is told, and saves work again once there is room.

Called from: pytest.
"""

import pytest

from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import condition

VOLUME_MIB = 24
STATE_MIB = 6


@pytest.mark.may_warn("StorageError", "SaveFailed")
def test_a_full_volume_is_reported_and_heals(training: Training, cluster: Cluster) -> None:
    """A save that finds no room fails with its reason, the one before stays, and room brings the next one."""
    kube = training.kube
    node = cluster.nodes[0]
    with cluster.small_volume(node, training.volume, VOLUME_MIB):
        policy = jobs.policy(trigger={"periodSteps": 10}, retention={"keepLast": 2})
        pod = {"nodeName": node, "topologySpreadConstraints": []}
        training.run(policy, *jobs.job(env={"STEPS": "100000", "MIB": str(STATE_MIB)}, pod=pod))
        kube.until(lambda: kube.all("checkpoints"), Deadline.TRAINED, "a checkpoint")
        name = kube.pod_name("train")
        fill = "dd if=/dev/zero of=/pillion/storage/ballast bs=64k 2>/dev/null; ls /pillion/storage"
        kube.exec(name, "pillion-sidecar", "sh", "-c", fill)

        kube.until(lambda: jobs.said(kube, name, "failed"), Deadline.REFUSED, "a failed save")
        assert "No space left" in jobs.said(kube, name, "failed")[-1]["error"]

        def told() -> bool:
            found = kube.get("checkpointpolicy", "llm")
            entry = condition(found, "Degraded")
            assert entry.get("status") == "True"
            return "No space left" in entry["message"]

        kube.until(told, Deadline.HOME, "the policy to be Degraded")
        steps = len(jobs.said(kube, name, "step"))
        kube.until(lambda: len(jobs.said(kube, name, "step")) > steps, Deadline.HOME, "training to go on")

        kube.exec(name, "pillion-sidecar", "rm", "/pillion/storage/ballast")
        before = jobs.last(kube, name, "failed")
        kube.until(
            lambda: any(line["step"] > before for line in jobs.said(kube, name, "committed")),
            Deadline.REFUSED,
            "a save",
        )
        kube.until(
            lambda: condition(kube.get("checkpointpolicy", "llm"), "Degraded").get("status") == "False",
            Deadline.HOME,
            "the policy to be well again",
        )
        kube.delete("job", "train")
        kube.until(lambda: not kube.all("pods"), Deadline.POD_GONE, "the pod to leave the volume")
