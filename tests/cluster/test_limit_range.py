"""
The story: a namespace with a LimitRange, whose defaults and bounds are meant for applications.

Called from: pytest.
"""

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json

AMOUNTS: Json = {"cpu": "100m", "memory": "192Mi", "ephemeral-storage": "512Mi"}


def limit_range(**limits: Json) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": {"name": "bounds"},
        "spec": {"limits": [{"type": "Container"} | limits]},
    }


def test_a_declared_sidecar_keeps_the_policys_amounts_under_defaults(training: Training) -> None:
    """The API server fills in the declared container before injection sees it, and those are not the author's words."""
    kube = training.kube
    kube.apply(limit_range(default=AMOUNTS | {"cpu": "1"}, defaultRequest=AMOUNTS))
    declared = {"name": "pillion-sidecar", "image": jobs.IMAGE, "env": [{"name": "OF_THE_POD", "value": "1"}]}
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "40"}, pod={"initContainers": [declared]}))
    kube.until(lambda: jobs.newest(training.volume) == 40, Deadline.TRAINED, "the last commit")
    (found,) = kube.pods("train")
    sidecar, client = found["spec"]["initContainers"]
    assert {"name": "OF_THE_POD", "value": "1"} in sidecar["env"]
    assert sidecar["resources"]["requests"]["cpu"] == client["resources"]["requests"]["cpu"] == "50m"
    # The policy's 1Gi, and the arena's 128Mi.
    assert sidecar["resources"]["limits"]["memory"] == "1152Mi"
    assert client["resources"]["limits"]["memory"] == "1Gi"
    assert sidecar["resources"]["limits"]["ephemeral-storage"] == "384Mi"


def test_both_our_containers_meet_the_bounds_that_a_policy_meets(training: Training) -> None:
    """The container of the client takes the sidecar's amounts, and no CPU limit is above the largest of the pod."""
    kube = training.kube
    kube.apply(limit_range(min={"memory": "200Mi"}, max={"cpu": "1"}))
    resources = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "40"}, container={"resources": resources}))
    kube.until(lambda: jobs.newest(training.volume) == 40, Deadline.TRAINED, "the last commit")
