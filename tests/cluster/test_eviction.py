"""
The story: a pod is evicted, or its node is drained, and what it had in memory is on storage before it is gone.

Called from: pytest.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from cluster.conftest import Training
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, container_status
from support.release import Release

GRACE_S: Final = 5
DRAIN_S: Final = 10
"""A trainer that ignores SIGTERM, as the first process of a container does, is killed after both: `drain.endTrainer` ends one that hangs
no sooner than such a drain is over."""
LONG_DRAIN_S: Final = 300
"""The default: what a deletion must not take."""
SNAPSHOT: Final = 5
"""Steps between snapshots. No period is reached: only the end of a pod can have brought anything to storage."""
HANG_AT: Final = 47
Measure = Callable[[str, object], None]


@pytest.fixture
def schedulable(cluster: Cluster, release: Release) -> Iterator[None]:
    """Whatever the test does, pods can go to every node afterwards, and the operator runs."""
    yield
    for node in cluster.nodes:
        release.kube.run("uncordon", node)
    release.install()


def start(training: Training, drain_s: int = DRAIN_S, **env: str) -> None:
    """A job of one pod whose replacement waits until the pod before is gone: two attempts never run at once."""
    policy = jobs.policy(trigger={"periodSteps": 100000, "snapshotSteps": SNAPSHOT}, drain={"timeoutSeconds": drain_s})
    *others, job = jobs.job(env={"STEPS": "100000"} | env, pod={"terminationGracePeriodSeconds": GRACE_S})
    job["spec"]["podReplacementPolicy"] = "Failed"
    training.run(policy, *others, job)


@pytest.mark.usefixtures("schedulable")
def test_an_evicted_pods_newest_snapshot_is_loaded_by_the_next(training: Training, record_property: Measure) -> None:
    """
    Through the Eviction API, and by `kubectl drain`: the newest snapshot is committed before the pod is gone, and a trainer that ignores
    SIGTERM does not hold the pod for the drain's time.
    """
    kube = training.kube
    start(training, LONG_DRAIN_S)
    first, before = trained(kube)
    assert jobs.newest(training.volume) == -1

    begun = time.monotonic()
    kube.evict(first["metadata"]["name"])
    kube.until(lambda: jobs.newest(training.volume) >= before, Deadline.DRAINED, "the newest snapshot to be committed")
    record_property("evicted_committed_s", round(time.monotonic() - begun, 1))
    kube.until(lambda: gone(kube, first), Deadline.POD_GONE, "the pod to be gone")
    record_property("evicted_gone_s", round(time.monotonic() - begun, 1))
    committed = jobs.newest(training.volume)
    second = replacement(kube)
    assert loads(kube, second) == committed
    record_property("evicted_loaded_s", round(time.monotonic() - begun, 1))

    second, before = trained(kube)
    begun = time.monotonic()
    # Blocks until the pod is gone; the operator's pods on that node go too, one at a time.
    kube.run(
        *("drain", second["spec"]["nodeName"], "--ignore-daemonsets", "--delete-emptydir-data"),
        f"--timeout={Deadline.POD_GONE.s:.0f}s",
        deadline=Deadline.POD_GONE,
    )
    record_property("drained_s", round(time.monotonic() - begun, 1))
    committed = jobs.newest(training.volume)
    assert committed >= before
    third = replacement(kube)
    assert loads(kube, third) == committed
    record_property("drained_loaded_s", round(time.monotonic() - begun, 1))


def test_the_snapshot_of_a_trainer_that_hangs_is_committed_while_it_ignores_its_sigterm(
    training: Training, record_property: Measure
) -> None:
    """The flush starts with preStop, and has ended when the kubelet loses its patience with the trainer."""
    kube = training.kube
    start(training, HANG_AT=str(HANG_AT))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "hangs"), Deadline.TRAINED, "the trainer to hang")
    (pod,) = kube.pods("train")
    assert jobs.newest(training.volume) == -1

    begun = time.monotonic()
    kube.evict(pod["metadata"]["name"])
    kube.until(lambda: jobs.newest(training.volume) >= 0, Deadline.DRAINED, "the newest snapshot to be committed")
    record_property("hung_committed_s", round(time.monotonic() - begun, 1))
    evicted = kube.get("pod", pod["metadata"]["name"])
    assert evicted is not None
    assert "running" in container_status(evicted, jobs.CONTAINER)["state"], "the trainer was killed before"
    assert jobs.newest(training.volume) == HANG_AT - HANG_AT % SNAPSHOT
    kube.until(lambda: gone(kube, pod), Deadline.POD_GONE, "the pod to be gone")
    record_property("hung_gone_s", round(time.monotonic() - begun, 1))
    following = replacement(kube)
    assert loads(kube, following) == HANG_AT - HANG_AT % SNAPSHOT


def trained(kube: Kube) -> tuple[Json, int]:
    """The pod, once it has made some dozens of steps, and its newest snapshot."""

    def snapshots() -> bool:
        name = kube.pod_name("train")
        return jobs.last(kube, name, "snapshot") > max(jobs.last(kube, name, "loaded"), 0) + 20

    kube.until(snapshots, Deadline.TRAINED, "some snapshots")
    (pod,) = kube.pods("train")
    return pod, jobs.last(kube, pod["metadata"]["name"], "snapshot")


def replacement(kube: Kube) -> Json:
    """The pod that follows one that is gone."""
    (pod,) = kube.until(lambda: kube.pods("train"), Deadline.POD_STARTED, "a replacement")
    return pod


def gone(kube: Kube, pod: Json) -> bool:
    """Whether its object is removed, or all of its containers have ended."""
    found = kube.get("pod", pod["metadata"]["name"])
    return found is None or found["status"]["phase"] in ("Succeeded", "Failed")


def loads(kube: Kube, pod: Json) -> int:
    """The step that a pod's trainer has loaded, bit for bit, from storage."""
    name = pod["metadata"]["name"]
    (line,) = kube.until(lambda: jobs.said(kube, name, "loaded"), Deadline.RECOVERED, "a load")
    assert (line["tier"], line["equal"]) == ("storage", True)
    return int(line["step"])
