"""
The story: a job of two pods on two nodes trains with torchrun, and its pods commit one checkpoint together.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline


def test_two_pods_on_two_nodes_commit_together(training: Training) -> None:
    """Both sidecars write their share to the shared volume, one commit marker stands for both, and the job completes."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(pods=2, env={"STEPS": "60", "STEP_S": "0.2"}))
    kube.until(lambda: len(kube.pods("train")) == 2, Deadline.POD_STARTED, "two pods")
    kube.until(
        lambda: all(jobs.said(kube, pod["metadata"]["name"], "trained") for pod in kube.pods("train")),
        Deadline.TRAINED,
        "both trainers to end",
    )
    first, second = kube.pods("train")
    assert first["spec"]["nodeName"] != second["spec"]["nodeName"]
    committed = {
        tuple(each["step"] for each in jobs.said(kube, pod["metadata"]["name"], "committed")) for pod in (first, second)
    }
    assert len(committed) == 1, "both pods saw the same commits"
    path = training.volume / "train" / "step-60"
    assert (path / ".metadata").exists()
    assert {each.name.split("_")[2] for each in path.glob("*.distcp")} == {"0", "1"}, "each rank wrote its own"

    def complete() -> bool:
        job = kube.get("job", "train")
        return job is not None and job["status"].get("succeeded") == 2

    kube.until(complete, Deadline.POD_GONE, "the Job to complete")


def test_a_crashed_trainer_of_two_resumes_from_both_arenas(training: Training) -> None:
    """torchrun restarts both workers when one is killed, and both load the newest snapshot from memory."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job(pods=2, env={"STEPS": "90", "STEP_S": "0.2", "DIE_AT": "47"}))

    def loads() -> list[dict[str, object]]:
        found = [line for pod in kube.pods("train") for line in jobs.said(kube, pod["metadata"]["name"], "loaded")]
        assert len(found) == 2
        return found

    loaded = kube.until(loads, Deadline.RECOVERED, "both trainers to load")
    assert {line["tier"] for line in loaded} == {"arena"}
    assert {line["step"] for line in loaded} == {45}
    assert all(line["equal"] for line in loaded)
