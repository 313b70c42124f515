"""
The story: which training a pod belongs to: sweeps, gangs of plain pods, and launchers whose retries have other names.

Called from: pytest.
"""

import copy
import json
from typing import Any, Final

import pytest

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json

OPT_IN: Final = {"pillion.dev/policy": "llm"}


def plain(name: str, *, labels: Json | None = None, annotations: Json | None = None, **env: str) -> Json:
    """A pod as a launcher makes it: the Job's template without the Job."""
    job = jobs.job(env={"STEPS": "40", **env}, restart_policy="Never")[-1]
    spec: Any = copy.deepcopy(job["spec"]["template"]["spec"])
    del spec["topologySpreadConstraints"]
    metadata = {"name": name, "labels": labels or {}, "annotations": OPT_IN | (annotations or {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def wait_for(training: Training, job: str, step: int) -> None:
    """Until that step of that training is committed."""
    training.kube.until(lambda: jobs.newest(training.volume, job) == step, Deadline.TRAINED, f"step {step} of {job}")


def test_each_index_of_a_sweep_has_its_own_checkpoints(training: Training) -> None:
    """One template, two trainings: neither loads, fences off or removes the other's."""
    kube = training.kube
    (sweep,) = jobs.job("sweep", env={"STEPS": "40"}, annotations=OPT_IN | {"pillion.dev/job-id": "sweep-$(index)"})
    sweep["spec"] |= {"completions": 2, "parallelism": 2}
    training.run(jobs.policy(), sweep)
    for index in range(2):
        wait_for(training, f"sweep-{index}", 40)
    assert not (training.volume / "sweep").exists()
    for pod in kube.pods("sweep"):
        name = pod["metadata"]["name"]
        assert jobs.said(kube, name, "loaded") == jobs.said(kube, name, "failed") == []


@pytest.mark.may_warn("JobUnclear")
def test_a_sweep_without_an_id_is_refused_with_what_to_write(training: Training) -> None:
    """Indices that are tried again by themselves are runs of their own, and none of them starts under a common id."""
    kube = training.kube
    (sweep,) = jobs.job("sweep", restart_policy="Never")
    sweep["spec"] |= {"completions": 2, "parallelism": 2, "backoffLimitPerIndex": 1}
    del sweep["spec"]["backoffLimit"]
    training.run(jobs.policy(), sweep)

    def explained() -> list[str]:
        return [each["message"] for each in kube.events("sweep") if "JobUnclear" in each["message"]]

    texts = kube.until(explained, Deadline.HOME, "an event that says what to write")
    assert any("sweep-$(index)" in text for text in texts)
    assert kube.pods("sweep") == []


def test_a_gang_of_plain_pods_is_one_training(training: Training) -> None:
    """Pods of a group of Kueue, each with its own name and no owner, share one root."""
    gang = {"kueue.x-k8s.io/pod-group-name": "gang"}
    count = {"kueue.x-k8s.io/pod-group-total-count": "2"}
    service, job = jobs.job("gang", pods=2, env={"STEPS": "40", "STEP_S": "0.2"})
    service["spec"]["selector"] = gang
    pods = []
    for index in range(2):
        pod = plain(f"gang-{index}", labels=gang, annotations=count)
        pod["spec"] |= {"hostname": f"gang-{index}", "subdomain": "gang"}
        pod["spec"]["containers"] = job["spec"]["template"]["spec"]["containers"]
        pods.append(pod)
    training.run(jobs.policy(), service, *pods)
    wait_for(training, "gang", 40)
    files = {each.name.split("_")[2] for each in (training.volume / "gang" / "step-40").glob("*.distcp")}
    assert files == {"0", "1"}, "each pod wrote its own"


def test_the_retry_of_a_rayjob_goes_on_where_the_last_one_ended(training: Training) -> None:
    """Another RayCluster with another suffix makes the pods of the retry, and the id is the RayJob's."""
    kube = training.kube
    kube.apply(jobs.policy())
    labels = {"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "llm"}
    for number, suffix in enumerate(("qhdx2", "7zk9m")):
        cluster = f"llm-raycluster-{suffix}"
        pod = plain(f"{cluster}-head", labels=labels | {"ray.io/cluster": cluster}, STEPS=str(40 + 20 * number))
        owner = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": cluster, "controller": True}
        pod["metadata"]["ownerReferences"] = [owner | {"uid": f"00000000-0000-4000-8000-00000000000{number}"}]
        kube.create(pod)
        name = pod["metadata"]["name"]
        last = 40 + 20 * number
        wait_for(training, "llm", last)
        loaded = [each["step"] for each in jobs.said(kube, name, "loaded")]
        assert loaded == ([40] if number else [])
        kube.run("delete", "pod", name, "--force", "--grace-period=0")


def test_a_job_made_again_says_whose_checkpoints_it_goes_on_from(training: Training) -> None:
    """The manifest of each checkpoint has the Job's UID, and so does the sidecar's log where a Job of the same name was another."""
    kube = training.kube
    uids = []
    for steps in ("40", "60"):
        training.run(jobs.policy(), *jobs.job(env={"STEPS": steps}))
        wait_for(training, "train", int(steps))
        found = kube.get("job", "train")
        assert found is not None
        uids.append(found["metadata"]["uid"])
        manifest = json.loads((training.volume / "train" / f"step-{steps}" / "pillion-manifest.json").read_text())
        assert manifest["owner"] == f"Job train ({uids[-1]})"
        if len(uids) == 2:
            assert uids[0] in kube.logs(kube.pod_name("train"), "pillion-sidecar")
        kube.run("delete", "job", "train", "--cascade=foreground", deadline=Deadline.POD_GONE)
