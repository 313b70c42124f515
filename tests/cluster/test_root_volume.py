"""
The story: volumes that only root may write, as fresh ones are, and the images that people have.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline


def test_a_trainer_that_is_root_commits_to_a_fresh_volume(training: Training) -> None:
    """A sidecar of a root trainer is root, too, and needs nothing else of the policy or the pod."""
    kube = training.kube
    training.volume.chmod(0o755)
    root = {"securityContext": {"runAsUser": 0, "seccompProfile": {"type": "RuntimeDefault"}}}
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "40"}, pod=root))
    kube.until(lambda: jobs.newest(training.volume) == 40, Deadline.TRAINED, "the last commit")


def test_a_policy_brings_any_trainer_to_a_sub_path_of_roots(training: Training) -> None:
    """The kubelet makes a sub path for root; `sidecar.runAsUser: 0` in the policy is enough, the trainer stays who it is."""
    kube = training.kube
    training.volume.chmod(0o755)
    storage = {"persistentVolumeClaim": {"claimName": jobs.CLAIM, "subPath": "team/runs"}}
    sidecar = jobs.policy()["spec"]["sidecar"] | {"runAsUser": 0}
    training.run(jobs.policy(storage=storage, sidecar=sidecar), *jobs.job(env={"STEPS": "40"}))
    runs = training.volume / "team" / "runs"
    kube.until(lambda: jobs.newest(runs) == 40, Deadline.TRAINED, "the last commit")


def test_a_pod_that_may_not_write_is_warned_at_its_creation(training: Training) -> None:
    """Nothing is known of an image's user, so kubectl shows what may be needed."""
    kube = training.kube
    kube.apply(jobs.policy())
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "plain", "annotations": {"pillion.dev/policy": "llm"}},
        "spec": {"containers": [{"name": "main", "image": jobs.IMAGE, "command": ["sleep", "1"]}]},
    }
    assert "sets no runAsUser" in kube.warned(pod)
