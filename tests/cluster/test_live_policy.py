"""
The story: a policy is changed while jobs run under it, and they follow within seconds.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline


def test_a_running_job_follows_a_new_trigger_and_retention(training: Training) -> None:
    """A shorter period and a smaller retention hold for a running job, without a restart."""
    kube = training.kube
    training.run(jobs.policy(trigger={"periodSteps": 100000}), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "step"), Deadline.TRAINED, "steps")
    (pod,) = kube.pods("train")
    assert not list(training.volume.glob("train/step-*"))
    kube.patch("checkpointpolicy", "llm", {"spec": {"trigger": {"periodSteps": 10}, "retention": {"keepLast": 2}}})
    name = pod["metadata"]["name"]
    kube.until(lambda: len(jobs.said(kube, name, "committed")) >= 4, Deadline.HOME, "saves by the new period")
    assert all(line["step"] % 10 == 0 for line in jobs.said(kube, name, "committed"))

    def kept() -> bool:
        return len(list(training.volume.glob("train/step-*/.metadata"))) in (2, 3) and len(kube.all("checkpoints")) == 2

    kube.until(kept, Deadline.HOME, "the new retention")
    assert kube.pods("train")[0]["metadata"]["uid"] == pod["metadata"]["uid"]


def test_suspend_stops_the_saves_of_a_running_job_and_resume_starts_them(training: Training) -> None:
    """`suspend: true` stops saves but not training; `suspend: false` brings them back."""
    kube = training.kube
    training.run(jobs.policy(trigger={"periodSteps": 10}), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "committed"), Deadline.TRAINED, "a commit")
    name = kube.pod_name("train")
    kube.patch("checkpointpolicy", "llm", {"spec": {"suspend": True}})

    def quiet() -> bool:
        return jobs.last(kube, name, "step") > jobs.last(kube, name, "committed") + 60

    kube.until(quiet, Deadline.TRAINED, "steps without saves")
    last = jobs.last(kube, name, "committed")
    kube.patch("checkpointpolicy", "llm", {"spec": {"suspend": False}})
    kube.until(lambda: jobs.last(kube, name, "committed") > last, Deadline.HOME, "saves again")


def test_a_deleted_policy_leaves_training_running_and_data_kept(training: Training) -> None:
    """Without its policy a job trains and saves as before, and nothing on storage or in the cluster is removed."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: kube.all("checkpoints"), Deadline.TRAINED, "a checkpoint")
    name = kube.pod_name("train")
    kube.delete("checkpointpolicy", "llm")
    kube.until(lambda: kube.get("checkpointpolicy", "llm") is None, Deadline.API, "the policy to be gone")
    last = jobs.last(kube, name, "committed")
    kube.until(lambda: jobs.last(kube, name, "committed") >= last + 40, Deadline.TRAINED, "saves go on")
    kube.until(lambda: len(kube.all("checkpoints")) >= 3, Deadline.HOME, "three checkpoints listed, as before")
    assert len(list(training.volume.glob("train/step-*/.metadata"))) >= 3
