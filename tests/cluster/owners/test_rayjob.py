"""
The story: a RayJob of KubeRay fails, is tried again on another Ray cluster, and goes on where it was.

Called from: pytest. Ray itself is real, too: its image is built from the package, on Debian's torch.
"""

from pathlib import Path
from typing import Final

import pytest

from cluster import conftest as cluster_conftest
from cluster.conftest import Training
from cluster.harness import images
from cluster.harness.built import Built
from cluster.owners import launched
from cluster.owners.controllers import Controller
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube

RAY: Final = "2.60.0"
RECIPE: Final = f"""\
FROM {images.TORCH_BASE}
ARG PIP_CERT
# KubeRay's probes call wget. Ray asks for the name of its user.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends wget && rm -rf /var/lib/apt/lists /var/cache/apt \\
    && useradd --uid 1000 --create-home ray
RUN python3 -m venv --system-site-packages /opt/ray && /opt/ray/bin/pip install --quiet --no-cache-dir "ray[default]=={RAY}"
ENV PATH=/opt/ray/bin:${{PATH}}
USER 1000:1000
"""
DIE_AT: Final = 47
STEPS: Final = 80
JOB_ID: Final = {"pillion.dev/job-id": "train"}
RAY_PODS: Final = "ray.io/is-ray-node=yes"


@pytest.fixture(scope="module")
def ray_image(built: Built, kuberay: Controller, pytestconfig: pytest.Config) -> str:
    """The image with Ray, on every node."""
    del kuberay
    with cluster_conftest.aloud(pytestconfig):
        image = images.of_a_recipe("ray", RECIPE)
        built.load([image])
    return image


def ray_job(image: str, annotations: dict[str, str]) -> list[Json]:
    """A RayJob of a head and a worker with a core each, that is tried again once; and its driver."""
    environment = {"STEPS": str(STEPS), "DIE_AT": str(DIE_AT), "RAY_USAGE_STATS_ENABLED": "0"}

    def template(name: str) -> Json:
        found = launched.template(
            name,
            environment,
            annotations={"pillion.dev/policy": "llm"} | annotations,
            labels={"pillion-test/job": "train"},
            image=image,
            resources={"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}},
        )
        (container,) = found["spec"]["containers"]
        # The operator starts Ray.
        del container["command"]
        container["volumeMounts"].append({"name": "driver", "mountPath": "/driver"})
        found["spec"]["volumes"].append({"name": "driver", "configMap": {"name": "driver"}})
        return found

    start = {"num-cpus": "1", "object-store-memory": "100000000"}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "driver"},
            "data": {"driver.py": Path(__file__).with_name("ray_driver.py").read_text()},
        },
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": "train"},
            "spec": {
                "entrypoint": "python /driver/driver.py",
                "backoffLimit": 1,
                "rayClusterSpec": {
                    "rayVersion": RAY,
                    "headGroupSpec": {"rayStartParams": start, "template": template("ray-head")},
                    "workerGroupSpecs": [
                        {
                            "groupName": "workers",
                            "replicas": 1,
                            "minReplicas": 1,
                            "maxReplicas": 1,
                            "rayStartParams": start,
                            "template": template("ray-worker"),
                        }
                    ],
                },
            },
        },
    ]


def pods_of(kube: Kube, *, but: str = "") -> list[Json]:
    """Head and worker of the Ray cluster that is not called that; to be polled."""
    found = [pod for pod in kube.all("pods", RAY_PODS) if pod["metadata"]["labels"]["ray.io/cluster"] != but]
    assert len(found) == 2, [pod["metadata"]["name"] for pod in found]
    return found


def status(kube: Kube) -> Json:
    """Of the RayJob."""
    found: Json = (kube.get("rayjob", "train") or {}).get("status") or {}
    return found


@pytest.mark.may_warn("JobUnclear")
@pytest.mark.usefixtures("kuberay")
def test_a_rayjob_that_names_no_training_is_told_to(training: Training) -> None:
    """Its pods say which RayCluster they are of, which differs between retries, and not which RayJob: they are refused with the remedy."""
    kube = training.kube
    training.run(jobs.policy(), *ray_job(jobs.IMAGE, {}))

    def refused() -> bool:
        said = [event["message"] for event in kube.events() if event["reason"] == "FailedToCreateHeadPod"]
        assert any("pillion.dev/job-id" in text for text in said), said
        return True

    kube.until(refused, Deadline.API, "the RayCluster's event")
    assert kube.all("pods", RAY_PODS) == []


def test_a_rayjob_that_is_tried_again_goes_on_where_it_was(training: Training, ray_image: str) -> None:
    """The second Ray cluster's pods have the id of the first, and load what the first has committed; the RayJob succeeds."""
    kube = training.kube
    training.run(jobs.policy(), *ray_job(ray_image, JOB_ID))
    first = kube.until(lambda: pods_of(kube), Deadline.POD_STARTED, "the first Ray cluster's pods")
    name = first[0]["metadata"]["labels"]["ray.io/cluster"]
    assert launched.are_injected(first)
    assert launched.run_ids(first) == {"train"}
    kube.until(lambda: status(kube).get("failed") == 1, Deadline.RETRIED, "the first try to fail")
    second = kube.until(lambda: pods_of(kube, but=name), Deadline.RETRIED, "the second Ray cluster's pods")
    assert launched.run_ids(second) == {"train"}

    def succeeded() -> bool:
        assert status(kube).get("jobStatus") == "SUCCEEDED", status(kube)
        return True

    kube.until(succeeded, Deadline.RETRIED, "the RayJob to succeed")
    (head,) = [pod for pod in second if pod["metadata"]["labels"]["ray.io/node-type"] == "head"]
    log = "cat /tmp/ray/session_latest/logs/job-driver-*.log"
    loaded = jobs.events(kube.exec(head["metadata"]["name"], "ray-head", "bash", "-c", log), "loaded")
    assert len(loaded) == 2
    assert all(line["equal"] and line["tier"] == "storage" for line in loaded)
    # What both arenas held when rank 0 died was brought to storage by their sidecars.
    assert {line["step"] for line in loaded} == {DIE_AT - DIE_AT % 5}
    assert jobs.newest(training.volume) == STEPS
    assert [path.name for path in training.volume.iterdir()] == ["train"]
