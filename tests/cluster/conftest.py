"""
The whole of: the cluster of a test run, the product installed on it, and a namespace for each test.

Called from: pytest. A test asks for `kube` (a namespace on a cluster with the product), `training` (the same with a volume and the
trainer's script), or `api` (an API server with our CRDs, for what talks to it directly).
Must never: leave a namespace, a volume or a cluster behind, unless --keep-cluster was said.
"""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from cluster.harness import binaries, clusters, progress
from cluster.harness.machine import HarnessError
from support import jobs
from support.deadlines import Deadline, eventually
from support.kube import Json, Kube, undeclared
from support.lost_nodes import OUT_OF_SERVICE
from support.release import NAMESPACE, Release

PREFIX: Final = "pillion-test-"
"""Of the tests' namespaces."""


@dataclass(frozen=True, slots=True)
class Api:
    """An API server."""

    kubeconfig: Path
    namespace: str
    """Fresh, and removed after the test."""


@dataclass(frozen=True, slots=True)
class Training:
    """A namespace that is ready for training jobs."""

    kube: Kube
    volume: Path
    """The checkpoints' volume, as a folder of this machine."""

    def run(self, policy: Json, *job: Json) -> None:
        """Apply a policy and the objects of a job."""
        self.kube.apply(policy)
        self.kube.create(*job)


@contextlib.contextmanager
def aloud(config: pytest.Config) -> Iterator[None]:
    """What is written in the block is seen at once: the harness says where it is while it builds, which takes minutes."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled():
        yield


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Iterator[clusters.Cluster]:
    """The cluster; where it cannot be had, the tests fail and say why."""
    keep = bool(pytestconfig.getoption("--keep-cluster"))
    try:
        found = clusters.choose(str(pytestconfig.getoption("--cluster")))
        if not (keep and found.is_up()):
            with aloud(pytestconfig):
                found.up()
    except HarnessError as err:
        pytest.exit(f"no cluster: {err}", returncode=4)
    yield found
    everywhere = Kube(found.kubectl, found.kubeconfig, "default")
    eventually(lambda: not leftovers(everywhere), Deadline.POD_GONE, "the namespaces of the tests to be gone")
    if not keep:
        found.down()


def leftovers(kube: Kube) -> list[str]:
    """Namespaces of tests that are still there."""
    return [name for each in kube.all("namespaces") if (name := each["metadata"]["name"]).startswith(PREFIX)]


@pytest.fixture(scope="session")
def release(cluster: clusters.Cluster, pytestconfig: pytest.Config) -> Iterator[Release]:
    """The product, installed from the chart with the images of this checkout."""
    try:
        with aloud(pytestconfig):
            cluster.build_and_load()
            helm = Path(shutil.which("helm") or binaries.program("helm"))
    except HarnessError as err:
        pytest.exit(f"no images: {err}", returncode=4)
    found = Release(helm, Kube(cluster.kubectl, cluster.kubeconfig, NAMESPACE))
    with aloud(pytestconfig), progress.step("installing the chart"):
        found.install()
    yield found
    found.uninstall()


@pytest.fixture
def kube(cluster: clusters.Cluster, release: Release, request: pytest.FixtureRequest) -> Iterator[Kube]:
    """
    A fresh namespace on the cluster with the product. At the end every Warning of Pillion's in it has to be one that the story declares
    with the marker `may_warn`: one that nobody expects is a false alarm, or a defect that the story did not look for.
    """
    del release
    declared = [pattern for marker in request.node.iter_markers("may_warn") for pattern in marker.args]
    with _namespace(cluster) as found:
        yield found
        assert undeclared(found.warnings(), declared) == [], "Warnings that the story does not declare"


def _is_bound(kube: Kube, claim: str) -> bool:
    found = kube.get("persistentvolumeclaim", claim)
    return found is not None and found.get("status", {}).get("phase") == "Bound"


@pytest.fixture
def training(cluster: clusters.Cluster, kube: Kube) -> Iterator[Training]:
    """A fresh namespace with a shared volume, its claim `checkpoints`, and the trainer's script."""
    folder = cluster.volume(kube.namespace)
    volume, claim = jobs.claim(kube.namespace, folder)
    kube.apply(volume, claim, jobs.script())
    # A pod that comes before its claim is bound may be looked at again by the scheduler only after five minutes.
    kube.until(lambda: _is_bound(kube, claim["metadata"]["name"]), Deadline.API, "the claim to be bound")
    yield Training(kube, folder)
    kube.delete("persistentvolume", volume["metadata"]["name"])
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def api(cluster: clusters.Cluster, release: Release) -> Iterator[Api]:
    """An API server with our CRDs, and a fresh namespace."""
    del release
    with _namespace(cluster) as found:
        yield Api(found.kubeconfig, found.namespace)


@pytest.fixture
def in_service(release: Release) -> Iterator[None]:
    """Whatever the test does, every node is in service afterwards, and the operator runs."""
    yield
    for node in release.kube.all("nodes"):
        if any(taint["key"] == OUT_OF_SERVICE for taint in node["spec"].get("taints", [])):
            release.kube.run("taint", "node", node["metadata"]["name"], f"{OUT_OF_SERVICE}-")
    release.install()


@contextlib.contextmanager
def _namespace(cluster: clusters.Cluster) -> Iterator[Kube]:
    name = f"{PREFIX}{uuid.uuid4().hex[:8]}"
    found = Kube(cluster.kubectl, cluster.kubeconfig, name)
    found.run("create", "namespace", name)
    try:
        yield found
    finally:
        # Jobs first: their controller would make new pods while the namespace empties. No grace: nothing is looked at any more.
        found.run("delete", "jobs", "--all", "--cascade=background", "--wait=false")
        found.run("delete", "pods", "--all", "--force", "--grace-period=0", "--wait=false")
        # It empties while the next test runs; `cluster` sees to it that all are gone.
        found.run("delete", "namespace", name, "--wait=false")
