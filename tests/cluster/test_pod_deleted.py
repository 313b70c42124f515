"""
The story: a pod is deleted, its sidecar brings the newest state to storage within the grace period, and the replacement resumes.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline


def test_the_replacement_of_a_deleted_pod_resumes_from_storage(training: Training) -> None:
    """What the old pod had in memory at its end is what the new one loads: nothing that was saved is lost."""
    kube = training.kube
    # Persisted so rarely that only the end of the pod can have brought the state to storage.
    policy = jobs.policy(trigger={"periodSteps": 100000, "snapshotSteps": 5})
    training.run(policy, *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: jobs.said(kube, kube.pod_name("train"), "step"), Deadline.TRAINED, "steps")
    (old,) = kube.pods("train")
    name = old["metadata"]["name"]
    before = jobs.last(kube, name, "step")
    assert not list(training.volume.glob("train/step-*/.metadata"))
    kube.delete("pod", name)

    def replaced() -> str:
        pods = [pod for pod in kube.pods("train") if pod["metadata"]["uid"] != old["metadata"]["uid"]]
        assert pods
        return str(pods[0]["metadata"]["name"])

    new = kube.until(replaced, Deadline.POD_GONE, "a replacement")
    kube.until(lambda: jobs.said(kube, new, "loaded"), Deadline.RECOVERED, "a load")
    (loaded,) = jobs.said(kube, new, "loaded")
    assert (loaded["tier"], loaded["equal"]) == ("storage", True)
    assert loaded["step"] >= before
