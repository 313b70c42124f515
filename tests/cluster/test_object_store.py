"""
The story: a job on two nodes keeps its checkpoints in a bucket, and its pods have no volume for them.

The bucket is versitygw's, which runs in a pod of the story's namespace behind a Service. Its program and its data lie in a folder that the harness shows to the
nodes; no pod of a job mounts that folder.

Called from: pytest.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from cluster.conftest import aloud
from cluster.harness import binaries
from cluster.harness.clusters import Cluster
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, condition, container_status
from support.lost_nodes import OUT_OF_SERVICE, POD, ready

NAME: Final = "store"
PORT: Final = 9000
BUCKET: Final = "checkpoints"
URL: Final = f"s3://{BUCKET}/runs"
ACCESS_KEY: Final = "pilliontests"
KEY: Final = "not-a-secret-the-store-lives-for-one-test"
OTHER_KEY: Final = "not-a-secret-either-and-another-one"
SECRET: Final = "s3-writer"
REMEDY: Final = "no credentials, or the store refuses them: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
PERIOD: Final = 20
"""Steps between commits."""
DIES_AT: Final = 47


@dataclass(frozen=True, slots=True)
class Store:
    """An object store in a namespace, with one bucket."""

    kube: Kube
    folder: Path
    """Of this machine: the store's program, and its data."""

    @property
    def bucket(self) -> Path:
        """The bucket: a folder, in which an object is a file."""
        return self.folder / "data" / BUCKET

    def policy(self) -> Json:
        """A policy that keeps checkpoints in the bucket, with a disk of each pod's node in front of it."""
        bucket = {"url": URL, "endpoint": f"http://{NAME}.{self.kube.namespace}.svc:{PORT}"}
        return jobs.policy(
            storage={
                "objectStore": bucket | {"credentials": {"secret": SECRET}},
                "local": {"emptyDir": {"sizeLimit": "1Gi"}},
            }
        )

    def take(self, key: str) -> None:
        """Run the store, or run it anew, so that it takes this key and no other. Blocks: up to Deadline.POD_STARTED."""
        self.kube.apply(*_objects(self.folder, key))

        def is_ready() -> bool:
            found = self.kube.get("deployment", NAME) or {}
            state = found.get("status", {})
            is_new = state.get("observedGeneration") == found["metadata"]["generation"]
            return bool(is_new and state.get("updatedReplicas") == state.get("availableReplicas") == 1)

        self.kube.until(is_ready, Deadline.POD_STARTED, "the store to serve")


@pytest.fixture
def store(cluster: Cluster, kube: Kube, pytestconfig: pytest.Config) -> Iterator[Store]:
    """A store with an empty bucket, and the trainer's script, in a fresh namespace without a claim."""
    with aloud(pytestconfig):
        program = binaries.program("versitygw")
    found = Store(kube, cluster.volume(kube.namespace))
    shutil.copy(program, found.folder)
    for each in (found.bucket.parent, found.bucket):
        each.mkdir()
        each.chmod(0o777)
    kube.apply(jobs.script())
    found.take(KEY)
    yield found
    kube.delete("deployment", NAME)
    kube.until(lambda: not kube.all("pods", f"app={NAME}"), Deadline.POD_GONE, "the store to leave its folder")
    shutil.rmtree(found.folder)


def _objects(folder: Path, key: str) -> tuple[Json, Json]:
    """The store's Deployment and Service."""
    labels = {"app": NAME}
    options = ["--quiet", "--port", f":{PORT}", "posix", f"{folder}/data"]
    container = {
        "name": NAME,
        "image": jobs.IMAGE,
        "imagePullPolicy": "Never",
        "command": [f"{folder}/versitygw", *options],
        "env": [{"name": "ROOT_ACCESS_KEY", "value": ACCESS_KEY}, {"name": "ROOT_SECRET_KEY", "value": key}],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "volumeMounts": [{"name": "folder", "mountPath": str(folder)}],
    }
    pod = {
        "metadata": {"labels": labels},
        "spec": {
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsUser": 1000},
            "containers": [container],
            "volumes": [{"name": "folder", "hostPath": {"path": str(folder)}}],
        },
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME},
        "spec": {"selector": {"matchLabels": labels}, "strategy": {"type": "Recreate"}, "template": pod},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME},
        "spec": {"selector": labels, "ports": [{"port": PORT}]},
    }
    return deployment, service


def _secret(key: str) -> Json:
    data = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": key}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "stringData": data}


def _loads(kube: Kube, tier: str) -> list[Json]:
    """The last load of both pods; to be polled: an assertion fails while it is not from that tier."""
    lines = [jobs.said(kube, pod["metadata"]["name"], "loaded")[-1:] for pod in kube.pods("train")]
    assert [line["tier"] for each in lines for line in each] == [tier, tier]
    return [line for each in lines for line in each]


def test_two_pods_without_a_volume_save_crash_and_move(store: Store) -> None:
    """Both write to the bucket; a crashed trainer resumes from memory, and a new pod from the bucket; no trainer has a credential."""
    kube, root = store.kube, f"{URL}/{store.kube.namespace}/train"
    kube.apply(_secret(KEY), store.policy())
    kube.create(*jobs.job(pods=2, env={"STEPS": "100000", "STEP_S": "0.2", "DIE_AT": str(DIES_AT)}))
    kube.until(lambda: kube.newest_checkpoint() >= PERIOD, Deadline.TRAINED, "a checkpoint")
    pods = kube.pods("train")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    for pod in pods:
        name = pod["metadata"]["name"]
        kinds = {kind for volume in pod["spec"]["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "projected", "emptyDir"}
        assert KEY in kube.exec(name, "pillion-sidecar", "env")
        seen = kube.exec(name, jobs.CONTAINER, "env")
        assert KEY not in seen
        assert "AWS_" not in seen

    loaded = kube.until(lambda: _loads(kube, "arena"), Deadline.RECOVERED, "both trainers to load after the crash")
    assert all(line["equal"] and line["step"] == 45 for line in loaded)
    kube.until(lambda: kube.newest_checkpoint() > DIES_AT, Deadline.TRAINED, "a checkpoint after the crash")

    listed = [each for each in kube.all("checkpoints") if condition(each, "Ready").get("status") == "True"]
    assert listed
    text = kube.run("get", "checkpoints", "-o", "wide")
    for each in listed:
        assert each["status"]["path"] == f"{root}/step-{each['status']['step']}"
        assert each["status"]["path"] in text

    before = kube.newest_checkpoint()
    kube.delete("pod", pods[1]["metadata"]["name"])
    loaded = kube.until(lambda: _loads(kube, "storage"), Deadline.RECOVERED, "both trainers to load from the bucket")
    assert all(line["equal"] for line in loaded)
    (step,) = {line["step"] for line in loaded}
    assert step >= before
    kube.until(lambda: kube.newest_checkpoint() > step, Deadline.TRAINED, "a checkpoint after the pod")
    runs = store.bucket / "runs" / kube.namespace
    assert jobs.newest(runs) > step
    assert condition(kube.get("checkpointpolicy", "llm"), "StorageReachable").get("status") == "True"
    held = condition(kube.get("checkpointpolicy", "llm"), "LocalDisks")
    assert (held.get("status"), held.get("reason")) == ("True", "Held"), held


@pytest.mark.may_warn("StorageError", "SaveFailed")
def test_a_key_that_the_store_refuses_is_told_and_training_goes_on(store: Store) -> None:
    """A wrong Secret is told before a step is made; with a key that ends later the saves are held on the node's disk, and reach the bucket once it is back."""
    kube = store.kube

    def reachable(status: str, text: str = "") -> bool:
        found = condition(kube.get("checkpointpolicy", "llm"), "StorageReachable")
        assert (found.get("status"), text in found.get("message", "")) == (status, True), found
        return True

    kube.apply(_secret(OTHER_KEY), store.policy())
    kube.create(*jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: reachable("False", REMEDY), Deadline.TRAINED, "the condition to name the keys")
    wrong = kube.until(lambda: kube.pod_name("train"), Deadline.API, "the pod")
    kube.until(lambda: REMEDY in kube.logs(wrong, jobs.CONTAINER), Deadline.TRAINED, "the trainer to be told")
    kube.apply(_secret(KEY))
    kube.delete("pod", wrong)
    kube.until(lambda: kube.pod_name("train") != wrong, Deadline.POD_GONE, "a replacement")
    kube.until(lambda: kube.newest_checkpoint() >= PERIOD, Deadline.TRAINED, "a checkpoint with the right key")
    kube.until(lambda: reachable("True"), Deadline.HOME, "the storage to be well")

    name = kube.pod_name("train")
    store.take(OTHER_KEY)
    kube.until(lambda: reachable("False", REMEDY), Deadline.REFUSED, "the condition to name the keys again")
    before = jobs.last(kube, name, "step")
    kube.until(lambda: jobs.last(kube, name, "step") >= before + 2 * PERIOD, Deadline.TRAINED, "training to go on")

    def held() -> list[int]:
        found = [
            each["status"]["step"]
            for each in kube.all("checkpoints")
            if condition(each, "Ready").get("reason") == "Held" and each["status"]["step"] > before
        ]
        assert found
        return found

    kube.until(held, Deadline.HOME, "a save that the node's disk holds while storage refuses it")
    store.take(KEY)
    kube.until(
        lambda: kube.newest_checkpoint() > before, Deadline.REFUSED, "a checkpoint of what was trained meanwhile"
    )
    kube.until(lambda: reachable("True"), Deadline.HOME, "the storage to be well again")
    (pod,) = kube.pods("train")
    assert [container_status(pod, each)["restartCount"] for each in (jobs.CONTAINER, "pillion-sidecar")] == [0, 0]


@pytest.mark.skipif(not os.environ.get("PILLION_CAMPAIGN_ROUNDS"), reason="a campaign's: it takes two minutes")
@pytest.mark.usefixtures("in_service")
@pytest.mark.may_warn("SaveFailed", "StorageError", "LoadFailed: .*BarrierTimeout")
def test_a_job_without_a_volume_goes_on_without_a_node(store: Store, cluster: Cluster) -> None:
    """Of the rank of a lost node the bucket has all that is left: both load its newest commit on the other node, and go on to commit."""
    kube = store.kube
    kube.apply(_secret(KEY), store.policy())
    kube.create(*jobs.job(pods=2, env={"STEPS": "100000", "STEP_S": "0.2"}, pod=POD))
    kube.until(lambda: kube.newest_checkpoint() >= 2 * PERIOD, Deadline.TRAINED, "two commits")
    (serving,) = kube.all("pods", f"app={NAME}")
    old = kube.pods("train")
    (lost,) = {pod["spec"]["nodeName"] for pod in old} - {serving["spec"]["nodeName"]}
    runs = store.bucket / "runs" / kube.namespace
    with cluster.lost(lost):
        committed = jobs.newest(runs)
        kube.until(lambda: not ready(kube, lost), Deadline.NODE_LOST, "the node to be found lost")
        kube.run("taint", "node", lost, f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute", "--overwrite")
        # Both, as a job's operator does it: torchrun's store may have been on the lost node (`test_node_lost`).
        for pod in kube.pods("train"):
            if pod["spec"].get("nodeName") == serving["spec"]["nodeName"]:
                kube.delete("pod", pod["metadata"]["name"])

        def loads() -> list[Json]:
            new = {pod["metadata"]["uid"] for pod in kube.pods("train")}
            assert not new & {pod["metadata"]["uid"] for pod in old}
            return _loads(kube, "storage")

        loaded = kube.until(loads, Deadline.RECOVERED, "both ranks to load")
        assert all(line["equal"] for line in loaded)
        (step,) = {line["step"] for line in loaded}
        # A commit may have been on its way when the power went.
        assert committed <= step <= committed + PERIOD
        kube.until(lambda: jobs.newest(runs) > step, Deadline.TRAINED, "commits of the two pods on one node")
