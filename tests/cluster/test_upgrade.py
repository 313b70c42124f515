"""
The story: the operator is upgraded and uninstalled while a job trains.

Called from: pytest.
"""

import re

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.release import Release


def test_an_upgrade_is_not_noticed_by_a_running_job(training: Training, release: Release) -> None:
    """After a rolling upgrade with other values the job's sidecar is the same, reports go on, and new pods are injected."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: kube.all("checkpoints"), Deadline.TRAINED, "a checkpoint")
    (before,) = kube.pods("train")
    release.install({"logLevel": "DEBUG"})
    kube.create(*jobs.job("second", env={"STEPS": "20"}))
    kube.until(lambda: kube.pods("second"), Deadline.RECOVERED, "a new pod")
    assert kube.pods("second")[0]["metadata"]["labels"]["pillion.dev/injected"] == "true"
    newest = kube.newest_checkpoint()
    kube.until(lambda: kube.newest_checkpoint() > newest, Deadline.RECOVERED, "reports")
    (after,) = kube.pods("train")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert [each["restartCount"] for each in after["status"]["initContainerStatuses"]] == [0, 0]


def test_an_uninstall_keeps_training_checkpoints_and_policies(training: Training, release: Release) -> None:
    """`helm uninstall` takes the operator away; the job trains on, data and objects stay, and an install finds them."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: len(kube.all("checkpoints")) == 3, Deadline.TRAINED, "checkpoints")
    name = kube.pod_name("train")
    release.uninstall()
    try:
        last = jobs.last(kube, name, "committed")
        kube.until(lambda: jobs.last(kube, name, "committed") >= last + 40, Deadline.TRAINED, "commits go on")
        assert len(kube.all("checkpoints")) == 3
        assert kube.get("checkpointpolicy", "llm") is not None
        kube.run("create", "--dry-run=server", "-f", "-", given=_plain())
    finally:
        release.install()
    newest = kube.newest_checkpoint()
    kube.until(lambda: kube.newest_checkpoint() > newest, Deadline.RECOVERED, "reports")


def test_helm_test_passes(release: Release) -> None:
    """`helm test pillion` says that the installation works: each of its hooks has succeeded."""
    said = release.run("test", "pillion", f"--timeout={Deadline.ROLLED_OUT.s:.0f}s")
    assert set(re.findall(r"^Phase:\s+(\w+)$", said, flags=re.MULTILINE)) == {"Succeeded"}


def _plain() -> str:
    return (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: plain, annotations: {pillion.dev/policy: llm}}\n"
        "spec: {containers: [{name: main, image: localhost/pillion/sidecar:test}]}\n"
    )
