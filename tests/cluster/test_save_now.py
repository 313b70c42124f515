"""
The story: somebody wants a checkpoint now, says so to the cluster, and is told when it is there.

Called from: pytest.
"""

import functools

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, condition

RARELY = {"periodSteps": 100000, "snapshotSteps": 5}
"""No save by itself within a test."""


def _train(training: Training, *, pods: int = 1) -> str:
    kube = training.kube
    training.run(jobs.policy(trigger=RARELY), *jobs.job(pods=pods, env={"STEPS": "100000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "step"), Deadline.TRAINED, "steps")
    return kube.pod_name("train")


def _ready(document: Json | None) -> Json:
    assert condition(document, "Ready").get("status") == "True"
    assert document is not None
    return document


def _listed(kube: Kube, number: int) -> bool:
    return len(kube.all("checkpoints")) == number


def _told(kube: Kube, name: str) -> list[Json]:
    return [event for event in kube.events(name) if "Save" in event["reason"]]


def test_a_checkpoint_object_asks_for_a_save_and_stands_for_it(training: Training) -> None:
    """A Checkpoint that a user makes becomes Ready, with the step, path and size of the save that it asked for."""
    kube = training.kube
    _train(training)
    kube.create(
        {
            "apiVersion": "pillion.dev/v1alpha1",
            "kind": "Checkpoint",
            "metadata": {"name": "before-the-upgrade"},
            "spec": {"jobID": "train"},
        }
    )
    done = kube.until(lambda: _ready(kube.get("checkpoint", "before-the-upgrade")), Deadline.HOME, "the save")
    step = done["status"]["step"]
    assert (training.volume / "train" / f"step-{step}" / ".metadata").exists()
    assert done["status"]["path"].endswith(f"train/step-{step}")
    assert len(list(training.volume.glob("train/step-*"))) == 1, "asked once, saved once"
    assert [each["metadata"]["name"] for each in kube.all("checkpoints")] == ["before-the-upgrade"]


def test_an_annotation_on_the_job_or_a_pod_asks_for_a_save(training: Training) -> None:
    """`kubectl annotate job ... pillion.dev/save-now` saves, once for each value, and an event on the object says so."""
    kube = training.kube
    pod = _train(training)
    for kind, name, number in (("job", "train", 1), ("pod", pod, 2)):
        kube.annotate(kind, name, f"pillion.dev/save-now=try-{number}")
        kube.until(functools.partial(_listed, kube, number), Deadline.HOME, f"checkpoint {number}")
        kube.until(functools.partial(_told, kube, name), Deadline.HOME, f"an event on the {kind}")
    document = kube.get("pod", pod)
    assert document is not None
    mine = {key for key in document["metadata"]["annotations"] if key.startswith("pillion.dev/")}
    assert mine == {"pillion.dev/policy", "pillion.dev/status", "pillion.dev/save-now"}, "nothing is written to a pod"
    assert document["metadata"]["finalizers"] == ["batch.kubernetes.io/job-tracking"], "nor a finalizer"


def test_two_pods_save_now_at_the_same_step(training: Training) -> None:
    """The request reaches the pods of a job through its coordinator, and all ranks save at one step."""
    kube = training.kube
    _train(training, pods=2)
    kube.annotate("job", "train", "pillion.dev/save-now=1")
    kube.until(lambda: len(kube.all("checkpoints")) == 1, Deadline.HOME, "a checkpoint")
    (path,) = training.volume.glob("train/step-*")
    assert {each.name.split("_")[2] for each in path.glob("*.distcp")} == {"0", "1"}
