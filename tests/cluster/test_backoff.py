"""
The story: a trainer gives up, the Job tries again, and the attempt begins where the storage is good.

Called from: pytest.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, condition
from support.release import Release

DIE_AT: Final = 47
EXIT_AT: Final = 50
Measure = Callable[[str, object], None]


def test_torchrun_gives_up_and_the_jobs_next_attempt_goes_on(training: Training, record_property: Measure) -> None:
    """Both pods fail, both are made again within the backoff limit, and both load the newest commit."""
    kube = training.kube
    env = {"STEPS": "60", "DIE_AT": str(DIE_AT)}
    training.run(jobs.policy(), *jobs.job(pods=2, env=env, restart_policy="Never", max_restarts=0))
    kube.until(lambda: failed(kube), Deadline.TRAINED, "a pod to fail")
    begun = time.monotonic()

    def loads() -> list[Json]:
        names = [pod["metadata"]["name"] for pod in kube.pods("train") if pod["status"]["phase"] != "Failed"]
        found = [line for name in names for line in jobs.said(kube, name, "loaded")]
        assert len(found) == 2, found
        return found

    loaded = kube.until(loads, Deadline.RECOVERED, "both ranks of the next attempt to load")
    record_property("loaded_s", round(time.monotonic() - begun, 1))
    assert all(line["equal"] for line in loaded)
    # What both had in memory at the end was brought to storage by their sidecars.
    assert {(line["tier"], line["step"]) for line in loaded} == {("storage", DIE_AT - DIE_AT % 5)}
    kube.until(lambda: condition(kube.get("job", "train"), "Complete"), Deadline.TRAINED, "the Job to complete")


@pytest.mark.may_warn("CheckpointRefused", "SaveFailed: Saves or loads fail: .*CheckpointRefused")
def test_a_corrupt_newest_checkpoint_is_refused_loudly(
    training: Training, release: Release, record_property: Measure
) -> None:
    """One flipped bit in the newest: the next attempt loads the one before, and log, event, condition and metric say why."""
    kube = training.kube
    env = {"STEPS": "100000", "STEP_S": "0.2", "EXIT_AT": str(EXIT_AT), "EXIT": "3"}
    training.run(jobs.policy(), *jobs.job(env=env, restart_policy="Never"))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "started"), Deadline.POD_STARTED, "the trainer")
    nodes = [node["metadata"]["name"] for node in kube.all("nodes")]
    for node in nodes:
        # The next attempt waits until the checkpoint is what it is to find.
        kube.run("cordon", node)
    try:
        kube.until(lambda: failed(kube), Deadline.TRAINED, "the first attempt to end")
        *_, before, newest = jobs.committed(training.volume)
        flip(training.volume / "train" / f"step-{newest}")
    finally:
        for node in nodes:
            kube.run("uncordon", node)
    begun = time.monotonic()

    def load() -> tuple[str, Json]:
        names = [pod["metadata"]["name"] for pod in kube.pods("train") if pod["status"]["phase"] != "Failed"]
        found = [(name, line) for name in names for line in jobs.said(kube, name, "loaded")]
        assert len(found) == 1, found
        return found[0]

    name, loaded = kube.until(load, Deadline.RECOVERED, "the next attempt to load")
    record_property("loaded_s", round(time.monotonic() - begun, 1))
    assert (loaded["tier"], loaded["step"], loaded["equal"]) == ("storage", before, True)
    assert list(loaded["refused"]) == [f"storage:{newest}"]
    assert f"refused the checkpoint storage:{newest}" in kube.logs(name, "pillion-sidecar")

    def told() -> bool:
        said = [event["message"] for event in kube.events() if event["reason"] == "CheckpointRefused"]
        assert any(f"storage:{newest}" in text for text in said), said
        assert refused(release, kube.namespace) == 1
        return True

    kube.until(told, Deadline.HOME, "the event and the metric")


def refused(release: Release, namespace: str) -> float:
    """What the controllers' metrics say of the namespace's job; the one that leads has it."""
    name = f'pillion_job_checkpoints_refused_total{{job="train",namespace="{namespace}"'
    total = 0.0
    for pod in release.kube.all("pods", "app.kubernetes.io/component=controller"):
        path = f"/api/v1/namespaces/{release.kube.namespace}/pods/{pod['metadata']['name']}:8080/proxy/metrics"
        lines = release.kube.run("get", "--raw", path).splitlines()
        total += sum(float(line.split()[-1]) for line in lines if line.startswith(name))
    return total


def failed(kube: Kube) -> list[Json]:
    """Pods whose attempt has failed."""
    return [pod for pod in kube.all("pods", "job-name=train") if pod["status"].get("phase") == "Failed"]


def flip(checkpoint: Path) -> None:
    """Flip one bit in the middle of a checkpoint's largest file."""
    path = max(checkpoint.glob("*.distcp"), key=lambda each: each.stat().st_size)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
