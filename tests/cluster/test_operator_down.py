"""
The story: the operator is gone, jobs never notice, and new pods follow the failure policy.

Called from: pytest.
"""

from collections.abc import Iterator

import pytest

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.release import Release

DEPLOYMENTS = ("pillion-webhook", "pillion-controller")


@pytest.fixture
def operator_back(release: Release) -> Iterator[None]:
    """Whatever the test does, the operator runs again afterwards."""
    yield
    scale(release, 2)


def scale(release: Release, replicas: int) -> None:
    """Set the replicas of both Deployments, and wait until it is so."""
    for name in DEPLOYMENTS:
        release.kube.run("scale", "deployment", name, f"--replicas={replicas}")
    for name in DEPLOYMENTS:
        release.kube.run(
            *("rollout", "status", f"deployment/{name}", f"--timeout={Deadline.ROLLED_OUT.s:.0f}s"),
            deadline=Deadline.ROLLED_OUT,
        )
    if not replicas:
        release.kube.until(lambda: not release.kube.all("pods"), Deadline.POD_GONE, "the operator to be gone")


@pytest.mark.usefixtures("operator_back")
def test_jobs_keep_checkpointing_and_new_pods_wait_while_the_operator_is_down(
    training: Training, release: Release
) -> None:
    """A running job commits on; a new one gets no pod, with the reason in its events, until the operator is back."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job("running", env={"STEPS": "100000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("running"), "committed"), Deadline.TRAINED, "a commit")
    name = kube.pod_name("running")
    scale(release, 0)

    last = jobs.last(kube, name, "committed")
    kube.until(lambda: jobs.last(kube, name, "committed") >= last + 60, Deadline.TRAINED, "commits go on")
    kube.create(*jobs.job("waiting", env={"STEPS": "30"}))
    kube.until(
        lambda: [e for e in kube.events("waiting") if "inject.pillion.dev" in e["message"]], Deadline.HOME, "an event"
    )
    assert kube.pods("waiting") == []
    kube.create(*jobs.job("stranger", annotations={}, container={"command": ["sleep", "600"]}))
    kube.until(lambda: kube.pods("stranger"), Deadline.HOME, "a pod that did not opt in, which nothing keeps")

    scale(release, 2)
    kube.until(lambda: kube.pods("waiting"), Deadline.RECOVERED, "the Job that waited to get its pod")
    newest = max(
        int(path.parent.name.removeprefix("step-")) for path in training.volume.glob("running/step-*/.metadata")
    )

    def caught_up() -> bool:
        listed = [each for each in kube.all("checkpoints") if each["spec"]["jobID"] == "running"]
        # One that has just been made has no status yet.
        steps = [each["status"]["step"] for each in listed if "step" in each.get("status", {})]
        return max(steps, default=0) >= newest

    kube.until(caught_up, Deadline.RECOVERED, "the checkpoints made meanwhile to be listed")


@pytest.mark.usefixtures("operator_back")
def test_a_controller_that_is_killed_is_followed_by_the_other_replica(training: Training, release: Release) -> None:
    """The second replica takes the Lease, and reports go to it."""
    kube, system = training.kube, release.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: kube.all("checkpoints"), Deadline.TRAINED, "a checkpoint")

    def leader() -> str:
        lease = system.get("lease", "pillion-controller")
        assert lease is not None
        return str(lease["spec"].get("holderIdentity") or "")

    first = leader()
    pods = [each["metadata"]["name"] for each in system.all("pods") if each["metadata"]["name"] in first]
    assert len(pods) == 1, (first, pods)
    system.delete("pod", pods[0], "--force", "--grace-period=0")
    kube.until(lambda: leader() not in ("", first), Deadline.ROLLED_OUT, "another leader")
    newest = kube.newest_checkpoint()
    kube.until(
        lambda: kube.newest_checkpoint() > newest,
        Deadline.RECOVERED,
        "checkpoints that the new leader heard of",
    )
