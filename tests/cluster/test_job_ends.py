"""
The story: a job ends, with the trainer's own exit status, and no sidecar keeps it.

Called from: pytest.
"""

import datetime

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, condition, container_status

ENDS_WITHIN_S = 15.0
"""From the trainer's last word to the pod's end: the kubelet's own rounds, and a sidecar that has nothing to do."""


def test_a_job_completes_when_its_trainer_does(training: Training) -> None:
    """Exit status 0 makes the Job complete, soon after the trainer has said its last word."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "30"}))
    job = kube.until(lambda: _done(kube.get("job", "train"), "Complete"), Deadline.TRAINED, "the Job to complete")
    (pod,) = kube.pods("train")
    ended = container_status(pod, jobs.CONTAINER)["state"]["terminated"]
    sidecar = container_status(pod, "pillion-sidecar")["state"]["terminated"]
    assert ended["exitCode"] == 0
    assert sidecar["exitCode"] == 0
    assert _seconds(sidecar["finishedAt"]) - _seconds(ended["finishedAt"]) < ENDS_WITHIN_S
    assert job["status"]["succeeded"] == 1


def test_a_job_fails_with_the_trainers_exit_status(training: Training) -> None:
    """A trainer that ends with 3 makes a failed Job whose container says 3."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "5", "EXIT": "3"}, restart_policy="Never", backoff_limit=0))
    kube.until(lambda: _done(kube.get("job", "train"), "Failed"), Deadline.TRAINED, "the Job to fail")
    (pod,) = kube.pods("train")
    assert container_status(pod, jobs.CONTAINER)["state"]["terminated"]["exitCode"] == 3


def _done(job: Json | None, kind: str) -> Json:
    assert job is not None
    assert condition(job, kind).get("status") == "True"
    return job


def _seconds(time: str) -> float:
    return datetime.datetime.fromisoformat(time).timestamp()
