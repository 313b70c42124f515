"""
The story: a node is gone without a word, its pod is replaced on the other node, and training goes on from the newest commit.

Called from: pytest.
"""

import os
import time
from collections.abc import Callable

import pytest

from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import Json
from support.lost_nodes import OUT_OF_SERVICE, POD, ready

RANKS = (0, 1) if os.environ.get("PILLION_CAMPAIGN_ROUNDS") else (0,)
"""Whose node it is. The coordinator's is the harder one, and enough for a run that is not a campaign: each takes a minute and a half."""
PERIOD = 20
"""Steps between commits."""


@pytest.mark.usefixtures("in_service")
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.may_warn("SaveFailed", "StorageError", "LoadFailed: .*BarrierTimeout")
def test_training_goes_on_without_a_node(
    training: Training, cluster: Cluster, rank: int, record_property: Callable[[str, object], None]
) -> None:
    """A rank's memory is gone with its node: both load the newest commit, on the node that is left, and go on to commit."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(pods=2, env={"STEPS": "100000", "STEP_S": "0.2"}, pod=POD))
    kube.until(lambda: kube.newest_checkpoint() >= 2 * PERIOD, Deadline.TRAINED, "two commits")
    lost, kept = kube.pods("train") if rank == 0 else reversed(kube.pods("train"))
    node, other = lost["spec"]["nodeName"], kept["spec"]["nodeName"]
    assert node != other

    begun = time.monotonic()
    with cluster.lost(node):
        committed = jobs.newest(training.volume)
        kube.until(lambda: not ready(kube, node), Deadline.NODE_LOST, "the node to be found lost")
        record_property("noticed_s", round(time.monotonic() - begun, 1))
        kube.run("taint", "node", node, f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute", "--overwrite")
        if rank == 0:
            # torchrun's own store was there, and its client waits without a bound for a host that says nothing (torch 2.6:
            # TCPStore::doWait, after its timeout): a job's operator restarts the other pods of such a job.
            kube.delete("pod", kept["metadata"]["name"])
        old = {lost["metadata"]["uid"]} | ({kept["metadata"]["uid"]} if rank == 0 else set())

        def loads() -> list[Json]:
            found = kube.pods("train")
            assert [pod["spec"].get("nodeName") for pod in found] == [other, other]
            assert not old & {pod["metadata"]["uid"] for pod in found}
            last = [jobs.said(kube, pod["metadata"]["name"], "loaded")[-1:] for pod in found]
            assert all(last), last
            return [line for lines in last for line in lines]

        loaded = kube.until(loads, Deadline.RECOVERED, "both ranks to load")
        record_property("loaded_s", round(time.monotonic() - begun, 1))
        assert all(line["equal"] for line in loaded)
        (step,) = {line["step"] for line in loaded}
        # A commit may have been on its way when the power went.
        assert committed <= step <= committed + PERIOD
        kube.until(lambda: jobs.newest(training.volume) > step, Deadline.TRAINED, "commits of the two pods on one node")
        record_property("committed_s", round(time.monotonic() - begun, 1))
    record_property("back_s", round(time.monotonic() - begun, 1))
    assert ready(kube, node)
